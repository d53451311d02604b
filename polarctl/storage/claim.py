"""Who writes a file: locks, and the claim of an unfinished run on its rejects file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

import orjson

from polarctl.errors import UsageError
from polarctl.storage.growing_file import open_append
from polarctl.storage.replace import check_rejects, next_to


def locked(path: str | Path, of: str | Path) -> IO[bytes]:
    """A file opened for appending, made if needed, that no other process has locked.

    Args:
        path: The lock.
        of: What it guards, for the message.

    Raises:
        UsageError: Another process holds it, or it cannot be written.
    """
    stream = open_append(str(path))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its holder may have removed it since it was opened here.
        held = os.fstat(stream.fileno()).st_ino == os.stat(path).st_ino
    except (BlockingIOError, FileNotFoundError):
        held = False
    if not held:
        stream.close()
        raise UsageError(f"{of}: another process is writing it")
    return stream


class Claim:
    """The right to write a rejects file, which one unfinished run has at a time.

    `REJECTS.journal` names the output of that run and is locked while it runs. Without it, two runs
    would cut each other's rows back to what their own journals know.

    Args:
        rejects: The file.
        owner: The run's output, or None: a run that cannot be resumed.
        begun: The run's own journal knows of the file's content.
        force: Replace rejected records of an earlier run.
        rewritten: The run writes all of the file anew when it goes on.

    Raises:
        UsageError: Another run has it, or the file is not this run's.
    """

    def __init__(
        self,
        rejects: str,
        owner: str | None,
        *,
        begun: bool,
        force: bool,
        rewritten: bool = False,
    ):
        self._path = Path(f"{os.path.realpath(rejects)}.journal")
        name = os.path.realpath(owner) if owner else None
        self._stream = locked(self._path, rejects)
        try:
            before = self._owner()
            if before is not None and before != name and _is_unfinished(before):
                raise UsageError(
                    f"{rejects}: holds the rejects of an unfinished run that writes {before}",
                    hint="give every run a --rejects file of its own",
                )
            filled = os.path.exists(rejects) and os.path.getsize(rejects) > 0
            if filled and not begun:
                check_rejects(rejects)
                if not (force or (rewritten and before == name)):
                    raise UsageError(f"{rejects}: exists", hint="pass --force to replace it")
        except UsageError:
            self.release(forget=not self._path.stat().st_size)
            raise
        self._stream.truncate(0)
        if name is not None:
            self._stream.write(orjson.dumps({"rejects_of": name}) + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _owner(self) -> str | None:
        self._stream.seek(0)
        text = self._stream.read()
        try:
            return str(orjson.loads(text)["rejects_of"]) if text else None
        except (ValueError, KeyError, TypeError):
            return None  # torn by a crash: then nothing was written after it

    def release(self, *, forget: bool) -> None:
        """Unlock; `forget` the claim, too, when the run is complete or has left nothing."""
        if forget:
            self._path.unlink(missing_ok=True)
        self._stream.close()


def _is_unfinished(output: str) -> bool:
    """Whether an output's run has begun and not ended."""
    if os.path.isdir(output):
        return not os.path.exists(f"{output}/manifest.json") or next_to(output).exists()
    return os.path.exists(f"{output}.journal") or os.path.exists(f"{next_to(output)}.journal")
