"""Checkpoints of a training run that survive a crash at any moment.

    DIR/checkpoints/step-00000100/   model.safetensors, optimizer.safetensors, checkpoint.json

`checkpoint.json` names size and hash of every file and is written last: a folder without it, or
whose files disagree with it, is no checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
from safetensors.torch import load_file, save_file

from polarctl import console, manifest
from polarctl.training import Trainer

_MARK = "checkpoint.json"


def save(folder: Path, trainer: Trainer, identity: dict[str, Any]) -> None:
    """Write the trainer's state and drop older checkpoints.

    Args:
        folder: The run's `checkpoints` folder.
        trainer: What to save.
        identity: What must be the same for a resume.
    """
    target = folder / f"step-{trainer.step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, target / "model.safetensors")
    moments = {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, state in trainer.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, target / "optimizer.safetensors")
    commit(target, trainer.step, identity)


def commit(target: Path, step: int, identity: dict[str, Any]) -> None:
    """Mark a checkpoint as whole, now that its files are written, and drop the others.

    Args:
        target: A folder whose name ends in `-` and the step.
        step: Steps done.
        identity: What must be the same for a resume.
    """
    mark = {"step": step, "identity": identity, "files": manifest.folder_files(target)}
    manifest.write_atomic(target / _MARK, orjson.dumps(mark))
    for old in _by_step(target.parent):
        if old != target:
            shutil.rmtree(old)


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its mark, or None. Broken ones are said and passed over."""
    for target in reversed(_by_step(folder)):
        mark = _valid(target)
        if mark is not None:
            return target, mark
        console.warn(f"{target}: incomplete or damaged checkpoint, passed over")
    return None


def _valid(target: Path) -> dict[str, Any] | None:
    try:
        mark: dict[str, Any] = orjson.loads((target / _MARK).read_bytes())
        files = {k: v for k, v in manifest.folder_files(target).items() if k != _MARK}
        return mark if files == mark["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def restore(target: Path, mark: dict[str, Any], trainer: Trainer) -> None:
    """Put the saved state into the trainer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.load_state_dict(load_file(target / "model.safetensors"), strict=True)
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(target / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    whole = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict({**whole, "state": state})
    trainer.step = mark["step"]
