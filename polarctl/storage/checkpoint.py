"""Checkpoints that survive a crash at any moment.

    DIR/checkpoints/step-00000100/   the files of a training state, checkpoint.json

`checkpoint.json` names size and hash of every file and holds a hash of itself; it is written last.
A folder without it, or whose bytes disagree with it, is not a checkpoint. The last two are kept, so
that one damaged on disk costs some steps and not the run.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from polarctl import console
from polarctl.errors import PolarctlError
from polarctl.storage import atomic, manifest

MARK, _OWN = "checkpoint.json", "sha256"
_NAME = re.compile(r"(?:step|checkpoint)-([0-9]{1,12})")
_KEEP = 2


def commit(target: Path, step: int, identity: dict[str, Any], **more: Any) -> None:
    """Mark a checkpoint as whole, now that its files are written, and drop the oldest.

    Args:
        target: A folder whose name ends in `-` and the step.
        step: Steps done.
        identity: What must be the same for a resume.
        **more: What else a resume needs to know, as JSON.
    """
    atomic.sync_files(target)
    mark = {"step": step, "identity": identity, **more, "files": manifest.folder_files(target)}
    atomic.write(target / MARK, orjson.dumps({**mark, _OWN: _hash(mark)}))
    atomic.sync_folder(target.parent)
    others = [path for path in _by_step(target.parent) if path != target]
    # Later ones were damaged, or this run would have gone on from there.
    earlier = [path for path in others if _step(path) < step]
    for path in others:
        if path not in earlier[1 - _KEEP :]:
            shutil.rmtree(path)


def _hash(mark: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(mark)).hexdigest()


def _step(path: Path) -> int:
    """The step in the name of a checkpoint's folder, ours or transformers'; -1 for other names."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _by_step(folder: Path) -> list[Path]:
    """What could be checkpoints; all else in the folder is somebody else's."""
    found = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in found if _step(path) >= 0]
    return sorted((p for p in named if p.is_dir() and not p.is_symlink()), key=_step)


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
        mark: dict[str, Any] = orjson.loads((target / MARK).read_bytes())
        if mark.pop(_OWN) != _hash(mark):
            return None
        files = {k: v for k, v in manifest.folder_files(target).items() if k != MARK}
        return mark if files == mark["files"] else None
    except (PolarctlError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def data_only(target: Path) -> Iterator[None]:
    """Have every `torch.load` in here read data alone, and never run a program that a file names.

    The hashes of a checkpoint say that its files belong together, not who wrote them: whoever can
    write into the folder can write the hashes too.

    Args:
        target: The checkpoint that is being loaded, for the message.

    Raises:
        PolarctlError: A file holds more than data; nothing of it was run.
    """
    import torch

    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # DeepSpeed passes `weights_only=False`; this is above
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"`{named[1]}`" if named else "more than data"
        raise PolarctlError(
            f"{target}: a file in it holds {what}, which no state of training does; nothing of it "
            "was run",
            hint="not written by this program: remove that folder, and see who can write there",
        ) from None
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _plain_classes() -> list[Any]:
    """The classes in DeepSpeed's states besides tensors and numbers: they hold values, no more."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
