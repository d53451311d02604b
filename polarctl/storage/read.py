"""Reading records: files, globs, `-`, gzip and zstandard, line by line in bounded memory.

Rows are numbered over all inputs from 0, bad ones included, and are handed out in windows: so many
rows, or fewer where they are large. Where a window ends follows from the rows before it alone. It
is the unit of sharding, of resume and of batching, so what is computed for a row never depends on
where a run started or how it was cut.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from polarctl.errors import RecordError, UsageError
from polarctl.records import Record, check, find_kind
from polarctl.storage.compression import open_bytes

MAX_LINE_BYTES = 64 << 20
MAX_WINDOW_BYTES = 64 << 20
REJECTS = "--rejects FILE sets bad records aside and goes on"
MAX_DEPTH = 128  # orjson writes 254 levels, and what a stage writes wraps a record into some more
DEEP = f"nested deeper than {MAX_DEPTH} levels"
_CONVERT = "`polarctl convert` reads it"
_HOW = "polarctl convert FILE -o FILE.jsonl"
STDIN = "<stdin>"  # in messages; a file of this name is a copy of it

_KEY, _ESCAPED = re.compile(rb'"[ \t\r\n]*:'), re.compile(rb'\\"[ \t\r\n]*:')
_TWO_ROWS = re.compile(rb"}[ \t\r]*\r[ \t\r]*{")
# What happens to a bad record: called with its place, what is wrong with it, and the row as text.
OnBad: TypeAlias = Callable[[str, str, Any], None]


def expand(patterns: Iterable[str]) -> list[str]:
    """Paths of the inputs; a pattern that is not an existing file or pipe is a sorted glob.

    Raises:
        UsageError: Nothing there.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            inside = os.path.join(pattern, "*.jsonl")
            raise UsageError(f"{pattern}: is a folder, not a file", hint=f"name files: '{inside}'")
        if pattern == "-" or os.path.exists(pattern):
            paths.append(pattern)
            continue
        found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            raise UsageError(f"{pattern}: no such file", hint=_near(pattern))
        paths.extend(found)
    return paths


def stdin_is_missing(paths: Iterable[str]) -> bool:
    """True when `-` is asked for and nothing is piped in."""
    return "-" in paths and (sys.stdin is None or sys.stdin.isatty())


def place_of(path: str) -> str:
    """How an input is called in messages."""
    return STDIN if path == "-" or os.path.basename(path) == STDIN else path


@dataclass
class Window:
    """Consecutive rows of the input.

    Attributes:
        index: Number of the window.
        records: The good records of these rows.
        digest: Hash of all input bytes up to the window's end.
    """

    index: int
    records: list[Record]
    digest: str


@dataclass
class Reader:
    """Reads records of one kind from several inputs.

    Attributes:
        paths: Files or `-`, from `expand`.
        kind: Name of the kind that each record must be (`polarctl.records.KINDS`), or a function
            from the decoded fields to that name; None accepts any object.
        on_bad: What happens to a bad row; None: the first one is an error.
        limit: Rows to read at most, or None.
        shard: (I, N): only windows with index % N == I.
        verify: Raises RecordError for a record that fits its schema but not this run.
        learn: Takes the records of each window that a resume passes over.
        hint: How to go on after a bad row, where there is a way: `REJECTS`.
        rows: Rows read so far, bad ones included.
        bad: Bad rows so far.
    """

    paths: list[str]
    kind: str | Callable[[dict[str, Any]], str] | None
    on_bad: OnBad | None = None
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    verify: Callable[[Record], None] | None = None
    learn: Callable[[list[Record]], None] | None = None
    hint: str | None = None
    rows: int = field(default=0, init=False)
    bad: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Record]:
        """All good records, without windows unless they are dealt to shards."""
        if self.shard != (0, 1):
            for window in self.windows(1024):
                yield from window.records
            return
        for where, line in self.lines():
            self.rows += 1
            record = self.parse(where, line)
            if record is not None:
                yield record
        if not self.rows:
            raise self.no_records()

    def windows(self, size: int, *, done: int = 0, digest: str | None = None) -> Iterator[Window]:
        """The windows of this shard, in order.

        Args:
            size: Rows of a window; it ends before `MAX_WINDOW_BYTES`, too.
            done: Windows of this shard to pass over (a resume).
            digest: `Window.digest` of the last of those, to check that the input is the same.

        Raises:
            RecordError: A bad row and no rejects file; an input without a row.
            UsageError: The passed-over input differs from what it was.
        """
        running = hashlib.blake2b(digest_size=16)
        mine = self.shard[0]
        passed = 0
        window: list[Record] = []
        index = 0
        count = held = 0  # rows and bytes of the window
        for where, line in self.lines():
            held += len(line)
            if count == size or (count and held > MAX_WINDOW_BYTES):
                if index % self.shard[1] == mine:
                    passed += 1
                    yield from self._hand_out(index, window, running, passed, done, digest)
                index += 1
                window = []
                count, held = 0, len(line)
            count += 1
            self.rows += 1
            running.update(line)
            again = passed < done
            if index % self.shard[1] == mine and (self.learn is not None or not again):
                record = self.parse(where, line, again)
                if record is not None:
                    window.append(record)
        if not count:
            raise self.no_records()
        if index % self.shard[1] == mine:
            passed += 1
            yield from self._hand_out(index, window, running, passed, done, digest)
        if passed < done:
            raise _other_input()

    def _hand_out(
        self, index: int, window: list[Record], running: Any, passed: int, done: int, digest: Any
    ) -> Iterator[Window]:
        now = running.hexdigest()
        if passed > done:
            yield Window(index, window, now)
        elif self.learn is not None:
            self.learn(window)
        if passed == done and digest is not None and digest != now:
            raise _other_input()

    def total(self) -> int | None:
        """Rows of the whole input, or None where that cannot be known beforehand: of a pipe.

        Everything is read once; what is wrong with it is said when its turn comes.
        """
        if any(map(is_pipe, self.paths)):
            return None
        try:
            return sum(1 for _ in self.lines())
        except RecordError:
            return None

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """(place, line) of every row that is not blank, up to the limit, as `parse` takes them."""
        count = 0
        for path in self.paths:
            if count == self.limit:
                return
            for row in self.lines_of(path):
                yield row
                count += 1
                if count == self.limit:
                    return

    def lines_of(self, path: str) -> Iterator[tuple[str, bytes]]:
        """(place, line) of every row of one input that is not blank."""
        name = place_of(path)
        stream = open_bytes(path)
        try:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1:
                    _refuse_encoding(line, name)
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(1 << 20)
                    line = b""  # refused by parse
                elif line.isspace():
                    continue
                yield f"{name}:{number}", line
        except (EOFError, zlib.error, OSError) as error:
            raise RecordError(f"cannot read on: {error}", where=name) from None
        except Exception as error:  # ZstdError is not imported before a .zst file is read
            if type(error).__name__ != "ZstdError":
                raise
            raise RecordError(f"cannot read on: {error}", where=name) from None
        finally:
            if path != "-":
                stream.close()

    def no_records(self) -> RecordError:
        """What an input without a row is refused with."""
        return RecordError("no records", where=", ".join(map(place_of, self.paths)))

    def parse(self, where: str, line: bytes, again: bool = False) -> Record | None:
        """The row's record, or None for a bad row that was set aside.

        Raises:
            RecordError: A bad row, and no `on_bad`.
        """
        try:
            record = decode(line, where, self.kind)
            if self.verify is not None:
                self.verify(record)
            return record
        except RecordError as error:
            if again:  # counted and set aside by the run before
                return None
            self.bad += 1
            if self.on_bad is None:
                hint = error.hint or self.hint
                raise RecordError(error.reason, where=where, hint=hint) from None
            self.on_bad(where, error.reason, line.decode("utf-8", "replace").rstrip("\n"))
            return None


def _other_input() -> UsageError:
    return UsageError(
        "cannot resume: the input is not the one that the output was begun with",
        hint="pass --force to start again",
    )


def _near(pattern: str) -> str | None:
    """What a name may have been meant for, among those that are there."""
    folder, name = os.path.split(pattern)
    if not os.path.isdir(folder or "."):
        return f"there is no folder {folder}"
    near = difflib.get_close_matches(name, os.listdir(folder or "."), 1)
    return f"did you mean `{os.path.join(folder, near[0])}`?" if near else None


def decode(line: bytes, where: str, kind: str | Callable[[dict[str, Any]], str] | None) -> Record:
    """One line as a checked record.

    Args:
        line: The line's bytes.
        where: `file:line`, for messages.
        kind: The kind that it must be, a function that tells it, or None for any object.

    Raises:
        RecordError: The line is not a JSON object or breaks its schema.
    """
    if not line:
        raise RecordError(f"line is longer than {MAX_LINE_BYTES >> 20} MiB", where=where)
    try:
        fields = orjson.loads(line.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        table = where.rpartition(":")[0].lower().endswith((".csv", ".tsv", ".parquet"))
        problem = _problem(line, error)
        hint = _HOW if table or _CONVERT in problem else None
        raise RecordError(problem, where=where, hint=hint) from None
    if isinstance(fields, list) and all(isinstance(entry, dict) for entry in fields):
        raise RecordError(
            f"one JSON array, not one object a line: {_CONVERT}", where=where, hint=_HOW
        )
    if not isinstance(fields, dict):
        raise RecordError("not a JSON object", where=where)
    try:
        more = len(_KEY.findall(line)) - _keys(fields, MAX_DEPTH)
        if more and more != _quoted_keys(line):
            _read_strictly(line)
    except RecordError as error:
        raise RecordError(error.reason, where=where, hint=error.hint) from None
    try:
        name = kind(fields) if callable(kind) else kind
        if name is not None:
            check(fields, find_kind(name))
    except RecordError as error:
        raise RecordError(error.reason, where=where, hint=error.hint) from None
    return Record(fields, where)


def _keys(value: dict[str, Any] | list[Any], levels: int) -> int:
    """The keys in a decoded value; far more where a number may have been a long integer.

    orjson keeps the last of two equal keys and rounds an integer of more than 64 bits. Either way
    this is not the number of keys in the line, which is then read again by a slower parser.

    Raises:
        RecordError: It is nested deeper than `levels`.
    """
    if not levels:
        raise RecordError(DEEP)
    keys = len(value) if type(value) is dict else 0
    items: Any = value.values() if type(value) is dict else value
    for item in items:
        kind = type(item)
        if kind is str:
            continue
        if kind is dict or kind is list:
            keys += _keys(item, levels - 1)
        elif kind is float and abs(item) >= 2.0**63:
            keys += 1 << 40  # more than any line has: no equal keys make up for it
    return keys


def _quoted_keys(line: bytes) -> int:
    """Quotes before colons inside texts; -1 where that cannot be told at a glance."""
    found = 0
    for quote in _ESCAPED.finditer(line):
        if line[quote.start() - 1] == ord("\\"):  # is the quote escaped, or the backslash?
            return -1
        found += 1
    return found


def _read_strictly(line: bytes) -> None:
    """Raise RecordError for a key that is there twice and for an integer of more than 64 bits."""

    def parse(digits: str) -> int:
        if not -(2**63) <= int(digits) < 2**64:
            raise RecordError(f"an integer of more than 64 bits: {digits[:32]}", hint="quote it")
        return 0

    def once(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise RecordError(f"`{key[:40]}` is there twice")
            seen.add(key)

    json.loads(line.decode("utf-8-sig"), parse_int=parse, object_pairs_hook=once)


def _refuse_encoding(first: bytes, name: str) -> None:
    """Raise RecordError for a file that is not UTF-8, or not cut into lines, by its first line."""
    head = first[:4]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (
        b"\0" in head and head.strip(b"\0")
    ):
        raise RecordError(
            "is UTF-16 or UTF-32, not UTF-8", where=name, hint="iconv -f UTF-16 -t UTF-8"
        )
    if _TWO_ROWS.search(first):
        raise RecordError(
            "its lines end in CR alone", where=name, hint="end them in LF: tr '\\r' '\\n'"
        )


def _problem(line: bytes, error: orjson.JSONDecodeError) -> str:
    if line.lstrip(codecs.BOM_UTF8).strip() == b"[":
        return f"one JSON array, not one object a line: {_CONVERT}"
    if line.startswith(b"PAR1"):
        return f"a Parquet file: {_CONVERT}"
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return str(wrong).replace("'utf-8' codec", "is not UTF-8:")
    if "depth" in str(error):  # "depth limit" in orjson of today, "recursion depth" in 3.10
        return DEEP
    return f"no JSON: {error}"


def sizes(paths: Iterable[str]) -> list[dict[str, Any]]:
    """`{path, bytes}` of every input, for manifests and for telling inputs apart at a resume.

    A pipe has `bytes` None.
    """
    return [
        {"path": path, "bytes": None if is_pipe(path) else Path(path).stat().st_size}
        for path in paths
    ]


def is_pipe(path: str) -> bool:
    """Whether an input can be read only once: stdin, a named pipe, the shell's `<(...)`."""
    return path == "-" or not os.path.isfile(path)
