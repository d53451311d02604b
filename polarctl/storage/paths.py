"""Whether the outputs that a user names can be written, before any work is done."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from polarctl.config import Common, resolved
from polarctl.errors import UsageError
from polarctl.storage import replace


def make_folders(*named: str | None) -> list[Path]:
    """Make the folders that outputs are to be in; those that were made, the innermost first.

    Args:
        *named: Paths of outputs that `check_paths` has passed; None and `-` are none.

    Raises:
        UsageError: One cannot be made.
    """
    made: list[Path] = []
    for folder in {Path(path).parent for path in named if path and path != "-"}:
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made: {error.strerror}") from None
        made += absent
    return sorted(made, key=lambda path: -len(path.parts))


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that a run has made and left empty, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_paths(config: Common, inputs: list[str]) -> None:
    """Refuse an output that is an input or another output, or that cannot be written.

    Raises:
        UsageError: Says which and why.
    """
    named = (config.output, config.rejects, config.manifest)
    targets = [Path(path) for path in named if path and path != "-"]
    for number, target in enumerate(targets):
        try:
            replace.next_to(f"{target}.manifest.json.tmp").exists()  # the longest name
        except OSError as error:
            raise UsageError(f"{target}: cannot be written: {error.strerror}") from None
        folder = target.parent
        if any(target.resolve() == other.resolve() for other in targets[:number]):
            raise UsageError(f"{target}: is named for two outputs")
        if target.exists() and not target.is_file():
            raise UsageError(f"{target}: is not a regular file", hint="`-o -` writes to stdout")
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not above.is_dir():
            raise UsageError(f"{target}: cannot be written: {above} is not a folder")
        if not os.access(target if target.exists() else above, os.W_OK):
            raise UsageError(f"{target}: cannot be written")
        for path in inputs:
            if path != "-" and target.exists() and os.path.samefile(path, target):
                raise UsageError(f"{target}: is both input and output", hint="another -o")
        replace.check_unused(target, resolved(config))
