"""The input template of POLAR models, under the name that scripts import."""

from polarctl.model.template import Encoded, Encoder, content_text

__all__ = ["Encoded", "Encoder", "content_text"]
