"""The rejects file of a training stage, which reads its input from the beginning at each start."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import orjson

from polarctl.config import Common
from polarctl.errors import RecordError
from polarctl.parallel import rank
from polarctl.records import Record
from polarctl.storage import claim, read, replace, run_folder, windows

_WINDOW_ROWS = 1024


def rejects_of(run: run_folder.Run, config: Common) -> Rejects:
    """Where a training stage's bad rows go; of several processes the first one keeps them.

    Raises:
        UsageError: There is a file already, and no run of this folder has written it.
    """
    if not config.rejects or not rank.is_first():
        return Rejects(None, run, force=False)
    return Rejects(config.rejects, run, force=config.force)


class Rejects:
    """Bad records of a training stage, with reasons; written anew whenever the run goes on.

    Args:
        path: The file, or None to keep nothing.
        run: Whose they are.
        force: Replace rejected records of an earlier run.

    Raises:
        UsageError: The file is another's.
    """

    def __init__(self, path: str | None, run: run_folder.Run, *, force: bool):
        self.claim: claim.Claim | None = None
        self.stream: IO[bytes] | None = None
        if path is None:
            return
        self.path = Path(os.path.realpath(path))
        self.claim = claim.Claim(path, str(run.target), begun=False, force=force, rewritten=True)
        self.late = run.folder != run.target  # those of the old result keep their place, too
        self.part = replace.next_to(path)
        self.stream = open(self.part, "wb")

    def reject(self, where: str, reason: str, raw: Any = None) -> None:
        """Keep one bad record."""
        if self.stream is not None:
            line = orjson.dumps({"where": where, "reason": reason, "record": raw})
            self.stream.write(line + b"\n")

    def read(self) -> None:
        """All rows are read: the file is whole."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
            if not self.late:
                os.replace(self.part, self.path)

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the file up; a run that goes on later takes it again."""
        if self.claim is None:
            return
        if self.stream is not None:
            self.stream.close()
        if kind is None and self.late:
            os.replace(self.part, self.path)
        self.part.unlink(missing_ok=True)
        self.claim.release(forget=kind is None)


def read_all(
    run: run_folder.Run,
    config: Common,
    kind: str | None,
    verify: Callable[[Record], None] | None,
    rejects: Rejects,
) -> run_folder.Run:
    """The run with all good records of its input in memory; its identity knows every byte of it.

    Args:
        run: A run that has read nothing.
        config: The stage's options.
        kind: Kind of the records, or None when `verify` checks it.
        verify: Raises RecordError for a record that does not fit this run.
        rejects: Where bad rows go.

    Raises:
        RecordError: A bad row and no `--rejects`; no good row.
    """
    reader = windows.reader_of(config, run.paths, kind, on_bad=rejects.reject, verify=verify)
    records: list[Record] = []
    digest = ""
    for window in reader.windows(_WINDOW_ROWS):
        records += window.records
        digest = window.digest
    rejects.read()
    if not records:
        raise RecordError("no good record", where=", ".join(run.paths))
    piped = any(map(read.is_pipe, run.paths))
    identity = {**run.identity, "input_digest": digest} if piped else run.identity
    return dataclasses.replace(run, identity=identity, records=tuple(records), bad=reader.bad)
