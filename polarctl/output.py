"""Writing records so that a crash at any moment loses nothing and the same command goes on.

`FILE` grows by whole units of work. After each unit its bytes are synced and one line is added to
`FILE.journal`: how many units are done, how long the file is, a hash of it. A run that finds a
journal cuts `FILE` back to the last line that its bytes agree with and goes on from there. At the
end `FILE.manifest.json` is written, then the journal removed: a manifest means complete.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from polarctl import __version__, console, manifest
from polarctl.config import Common, semantic
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.records import SCHEMA_VERSION

_BLOCK_BYTES = 1 << 20
# The real stdout, kept apart by the command line so that no library can write into the records.
records_out: IO[bytes] | None = None


def stdout() -> IO[bytes]:
    """The stream for records on standard output."""
    return records_out if records_out is not None else sys.stdout.buffer


class _Track:
    """One growing file and the hash of what it holds."""

    def __init__(self, path: str):
        self.path = path
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self.size = 0
        self.hash = hashlib.sha256()
        self.stream: IO[bytes] = open(path, "ab")

    def add(self, line: bytes) -> None:
        self.pending.append(line)
        self.pending_bytes += len(line)

    def cut_back(self, entries: list[dict[str, Any]], key: str) -> int:
        """Number of leading journal entries that the file's bytes agree with."""
        good = 0
        with open(self.path, "rb") as stream:
            for entry in entries:
                size, digest = entry[key]
                probe = self.hash.copy()
                missing = size - self.size
                while missing > 0 and (block := stream.read(min(missing, _BLOCK_BYTES))):
                    probe.update(block)
                    missing -= len(block)
                if missing or probe.hexdigest() != digest:
                    break
                self.hash, self.size = probe, size
                good += 1
        return good

    def truncate(self, size: int) -> None:
        """Forget everything past `size` bytes."""
        self.stream.truncate(size)
        if size != self.size:
            self.hash, self.size = hashlib.sha256(), 0
            with open(self.path, "rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    self.hash.update(block)
                    self.size += len(block)

    def flush(self) -> None:
        data = b"".join(self.pending)
        self.pending, self.pending_bytes = [], 0
        if not data:
            return
        # One member per block: members join to one valid stream, and a resume can start at any.
        if self.path.endswith(".gz"):
            data = gzip.compress(data, mtime=0)
        elif self.path.endswith(".zst"):
            import zstandard

            data = zstandard.ZstdCompressor(level=3).compress(data)
        self.stream.write(data)
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.hash.update(data)
        self.size += len(data)

    @property
    def compressed(self) -> bool:
        return self.path.endswith((".gz", ".zst"))


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
        self._file: _Track | None = None
        self._rejects: _Track | None = None
        self._header = _header(stage, config, inputs, identity or {})
        check_paths(config, [entry["path"] for entry in inputs])
        if self.path is not None:
            self._open(self.path)
        elif config.rejects:
            Path(config.rejects).write_bytes(b"")
        if config.rejects and self._rejects is None and not self.complete:
            self._rejects = _Track(config.rejects)

    # -- opening ---------------------------------------------------------------------------------

    def _open(self, path: str) -> None:
        target, journal = Path(path), Path(f"{path}.journal")
        done_mark = Path(self.config.manifest or f"{path}.manifest.json")
        if self.config.force:
            for old in (done_mark, target):
                old.unlink(missing_ok=True)
        elif target.exists() and done_mark.exists() and not journal.exists():
            self._already_complete(path, done_mark)
            return
        elif target.exists() and target.stat().st_size and not journal.exists():
            raise UsageError(
                f"{path}: exists and is not an interrupted output of this command",
                hint="pass --force to replace it",
            )
        self._journal = open(journal, "a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path}: another process is writing it") from None
        if self.config.force or not self.config.resume:
            self._journal.truncate(0)
        self._file = _Track(path)
        if self.config.rejects:
            self._rejects = _Track(self.config.rejects)
        self._restore(path)

    def _already_complete(self, path: str, done_mark: Path) -> None:
        before = orjson.loads(done_mark.read_bytes()).get("fingerprint", {})
        reads_pipe = any(entry["path"] == "-" for entry in self.inputs)
        changed = _difference(before, self._header)
        if changed or reads_pipe:
            why = changed or "and whether the piped input is the same cannot be known"
            raise UsageError(
                f"{path}: is complete already, {why}", hint="pass --force to replace it"
            )
        console.note(f"{path}: complete already, with the same options and input; nothing to do")
        self.complete = True

    def _restore(self, path: str) -> None:
        assert self._journal is not None and self._file is not None
        self._journal.seek(0)
        entries = []
        kept = 0
        for line in self._journal.read().splitlines(keepends=True):
            try:
                entries.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                break
            if not line.endswith(b"\n"):
                entries.pop()
                break
            kept += len(line)
        if not entries:
            self._journal.truncate(0)
            self._add_to_journal(self._header)
            self._truncate(0, 0)
            return
        changed = _difference(entries[0], self._header)
        if changed:
            raise UsageError(f"cannot resume {path}: {changed}", hint="pass --force to start again")
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
        elif self._file.compressed and self._file.pending_bytes < _BLOCK_BYTES:
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
                inputs=self.inputs,
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


def _header(
    stage: str, config: Common, inputs: list[dict[str, Any]], identity: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same for a resume to be sound."""
    header = {
        "stage": stage,
        "version": __version__,
        "schema_version": SCHEMA_VERSION,
        "input_bytes": [entry["bytes"] for entry in inputs],
        **semantic(config),
        **identity,
        "sets_rejects_aside": bool(config.rejects),
    }
    plain: dict[str, Any] = orjson.loads(orjson.dumps(header))
    return plain


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that differs, in words; empty when nothing does."""
    for key in [*now, *(k for k in before if k not in now)]:
        if before.get(key) != now.get(key):
            return f"`{key}` was {before.get(key)!r} and is now {now.get(key)!r}"
    return ""


def check_paths(config: Common, inputs: list[str]) -> None:
    """Refuse an output that is an input or whose folder cannot be written.

    Raises:
        UsageError: Says which and why.
    """
    named = (config.output, config.rejects, config.manifest)
    for target in (Path(path) for path in named if path and path != "-"):
        folder = target.parent
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder", hint=f"mkdir -p {folder}")
        if not os.access(target if target.exists() else folder, os.W_OK):
            raise UsageError(f"{target}: cannot be written")
        for path in inputs:
            if path != "-" and target.exists() and os.path.samefile(path, target):
                raise UsageError(f"{target}: is both input and output")
