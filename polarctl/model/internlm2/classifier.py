"""An InternLM2 checkpoint as a Llama classifier in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from polarctl import console
from polarctl.errors import MissingError
from polarctl.model.internlm2 import layout
from polarctl.model.internlm2.files import WeightFiles, folder_of
from polarctl.model.internlm2.layout import Made

LM_HEAD = "output.weight"


def load(path: str, config: Any, dtype: Any) -> tuple[Any, list[str]]:
    """The model with its weights, which are read one after the other.

    Args:
        path: Folder or Hub id of a reward model or a causal LM in InternLM2's format.
        config: Its config as a Llama's, by `config.to_llama`; one label.
        dtype: Precision of the weights in memory.

    Returns:
        A `LlamaForSequenceClassification` and the weights that are not there: those of the reward
        head, if it is a causal LM.

    Raises:
        MissingError: Weights are missing, unknown, of another shape, or cannot be read.
    """
    head = "LlamaForSequenceClassification" in (config.architectures or [])
    say_rope(config)
    files = WeightFiles(folder_of(path))
    wanted = layout.llama_weights(config, head=head)
    files.require(layout.sources(wanted), optional=() if head else (LM_HEAD,))
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(config)
    for name, tensor in made(wanted, files):
        _put(model, name, tensor.to(dtype, copy=True, memory_format=torch.contiguous_format))
    if not head:
        _put(model, "score.weight", torch.empty(1, config.hidden_size, dtype=dtype))
    # Its frequencies are computed, not loaded, and on the meta device they have no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.config.dtype = dtype
    return model.eval(), [] if head else ["score.weight"]


def made(wanted: Mapping[str, Made], files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    """The weights of one layout, one by one, from the files of the other.

    Raises:
        MissingError: A weight has another shape than the config says.
    """
    for name, how in wanted.items():
        parts = [files[source] for source in how.sources]
        try:
            tensor = how.make(*parts)
        except RuntimeError:  # no reshape: a fused weight of another size
            tensor = None
        if tensor is None or tuple(tensor.shape) != how.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise MissingError(
                f"{files.folder}: {', '.join(how.sources)} of shape {shapes} cannot give `{name}` "
                f"of shape {how.shape}",
                hint="config.json and the weights are of different models",
            )
        yield name, tensor


def say_rope(config: Any) -> None:
    """Say that a scaling of positions was left out, where it was."""
    left_out = getattr(config, "internlm2_rope_scaling", None)
    if left_out and config.rope_parameters["rope_type"] == "default":
        console.choice(
            "positions",
            "not scaled",
            f"inputs never exceed {config.max_position_embeddings:,} tokens, where scaling begins",
        )


def _put(model: Any, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
