"""The journal of an output: a header, a line for each finished unit, last what changes places.

Every line holds a hash of itself: what is read back is what was written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import orjson

from polarctl.storage import atomic

_OWN = "blake2b"


def _hash(entry: dict[str, Any]) -> str:
    return hashlib.blake2b(orjson.dumps(entry), digest_size=8).hexdigest()


def read(journal: IO[bytes]) -> list[dict[str, Any]]:
    """The sound lines: the header, one entry for each unit, and perhaps a `swap`."""
    journal.seek(0)
    entries: list[dict[str, Any]] = []
    for line in journal.read().splitlines(keepends=True):
        try:
            entry = orjson.loads(line)
            sound = entry.pop(_OWN) == _hash(entry)
        except (
            orjson.JSONDecodeError,
            orjson.JSONEncodeError,
            AttributeError,
            KeyError,
            TypeError,
        ):
            break
        wanted = {"done", "swap"} if entries else {"stage"}
        if not (sound and wanted & entry.keys() and line.endswith(b"\n")):
            break
        entries.append(entry)
    return entries


def add(journal: IO[bytes], entry: dict[str, Any]) -> None:
    """Add a line and make it durable."""
    journal.write(orjson.dumps({**entry, _OWN: _hash(entry)}) + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def swap(pairs: Iterable[tuple[str, str]]) -> None:
    """Give new files the places of old ones, each in one step, the manifest last.

    Args:
        pairs: (new, old) paths; those whose new file is gone have been done.
    """
    for new, old in pairs:
        if os.path.exists(new):
            os.replace(new, old)
            atomic.sync_folder(Path(old).parent)
