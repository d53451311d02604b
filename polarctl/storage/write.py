"""Writing records so that a crash at any moment loses nothing and the same command goes on.

`FILE` grows by whole units of work. After each unit its bytes are synced and one line is added to
`FILE.journal`: how many units are done, how long the file is, a hash of it. A run that finds a
journal cuts `FILE` back to the last line that its bytes agree with and goes on from there. At the
end `FILE.manifest.json` is written, then the journal removed: a manifest means complete.

With `--force` all of this goes on beside an old `FILE`, under the name `.polarctl-next.FILE`, and
the new files take the places of the old ones at the end.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from polarctl import console
from polarctl.config import Common
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.storage import compression, manifest, replace
from polarctl.storage import journal as journals
from polarctl.storage.claim import Claim, locked
from polarctl.storage.fingerprint import changed_since, difference, header
from polarctl.storage.growing_file import Track
from polarctl.storage.paths import check_paths, make_folders, remove_empty

_BLOCK_BYTES = 1 << 20
_MOST_REASONS, _SHOWN_REASONS = 100, 5
# The real stdout, so that no library can write into the records.
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
        inputs: `polarctl.storage.read.sizes` of the inputs.
        identity: What else decides the result (a model's identity, a pool's hash).

    Attributes:
        done: Units that an earlier run finished: pass over them.
        units: Units finished so far, this run's included.
        digest: Input hash at that point (see `polarctl.storage.read.Reader.windows`), or None.
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
        self._reasons: Counter[str] = Counter()  # of the rejects of this run
        self._journal: IO[bytes] | None = None
        self._journal_path = Path()
        self._file: Track | None = None
        self._rejects: Track | None = None
        self._claim: Claim | None = None
        self._replacing = False
        self._header = header(stage, config, inputs, identity or {})
        check_paths(config, [entry["path"] for entry in inputs])
        self._made = make_folders(config.output, config.rejects, config.manifest)
        self._mark = Path(config.manifest or f"{self.path}.manifest.json")
        if self.path is not None:
            self._open(self.path)
        else:
            if config.manifest:
                replace.check_mark(self._mark)
            if config.rejects:
                self._claim = Claim(config.rejects, None, begun=False, force=config.force)
                self._rejects = Track(config.rejects, replacing=config.force)
                self._rejects.truncate(0)

    # -- opening ---------------------------------------------------------------------------------

    def _open(self, path: str) -> None:
        config, target = self.config, Path(path)
        journal = Path(f"{os.path.realpath(path)}.journal")
        replacement = Path(f"{replace.next_to(path)}.journal")
        rolled = self._finish_swap(path, replacement)
        filled = target.exists() and target.stat().st_size > 0
        if target.exists() and self._mark.exists() and not journal.exists():
            changed = changed_since(self._mark, target, self._header, self.inputs)
            if not config.force or (rolled and not changed):
                self._already_complete(path, changed)
                return
        replace.check_mark(self._mark)
        if filled and not journal.exists():
            if not config.force:
                raise UsageError(
                    f"{path}: exists and is not an interrupted output of this command",
                    hint="name another output",
                )
            replace.check_file(path, self._mark)
            self._replacing, journal = True, replacement
        self._journal_path = journal
        self._journal = locked(journal, path)
        try:
            self._restore(path)
        except UsageError:
            self._close(forget=not journal.stat().st_size)  # made here
            raise

    def _finish_swap(self, path: str, journal: Path) -> bool:
        """Do what a killed run with `--force` has left to do; whether there was something."""
        if not journal.exists():
            return False
        try:
            self._journal = locked(journal, path)
        except UsageError:
            if self.config.force:
                raise
            return False  # it is at work; what it is to replace is still in its place
        entries = journals.read(self._journal)
        if entries and "swap" in entries[-1]:
            journals.swap(entries[-1]["swap"])
            for _, old in entries[-1]["swap"]:
                Path(f"{old}.journal").unlink(missing_ok=True)  # the claim on its rejects
            journal.unlink()
        self._journal.close()
        self._journal = None
        return not journal.exists()

    def _already_complete(self, path: str, changed: str) -> None:
        if changed:
            raise UsageError(
                f"{path}: is complete already, {changed}", hint="pass --force to replace it"
            )
        console.note(f"{path}: complete already, with the same options and input; nothing to do")
        self.counts = orjson.loads(self._mark.read_bytes())["counts"]
        self.complete = True

    def _restore(self, path: str) -> None:
        """Cut files and journal back to the last unit that all of them agree on.

        Raises:
            UsageError: A file holds what the journal does not vouch for, or the journal is of a
                run with other options.
        """
        assert self._journal is not None
        config = self.config
        entries = journals.read(self._journal)
        changed = difference(entries[0], self._header) if entries else ""
        again = config.force and (changed or not self._replacing)
        if changed and len(entries) > 1 and config.resume and not again:
            raise UsageError(f"cannot resume {path}: {changed}", hint="pass --force to start again")
        units = entries[1:]
        self._file = Track(path, replacing=self._replacing)
        good = self._file.cut_back(units, "file")
        if self._file.unknown:
            replace.refuse(path, "it holds what its journal does not know")
        if config.rejects:
            kept = [unit for unit in units if unit["rejects"]]
            begun = any(unit["rejects"][0] for unit in kept) and not self._replacing
            self._claim = Claim(config.rejects, path, begun=begun, force=config.force)
            # Those of an interrupted run are in their place; other ones keep it until the end.
            self._rejects = Track(config.rejects, replacing=self._replacing)
            sound = self._rejects.cut_back(kept, "rejects")
            if self._rejects.unknown:
                if not config.force:
                    replace.refuse(config.rejects, f"the journal of {path} does not know it")
                replace.check_rejects(config.rejects)
            good = min(good, sound)
        if again or changed or not config.resume:
            good = 0
        # An entry for no unit at all is that of an end that was not reached.
        last = units[good - 1] if good and units[good - 1]["done"] else None
        if not self._replacing:
            self._mark.unlink(missing_ok=True)  # the output is not complete any more
        # The files first: one that is longer than its journal knows could be somebody else's.
        self._file.truncate(last["file"][0] if last else 0)
        if self._rejects is not None:
            self._rejects.truncate(last["rejects"][0] if last and last["rejects"] else 0)
        if last is None:
            self._journal.truncate(0)
            journals.add(self._journal, self._header)
        else:
            self._journal.seek(0)
            lines = self._journal.read().splitlines(keepends=True)[: good + 1]
            self._journal.truncate(sum(map(len, lines)))
        if last is None:
            return
        self.done = self.units = last["done"]
        self.digest = last.get("digest")
        self.counts.update(last.get("counts", {}))
        console.note(
            f"{path}: going on after {self.counts['records']:,} records "
            f"({self.done:,} units of work)"
        )

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
        if reason in self._reasons or len(self._reasons) < _MOST_REASONS:
            self._reasons[reason] += 1
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
        self._flush(digest)

    def _flush(self, digest: str | None) -> None:
        """Write what was added, have the journal vouch for it, then show it."""
        tracks = [track for track in (self._file, self._rejects) if track is not None]
        for track in tracks:
            track.flush()
        if self._journal is not None and self._file is not None:
            journals.add(
                self._journal,
                {
                    "done": self.units,
                    "digest": digest,
                    "file": (self._file.size, self._file.hash.hexdigest()),
                    "rejects": self._rejects
                    and (self._rejects.size, self._rejects.hash.hexdigest()),
                    "counts": self.counts,
                },
            )
        for track in tracks:
            if track.size and not track.replacing:
                track.publish()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        finished = False
        try:
            if kind is None and not self.complete:
                self._finish()
                finished = True
        finally:
            # A run that has finished nothing leaves nothing that would look like one.
            nothing = self._file is None or (self.units == 0 and self._file.size == 0)
            self._close(forget=finished or nothing)
            remove_empty(self._made)

    def _close(self, *, forget: bool) -> None:
        """Close the files; `forget` the journal and what is out of sight."""
        for track in (self._file, self._rejects):
            if track is not None:
                if forget:
                    track.discard()
                track.stream.close()
        # The journal goes last: as long as there is one, the same command clears up after a kill.
        if self._claim is not None:
            self._claim.release(forget=forget)
        if self._journal is not None:
            if forget:
                self._journal_path.unlink(missing_ok=True)
            self._journal.close()

    def _finish(self) -> None:
        outputs: dict[str, Any] = {}
        if self._file is None:
            stdout().flush()
        self._flush(None)
        if self._file is not None:
            outputs[Path(self.config.output).name] = {
                "sha256": self._file.hash.hexdigest(),
                "bytes": self._file.size,
                "path": self.config.output,
                "records": self.counts["records"],
            }
        tracks = [track for track in (self._rejects, self._file) if track is not None]
        for track in tracks:
            track.check(content=True)
        swap = [(track.path, track.final) for track in tracks if track.replacing]
        for track in tracks:
            if not track.replacing:
                track.publish()
        if self.path or self.config.manifest:
            mark = replace.next_to(self._mark) if self._replacing else self._mark
            manifest.write(
                mark,
                self.stage,
                self.config,
                inputs=manifest.hashed(self.inputs),
                outputs=outputs,
                counts=self.counts,
                fingerprint=self._header,
            )
            if self._replacing:
                swap.append((str(mark), os.path.realpath(self._mark)))
        if self._journal is not None and swap:  # another run can do the rest of it
            journals.add(self._journal, {"swap": swap})
        journals.swap(swap)
        for track in tracks:
            track.path = track.final
        if self.counts["rejects"]:
            console.warn(f"{self.counts['rejects']:,} records set aside in {self.config.rejects}")
            for reason, count in self._reasons.most_common(_SHOWN_REASONS):
                console.note(f"  {count:,} of them: {reason}")


def _dumps(record: Any) -> bytes:
    try:
        return orjson.dumps(record)
    except TypeError as error:
        raise PolarctlError(f"a record cannot be written as JSON: {error}") from None


def write_whole(path: Path, records: Iterable[Mapping[str, Any]], *, overwrite: bool) -> int:
    """Write records as one file, compressed by its name: all of it is there, or nothing new.

    Args:
        path: Where to.
        records: What to write.
        overwrite: Replace a file that is there.

    Returns:
        Records written.

    Raises:
        UsageError: There is such a file already, or it cannot be written.
        RecordError: A record that JSON cannot hold.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: exists", hint="overwrite=True replaces it")
    target = path.resolve()  # what a link points to is replaced, not the link
    growing = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    count = 0
    try:
        stream = open(growing, "wb")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with stream:
            for block in _blocks(records):
                count += block.count(b"\n")
                stream.write(compression.block(block, str(path)))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(growing, target)
    finally:
        growing.unlink(missing_ok=True)
    return count


def _blocks(records: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Lines of about a MiB together."""
    lines: list[bytes] = []
    size = 0
    for number, record in enumerate(records, 1):
        where = getattr(record, "where", None) or f"record {number}"
        if not _is_finite(record):
            raise RecordError("JSON holds no NaN and no infinity", where=where)
        try:
            lines.append(_dumps(dict(record)) + b"\n")
        except PolarctlError as error:
            raise RecordError(str(error), where=where) from None
        size += len(lines[-1])
        if size >= _BLOCK_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
    yield b"".join(lines)


def _is_finite(value: Any) -> bool:
    """False for what orjson would write as null in silence."""
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
