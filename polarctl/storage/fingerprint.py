"""What must be the same for a resume, or for an output that exists, to count as this run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from polarctl import __version__
from polarctl.config import Common, semantic
from polarctl.records import SCHEMA_VERSION
from polarctl.storage import manifest


def header(
    stage: str, config: Common, inputs: list[dict[str, Any]], identity: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same for a resume to be sound."""
    fields = {
        "stage": stage,
        "version": __version__,
        "schema_version": SCHEMA_VERSION,
        "input_bytes": [entry["bytes"] for entry in inputs],
        **semantic(config),
        **identity,
        "rejects": Path(config.rejects).name if config.rejects else None,
    }
    plain: dict[str, Any] = orjson.loads(orjson.dumps(fields))
    return plain


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that differs, in words; empty when nothing does."""
    for key in [*now, *(k for k in before if k not in now)]:
        if before.get(key) != now.get(key):
            return f"`{key}` was {before.get(key)!r} and is now {now.get(key)!r}"
    return ""


def changed_since(
    done_mark: Path, output: Path, now: dict[str, Any], inputs: list[dict[str, Any]]
) -> str:
    """Why a finished output is not what this run would write, in words; empty when it is.

    Args:
        done_mark: The output's manifest.
        output: The output.
        now: `header` of this run.
        inputs: `polarctl.storage.read.sizes` of this run's inputs.
    """
    try:
        record = orjson.loads(done_mark.read_bytes())
        before, size = record["fingerprint"], record["outputs"][output.name]["bytes"]
        digests = [entry.get("sha256") for entry in record["inputs"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"but {done_mark} is not its manifest"
    changed = difference(before, now)
    if changed:
        return changed
    if size != output.stat().st_size:
        return "but its size is not the one in its manifest"
    # Every byte is read again, at 1 GB/s or more: what a size and a time say can be wrong, and
    # whoever runs a finished command again builds on what is there.
    if record["outputs"][output.name].get("sha256") != manifest.sha256(output):
        return "but its bytes are not those in its manifest"
    for entry, digest in zip(inputs, digests, strict=True):
        if entry["bytes"] is None:
            return "and whether the piped input is the same cannot be known"
        if digest != manifest.sha256(entry["path"]):
            return f"but {entry['path']} has changed since"
    return ""
