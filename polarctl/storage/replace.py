"""What may be replaced, and how: the new takes the old one's place only when it is complete.

Beside the output `X` a run grows `.polarctl-next.X`: with `--force` until all of it is there, else
until its first unit of work is. So what stands at `X` is always a result, or the beginning of one
that `X.journal` vouches for.

`--force` replaces what this program wrote there: a file that its manifest or its journal names, a
folder in which every file is named by `manifest.json` or is known as a part of an unfinished run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import orjson

from polarctl.errors import UsageError
from polarctl.storage import atomic
from polarctl.storage.manifest import MANIFEST as MANIFEST

_PREFIX = ".polarctl-next."
_WRITTEN = frozenset({"output", "rejects", "manifest", "report"})
LOCK = ".lock"


def next_to(path: str | Path) -> Path:
    """Where the next content of a path grows, in the same folder; links are followed first."""
    real = Path(os.path.realpath(path))
    return real.with_name(_PREFIX + real.name)


def refuse(target: str | Path, why: str) -> NoReturn:
    """Raise the UsageError for an output that is not replaced, with `--force` or without."""
    raise UsageError(
        f"{target}: is not replaced: {why}", hint="name another output, or remove this one yourself"
    )


# -- what the run reads ----------------------------------------------------------------------------


def check_unused(target: str | Path, options: Mapping[str, Any], more: Iterable[str] = ()) -> None:
    """Refuse an output that is, or holds, a file or a model that the run reads.

    Args:
        target: The output, a file or a folder; it need not exist.
        options: Names to values; each value that names something that exists counts as read.
        more: Other paths that are read, such as the models of a pool.

    Raises:
        UsageError: Says what is read.
    """
    real = Path(os.path.realpath(target))
    if not real.exists():
        return
    for path in [*_read_by(options), *more]:
        used = Path(path)
        if not used.exists():
            continue
        # The files of a model may be links to elsewhere, as in the Hub's cache.
        inside = list(used.iterdir()) if used.is_dir() else []
        for one in [used, *inside]:
            place = Path(os.path.realpath(one))
            if real.is_dir() and (real == place or real in place.parents):
                refuse(target, f"this run reads {used}")
            if real.is_file() and place.is_file() and os.path.samefile(real, place):
                refuse(target, f"this run reads {used}")


def _read_by(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if name not in _WRITTEN and isinstance(one, str) and one not in ("", "-"):
                yield one


# -- what this program wrote -----------------------------------------------------------------------


def _manifest(mark: Path) -> dict[str, Any] | None:
    """A manifest of ours, or None."""
    try:
        found = orjson.loads(mark.read_bytes())
        ours = {"stage", "outputs"} <= found.keys() and isinstance(found["outputs"], dict)
        return found if ours else None
    except (OSError, ValueError, AttributeError):
        return None


def check_mark(mark: Path) -> None:
    """Refuse to write a manifest over a file that is none."""
    if mark.exists() and mark.stat().st_size and _manifest(mark) is None:
        refuse(mark, "it is no manifest")


def check_file(target: str | Path, mark: Path) -> None:
    """Refuse to replace a file that its manifest does not name."""
    found = _manifest(mark)
    if found is None or Path(target).name not in found["outputs"]:
        refuse(target, f"no {mark} says that polarctl wrote it")


def check_rejects(target: str | Path) -> None:
    """Refuse to replace a file that does not begin with a rejected record."""
    with open(target, "rb") as stream:
        try:
            first = orjson.loads(stream.readline(64 << 20))
        except ValueError:
            first = None
    if not isinstance(first, dict) or list(first) != ["where", "reason", "record"]:
        refuse(target, "it holds no rejected records")


def check_report(folder: str | Path, names: Iterable[str]) -> None:
    """Refuse to write a report over files that are not those of a report.

    Args:
        folder: Where the report goes.
        names: The report's files; `report.json` among them tells whose they are.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        refuse(folder, "it is a file, and a report is a folder")
    try:
        told = orjson.loads(Path(folder, "report.json").read_bytes()).keys()
        ours = bool({"overall", "accuracy_differences", "wins"} & told)
    except (OSError, ValueError, AttributeError):
        ours = False
    for name in names:
        if not ours and Path(folder, name).exists():
            refuse(Path(folder, name), "it is no part of a report of polarctl")


def check_folder(folder: Path, working: Iterable[str] = ()) -> None:
    """Refuse to replace a folder that holds a file which is not ours.

    Args:
        folder: A folder with a manifest, or of a run that has not finished.
        working: Files and folders that such a run makes in it, by name; the names of all that a
            complete one holds are in its manifest.
    """
    found = _manifest(folder / MANIFEST)
    listed = {LOCK, MANIFEST, *(found["outputs"] if found else ())}
    top = set(working)
    for base, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        for name in [*files, *links]:
            path = Path(base, name)
            relative = path.relative_to(folder)
            if relative.parts[0] not in top and (str(relative) not in listed or path.is_symlink()):
                refuse(folder, f"polarctl did not write {path}")


# -- one folder for another ------------------------------------------------------------------------


def check_exchange(folder: Path) -> None:
    """Refuse a folder that cannot change places with another beside it."""
    real = Path(os.path.realpath(folder))
    if os.path.ismount(real):
        refuse(folder, "it is a mount point")
    if not os.access(real.parent, os.W_OK):
        refuse(folder, f"{real.parent} cannot be written")


def exchange(new: Path, old: Path) -> None:
    """Give a finished folder the place of an old one, which is then at `new`.

    In one step where the system can (Linux, local file systems): a kill leaves the one or the
    other. Else in two renames; `mend` puts the old folder back after a kill between them.
    """
    old = Path(os.path.realpath(old))
    if not _exchanged(new, old):
        aside = _aside(old)
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)
    atomic.sync_folder(old.parent)


def mend(folder: Path) -> None:
    """Undo half an `exchange`; does nothing where there is none."""
    real = Path(os.path.realpath(folder))
    aside = _aside(real)
    if aside.exists() and not real.exists():
        os.rename(aside, real)
    elif aside.exists():
        shutil.rmtree(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".polarctl-old.{folder.name}")


def _exchanged(new: Path, old: Path) -> bool:
    if sys.platform != "linux":
        return False
    at_cwd, exchange_flag = -100, 2  # <fcntl.h>, <linux/fs.h>
    with contextlib.suppress(AttributeError):  # a C library without it
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange_flag) == 0)
    return False
