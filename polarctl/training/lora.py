"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft; a classifier's head is trained whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polarctl import console
from polarctl.errors import need
from polarctl.storage.atomic import open_to_umask


def adapters(task: str, *, rank: int, alpha: int | None, **more: Any) -> Any:
    """Adapters in every linear layer but the head, as a config of peft.

    Args:
        task: What the model does, in peft's words.
        rank: Rank of the adapters.
        alpha: Their scale times the rank; default: twice the rank.
        **more: Other settings of peft's `LoraConfig`.

    Raises:
        MissingError: peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise need("peft", "lora") from None
    return peft.LoraConfig(
        task_type=task,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear",
        **more,
    )


def adapt(
    classifier: Any, *, rank: int, alpha: int | None, new_tokens: Sequence[int], quiet: bool = False
) -> Any:
    """Put adapters into every linear layer of a classifier, in place, and freeze the rest.

    Args:
        classifier: A `...ForSequenceClassification`.
        rank: Rank of the adapters.
        alpha: Their scale times the rank; default: twice the rank.
        new_tokens: Ids whose embeddings have just been made: they are trained, since no adapter
            could ever reach them.
        quiet: Do not say how many weights are trained.

    Returns:
        peft's model around the classifier.

    Raises:
        MissingError: peft is not installed.
    """
    more = {"trainable_token_indices": {"embed_tokens": list(new_tokens)}} if new_tokens else {}
    # The task keeps the head `score` trainable, and has it saved.
    config = adapters("SEQ_CLS", rank=rank, alpha=alpha, exclude_modules=["score"], **more)
    import peft

    wrapped = peft.get_peft_model(classifier, config)
    if not quiet:
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        console.note(f"LoRA: {trained:,} weights are trained")
    return wrapped


def save(wrapped: Any, folder: Path) -> None:
    """Write the adapters, with the embeddings that new tokens came into, as peft loads them."""
    wrapped.save_pretrained(folder, save_embedding_layers=True)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form, to be filled in
    # peft writes sets, in another order in every process: the same run gives the same bytes.
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text("utf-8"))
    values["target_modules"] = sorted(values["target_modules"])
    config.write_text(json.dumps(values, indent=2, sort_keys=True), "utf-8")
    open_to_umask(folder)


def merged(wrapped: Any) -> Any:
    """The model with the adapters added to its weights, as a plain one."""
    return wrapped.merge_and_unload()
