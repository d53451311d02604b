"""A plain reward model to be trained: a classifier that reads conversations in a chat template.

The baseline that a POLAR model is compared with. Nothing of ours is in its files: transformers,
vLLM and TRL load it, and the tokenizer's chat template is its whole input format.
"""

from __future__ import annotations

from typing import Any

import torch

from polarctl import console
from polarctl.errors import UsageError
from polarctl.model import reward_model as models
from polarctl.model.conversation import ChatEncoder, check_template, limit_of


def create(
    *,
    base: str | None = None,
    config_path: str | None = None,
    tokenizer_path: str | None = None,
    max_length: int | None = None,
    dtype: Any = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> models.PolarModel:
    """A plain reward model to be trained, which reads conversations in the chat template.

    A causal LM gets a zero head; a plain reward model goes on with its own. It is saved as a
    classifier that transformers reads by itself: its padding is never the token that a conversation
    ends in, because transformers takes the last other token for the last one.

    Args:
        base: Folder or Hub id of a causal LM or of a plain reward model.
        config_path: Instead of `base`: a config for random weights.
        tokenizer_path: Tokenizer, where the model has none or another is wanted.
        max_length: Tokens of one input, or None: 16384, or what model and tokenizer take.
        dtype: Precision of the weights.
        device: `cpu`; `meta` for the shapes alone: no weights have to be there.
        seed: Seed of random weights.

    Raises:
        UsageError: Neither or both of `base` and `config_path`; a POLAR model; a length that the
            model does not take.
        MissingError: Model, tokenizer or chat template is not there.
    """
    if (base is None) == (config_path is None):
        raise UsageError(
            "pass either `--model` or `--init-from-config`", hint="-m FOLDER, or a Hub id"
        )
    source = base or config_path
    assert source is not None
    config = models.load_config(source, weights=device != "meta")
    if getattr(config, "polar", None) is not None:
        raise UsageError(
            f"`--prompt-style chat`: {source} is a POLAR model",
            hint="the base model that it was made from, or no --prompt-style",
        )
    tokenizer = models.load_tokenizer(tokenizer_path or source)
    check_template(tokenizer_path or source, tokenizer)
    longest = limit_of(config, tokenizer)
    if max_length is not None and max_length > longest:
        raise UsageError(f"`--max-length {max_length}`: {source} takes {longest} tokens at most")
    limit = max_length or min(models.MAX_LENGTH, longest)
    encoder = ChatEncoder(tokenizer, limit, end=getattr(config, "reward_token_id", None))
    _pad_apart(tokenizer, encoder)
    tokenizer.model_max_length, tokenizer.padding_side = limit, "right"
    goes_on = base is not None and models.is_classifier(config)
    if goes_on and config.num_labels != 1:
        raise UsageError(f"{base}: a classifier of {config.num_labels} labels, a reward has one")
    config.num_labels, config.problem_type = 1, "regression"
    config.pad_token_id = None  # a new one has no place in the embeddings before they have grown
    model = models.with_all_tokens(
        base, config, tokenizer, head=goes_on, device=device, dtype=dtype, seed=seed
    )
    if not goes_on:
        torch.nn.init.zeros_(model.score.weight)  # the first loss is ln 2
    model.config.pad_token_id = tokenizer.pad_token_id
    return models.PolarModel(model, tokenizer, encoder)


def _pad_apart(tokenizer: Any, encoder: ChatEncoder) -> None:
    """Give the tokenizer a padding that no conversation ends in; said when it is not its own."""
    last = encoder.report("Why?", "", "So.").ids[-1]
    if tokenizer.pad_token_id not in (None, last):
        return
    names = [tokenizer.eos_token, tokenizer.unk_token]
    apart = [name for name in names if name and tokenizer.convert_tokens_to_ids(name) != last]
    tokenizer.add_special_tokens({"pad_token": apart[0] if apart else "<|pad|>"})
    if "padding" not in console.choices():
        console.choice("padding", tokenizer.pad_token, "its own is none, or ends a conversation")
