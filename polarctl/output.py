"""Writing records so that a crash at any moment loses nothing and the same command goes on.

`FILE` grows by whole units of work. After each unit its bytes are synced and one line is added to
`FILE.journal`: how many units are done, how long the file is, a hash of it. A run that finds a
journal cuts `FILE` back to the last line that its bytes agree with and goes on from there. At the
end `FILE.manifest.json` is written, then the journal removed: a manifest means complete.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from polarctl import console, manifest
from polarctl.config import Common
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.files import compression
from polarctl.files.fingerprint import changed_since, difference, header
from polarctl.files.track import Track, open_append

_BLOCK_BYTES = 1 << 20
# The real stdout, kept apart by the command line so that no library can write into the records.
records_out: IO[bytes] | None = None


def stdout() -> IO[bytes]:
    """The stream for records on standard output."""
    return records_out if records_out is not None else sys.stdout.buffer


class Output:
    """The records that a stage writes, with resume, rejects and manifest.

    Use as a context manager: leaving without an error writes the manifest.

    Args:
        stage: Name of the stage.
        config: Its options (`output`, `rejects`, `manifest`, `resume`, `force` are used here).
        inputs: `polarctl.io.sizes` of the inputs.
        identity: What else decides the result (a model's identity, a pool's hash).

    Attributes:
        done: Units that an earlier run finished: pass over them.
        units: Units finished so far, this run's included.
        digest: Input hash at that point (see `polarctl.io.Reader.windows`), or None.
        complete: The output is already complete and nothing is to be done.
        counts: Numbers for the manifest; a stage adds its own.

    Raises:
        UsageError: Output exists, is an input, cannot be written, or a resume does not fit.
    """

    def __init__(
        self,
        stage: str,
        config: Common,
        inputs: list[dict[str, Any]],
        identity: dict[str, Any] | None = None,
    ):
        self.stage, self.config, self.inputs = stage, config, inputs
        self.done, self.units, self.complete = 0, 0, False
        self.digest: str | None = None
        self.counts: dict[str, Any] = {"records": 0, "rejects": 0}
        self.path = None if config.output == "-" else config.output
        self._journal: IO[bytes] | None = None
        self._file: Track | None = None
        self._rejects: Track | None = None
        self._header = header(stage, config, inputs, identity or {})
        check_paths(config, [entry["path"] for entry in inputs])
        if self.path is not None:
            self._open(self.path)
        elif config.rejects:
            self._refuse_old_rejects()
            self._rejects = Track(config.rejects)
            self._rejects.truncate(0)

    # -- opening ---------------------------------------------------------------------------------

    def _open(self, path: str) -> None:
        target, journal = Path(path), Path(f"{path}.journal")
        done_mark = Path(self.config.manifest or f"{path}.manifest.json")
        if not self.config.force and not journal.exists():
            if target.exists() and done_mark.exists():
                self._already_complete(path, done_mark)
                return
            if target.exists() and target.stat().st_size:
                raise UsageError(
                    f"{path}: exists and is not an interrupted output of this command",
                    hint="pass --force to replace it",
                )
            self._refuse_old_rejects()
        self._journal = open_append(str(journal))
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._journal.close()
            raise UsageError(f"{path}: another process is writing it") from None
        if self.config.force or not self.config.resume:
            self._journal.truncate(0)
        if self.config.force:
            target.unlink(missing_ok=True)
        entries = self._read_journal()
        changed = difference(entries[0], self._header) if entries else ""
        if changed and len(entries) > 1:
            self._journal.close()
            raise UsageError(f"cannot resume {path}: {changed}", hint="pass --force to start again")
        if changed:
            entries = []  # nothing was finished: nothing can be lost
        done_mark.unlink(missing_ok=True)  # the output is not complete any more
        self._file = Track(path)
        if self.config.rejects:
            self._rejects = Track(self.config.rejects)
        self._restore(path, entries)

    def _refuse_old_rejects(self) -> None:
        """Raise UsageError rather than empty a file that no interrupted run of ours began."""
        rejects = self.config.rejects
        if rejects and not self.config.force and Path(rejects).is_file():
            if Path(rejects).stat().st_size:
                raise UsageError(f"{rejects}: exists", hint="pass --force to replace it")

    def _already_complete(self, path: str, done_mark: Path) -> None:
        changed = changed_since(done_mark, Path(path), self._header, self.inputs)
        if changed:
            raise UsageError(
                f"{path}: is complete already, {changed}", hint="pass --force to replace it"
            )
        console.note(f"{path}: complete already, with the same options and input; nothing to do")
        self.complete = True

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's sound lines: the header, then one entry per finished unit."""
        assert self._journal is not None
        self._journal.seek(0)
        entries: list[dict[str, Any]] = []
        for line in self._journal.read().splitlines(keepends=True):
            try:
                entry = orjson.loads(line)
            except orjson.JSONDecodeError:
                break
            known = isinstance(entry, dict) and ("done" if entries else "stage") in entry
            if not known or not line.endswith(b"\n"):
                break
            entries.append(entry)
        return entries

    def _restore(self, path: str, entries: list[dict[str, Any]]) -> None:
        """Cut files and journal back to the last unit that all of them agree on."""
        assert self._journal is not None and self._file is not None
        if not entries:
            self._journal.truncate(0)
            self._add_to_journal(self._header)
            self._truncate(0, 0)
            return
        entries = entries[1:]
        good = self._file.cut_back(entries, "file")
        if self._rejects is not None:
            good = min(good, self._rejects.cut_back(entries, "rejects"))
        last: dict[str, Any] = (
            entries[good - 1] if good else {"file": (0, ""), "rejects": (0, ""), "done": 0}
        )
        self._truncate(last["file"][0], last["rejects"][0] if last["rejects"] else 0)
        self._journal.seek(0)
        lines = self._journal.read().splitlines(keepends=True)[: good + 1]
        self._journal.truncate(sum(map(len, lines)))
        self.done = self.units = last["done"]
        self.digest = last.get("digest")
        self.counts.update(last.get("counts", {}))
        if self.done:
            console.note(
                f"{path}: going on after {self.counts['records']:,} records "
                f"({self.done:,} units of work)"
            )

    def _truncate(self, size: int, rejects_size: int) -> None:
        assert self._file is not None
        self._file.truncate(size)
        if self._rejects is not None:
            self._rejects.truncate(rejects_size)

    def _add_to_journal(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(orjson.dumps(entry) + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    # -- writing ---------------------------------------------------------------------------------

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to the unit of work in hand."""
        line = _dumps(record) + b"\n"
        if self._file is not None:
            self._file.add(line)
        else:
            stdout().write(line)
        self.counts["records"] += 1

    def reject(self, where: str, reason: str, raw: Any = None) -> None:
        """Keep a bad record with its place and reason.

        Raises:
            RecordError: No `--rejects` file was asked for.
        """
        if self._rejects is None:
            raise RecordError(
                reason, where=where, hint="--rejects FILE sets such records aside and goes on"
            )
        self.counts["rejects"] += 1
        self._rejects.add(_dumps({"where": where, "reason": reason, "record": raw}) + b"\n")

    def commit(self, done: int, digest: str | None = None) -> None:
        """The unit of work is whole: make it durable.

        Args:
            done: Units finished since the very beginning.
            digest: `Window.digest` of the input read so far.
        """
        self.units = done
        if self._file is None:
            stdout().flush()
        elif compression.is_compressed(self._file.path):
            pending = self._file.pending_bytes + (
                self._rejects.pending_bytes if self._rejects else 0
            )
            if pending < _BLOCK_BYTES:
                return  # a compressed block is worth writing only when it is large enough
        for track in (self._file, self._rejects):
            if track is not None:
                track.flush()
        if self._file is not None:
            self._add_to_journal(
                {
                    "done": done,
                    "digest": digest,
                    "file": (self._file.size, self._file.hash.hexdigest()),
                    "rejects": self._rejects
                    and (self._rejects.size, self._rejects.hash.hexdigest()),
                    "counts": self.counts,
                }
            )

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and not self.complete:
            self._finish()
        if kind is not None and self.units == 0 and self._file is not None:
            # Nothing was finished: leave nothing behind that would look like an interrupted run.
            if self._file.size == 0:
                Path(self._file.path).unlink(missing_ok=True)
                Path(f"{self._file.path}.journal").unlink(missing_ok=True)
        for track in (self._file, self._rejects):
            if track is not None:
                track.stream.close()
        if self._journal is not None:
            self._journal.close()

    def _finish(self) -> None:
        for track in (self._file, self._rejects):
            if track is not None:
                track.flush()
        outputs: dict[str, Any] = {}
        if self._file is None:
            stdout().flush()
        else:
            outputs[Path(self._file.path).name] = {
                "sha256": self._file.hash.hexdigest(),
                "bytes": self._file.size,
                "path": self._file.path,
                "records": self.counts["records"],
            }
        where = self.config.manifest or (self.path and f"{self.path}.manifest.json")
        if where:
            record = manifest.build(
                self.stage,
                self.config,
                inputs=manifest.hashed(self.inputs),
                outputs=outputs,
                counts=self.counts,
            )
            manifest.write(where, {**record, "fingerprint": self._header})
        if self.path:
            Path(f"{self.path}.journal").unlink(missing_ok=True)
        if self.counts["rejects"]:
            console.warn(f"{self.counts['rejects']:,} records set aside in {self.config.rejects}")


def _dumps(record: Any) -> bytes:
    try:
        return orjson.dumps(record)
    except TypeError as error:
        raise PolarctlError(f"a record cannot be written as JSON: {error}") from None


def check_paths(config: Common, inputs: list[str]) -> None:
    """Refuse an output that is an input or another output, or that cannot be written.

    Raises:
        UsageError: Says which and why.
    """
    named = (config.output, config.rejects, config.manifest)
    targets = [Path(path) for path in named if path and path != "-"]
    for number, target in enumerate(targets):
        try:
            target.with_name(f".{target.name}.manifest.json.tmp").exists()  # the longest name
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
                raise UsageError(f"{target}: is both input and output")
