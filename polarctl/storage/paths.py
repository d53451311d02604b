"""Whether the outputs that a user names can be written, before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from polarctl.config import Common, resolved
from polarctl.errors import UsageError
from polarctl.storage import replace


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
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder", hint=f"mkdir -p {folder}")
        if not os.access(target if target.exists() else folder, os.W_OK):
            raise UsageError(f"{target}: cannot be written")
        for path in inputs:
            if path != "-" and target.exists() and os.path.samefile(path, target):
                raise UsageError(f"{target}: is both input and output", hint="another -o")
        replace.check_unused(target, resolved(config))
