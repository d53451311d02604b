"""What stands at the head of a report: what was evaluated, by which command, with what, and when.

Times and hosts are in no other part of a report, so that equal figures give equal `report.json`.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from polarctl import __version__, console
from polarctl.parallel import launcher

Facts = list[tuple[str, str]]


def facts(paths: Sequence[str], records: int, model: str | None = None) -> Facts:
    """The head of a report.

    Args:
        paths: The inputs.
        records: How many records they hold.
        model: What was evaluated; None: what the manifests of the inputs name.
    """
    models = [model] if model else list(dict.fromkeys(filter(None, map(_model_of, paths))))
    source = ", ".join("standard input" if path == "-" else path for path in paths)
    found = [("model", ", ".join(models))] if models else []
    found.append(("data", f"{source}: {records:,} records"))
    if launcher.command_line:
        found.append(("command", f"polarctl {shlex.join(launcher.command_line)}"))
    found.append(("versions", f"polarctl {__version__}, Python {platform.python_version()}"))
    found.append(("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")))
    return [(name, console.plain(text, 2000)) for name, text in found]


def _model_of(path: str) -> str | None:
    """The model that has scored a file."""
    try:
        made: Any = orjson.loads(Path(f"{path}.manifest.json").read_bytes())
        model = made["config"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return model if isinstance(model, str) else None
