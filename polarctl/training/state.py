"""The state of a training run on disk: what every process needs to go on to the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from polarctl.storage import checkpoint
from polarctl.training.loop import Trainer

T = TypeVar("T")


def save(folder: Path, trainer: Trainer, identity: dict[str, Any], **more: Any) -> None:
    """Write the trainer's state; all processes call it, the first one marks it as whole.

    Args:
        folder: The run's `checkpoints` folder.
        trainer: What to save.
        identity: What must be the same for a resume.
        **more: What else a resume needs to know, as JSON.
    """
    accelerator = trainer.engine.accelerator
    target = folder / f"step-{trainer.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)  # what a killed run has begun
        target.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        trainer.engine.save(target)
        if accelerator.is_main_process:
            checkpoint.commit(target, trainer.step, identity, **more)
    except Exception:  # a full disk, mostly: what is left of it would only take room
        shutil.rmtree(target, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def first_says(accelerator: Any, question: Callable[[], T]) -> T:
    """The answer that the first process finds, in all processes."""
    answer: list[Any] = [question() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    found: T = answer[0]
    return found


def newest(folder: Path, trainer: Trainer) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its mark; the first process looks, for all."""
    return first_says(trainer.engine.accelerator, lambda: checkpoint.newest(folder))


def restore(target: Path, mark: dict[str, Any], trainer: Trainer) -> None:
    """Put the saved state into the trainer."""
    trainer.engine.load(target)
    trainer.step = mark["step"]
