"""Similarity of texts by a language model's hidden states: a baseline that has seen no preference.

The embedding of a text is the mean of the last hidden states over its tokens; two texts are as
similar as the cosine of the angle between theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from polarctl.errors import UsageError
from polarctl.model import devices
from polarctl.model import reward_model as models
from polarctl.model.template import content_text
from polarctl.records import Record, outputs_of

NAME = "embedding"
MOST_TOKENS = 2048  # of a text, its first
BATCH = 16


class Embedder:
    """A model that says how similar answers are to their references.

    Args:
        path: Folder or Hub id of a model of transformers.
        device: Torch device name, or `auto`.

    Raises:
        MissingError: It is not there.
        UsageError: It cannot be loaded.
    """

    def __init__(self, path: str, device: str = "auto"):
        config = models.load_config(path)
        self.tokenizer = models.load_tokenizer(path)
        self.device = devices.device_of(device)
        try:
            model = transformers.AutoModel.from_pretrained(
                path, config=config, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{path}: cannot be loaded ({models.first_line(error)})") from None
        self.model = model.eval().to(self.device)
        context = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
        self.most = min(MOST_TOKENS, context)

    def similarities(self, records: Sequence[Record]) -> list[list[float] | None]:
        """For each record the similarity of every answer to its reference, -1 to 1.

        None for a record without a reference. A text without a token is similar to nothing: 0.
        """
        texts: dict[str, int] = {}
        wanted: list[list[int] | None] = []
        for record in records:
            reference = content_text(record.get("reference", ""))
            if not reference.strip():
                wanted.append(None)
                continue
            mine = [reference, *(content_text(output) for output in outputs_of(record))]
            wanted.append([texts.setdefault(text, len(texts)) for text in mine])
        if not texts:
            return [None] * len(records)
        found = self._embed(list(texts))
        return [
            None if places is None else (found[places[1:]] @ found[places[0]]).tolist()
            for places in wanted
        ]

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings of length 1, or 0 for a text without a token. Shape: (texts, hidden)."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.most)["input_ids"]
        # Neighbours of one length, so that little is padded.
        order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: len(encoded[i]))
        found = torch.zeros(len(texts), self.model.config.get_text_config().hidden_size)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            ids, mask = models.pad([encoded[i] for i in places], 0, self.device)
            states = self.model(ids, attention_mask=mask).last_hidden_state
            weight = mask[:, :, None].float()
            means = (states.float() * weight).sum(1) / weight.sum(1)
            found[places] = torch.nn.functional.normalize(means).cpu()
        return found
