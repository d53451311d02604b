"""Rows of files that are not JSON lines: JSON arrays, CSV, Parquet, data sets of the Hub.

Every row becomes one line of JSON, so that everything behind the reader stays as it is. Memory
does not grow with the input: an array is read entry by entry, Parquet batch by batch, a data set
as a stream. pyarrow and datasets come with the extra `[data]`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import orjson

from polarctl import console
from polarctl.errors import MissingError, RecordError, UsageError, need
from polarctl.formats.parquet import require_pyarrow
from polarctl.formats.rows import JOINED, field_at
from polarctl.storage import read as reading
from polarctl.storage.compression import open_bytes

_BLOCK_BYTES = 1 << 16
_BATCH_ROWS = 256
_HUB_TIMEOUT_S = 10
_HUB_ID = re.compile(r"(?:hf://datasets/)?([\w.-]+/[\w.-]+)/?")
_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|gz|zst|txt|xz|zip)$", re.IGNORECASE)
_SPACE = re.compile(r"\s*")
# Of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written.
_SAVED = ("state.json", "dataset_dict.json")


def expand(patterns: Iterable[str]) -> list[str]:
    """Paths of the inputs: files, globs, folders, and ids of data sets on the Hub.

    Raises:
        UsageError: Nothing there, and no such id either.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern) or hub_id(pattern):
            paths.append(pattern)
        else:
            paths.extend(reading.expand([pattern]))
    return paths


def hub_id(path: str) -> str | None:
    """The id of a data set on the Hub, `ORG/NAME`, if the input is one and no path."""
    found = _HUB_ID.fullmatch(path)
    if not found or path.startswith((".", "/")) or _FILE.search(path) or os.path.exists(path):
        return None
    return found[1]


@dataclass
class RowReader(reading.Reader):
    """A reader of every kind of file that holds rows.

    Attributes:
        subset: Configuration of a data set that has several.
        source_split: Split of a data set; None: its only one, else `train`.
        join: Field by which neighbouring rows become one: `{JOINED: [row, row, ...]}`.
    """

    subset: str | None = None
    source_split: str | None = None
    join: str | None = None

    def lines_of(self, path: str) -> Iterator[tuple[str, bytes]]:
        """(place, line) of every row of one input, whatever its kind."""
        rows = self._rows_of(path)
        return rows if self.join is None else _joined(rows, self.join)

    def _rows_of(self, path: str) -> Iterator[tuple[str, bytes]]:
        if os.path.isdir(path) or not (path == "-" or os.path.exists(path)):
            return self._dataset(path)
        if os.path.isfile(path) and _first_bytes(path) == b"PAR1":
            return _parquet(path)
        plain = re.sub(r"\.(gz|zst)$", "", path.lower())
        if plain.endswith((".csv", ".tsv")):
            return _csv(path, "\t" if plain.endswith(".tsv") else ",")
        return _array(path) if _starts_array(path) else super().lines_of(path)

    def _dataset(self, path: str) -> Iterator[tuple[str, bytes]]:
        data = open_dataset(path, self.subset, self.source_split)
        for number, row in enumerate(data, 1):
            yield f"{path}:{number}", _line(row, f"{path}:{number}")


def _first_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def _joined(rows: Iterable[tuple[str, bytes]], name: str) -> Iterator[tuple[str, bytes]]:
    """Rows that follow each other with the same value of a field as one row, their places' first.

    What is no object or lacks the field stays as it is, for whoever parses it to refuse.
    """
    lines: list[bytes] = []
    place, last, size = "", None, 0

    def whole() -> bytes:
        return b'{"%s":[%s]}' % (JOINED.encode(), b",".join(lines))

    for where, line in rows:
        text = line.removeprefix(codecs.BOM_UTF8).strip()
        try:
            key = field_at(orjson.loads(text), name)
        except (orjson.JSONDecodeError, RecordError):
            if lines:
                yield place, whole()
                lines = []
            yield where, line
            continue
        if lines and (key != last or size + len(text) > reading.MAX_LINE_BYTES - 100):
            if key == last:
                limit = reading.MAX_LINE_BYTES >> 20
                raise RecordError(f"the rows to join are longer than {limit} MiB", where=place)
            yield place, whole()
            lines = []
        if not lines:
            place, size = where, 0
        lines.append(text)
        last, size = key, size + len(text) + 1
    if lines:
        yield place, whole()


def _starts_array(path: str) -> bool:
    head: bytes
    if path == "-":
        stdin: Any = sys.stdin.buffer
        head = stdin.peek(256)
    elif not os.path.isfile(path):
        return False  # what is read from a pipe is gone
    else:
        with open_bytes(path) as stream:
            try:
                head = stream.read(256)
            except Exception:  # each kind of compression raises its own
                return False  # a broken file is the reader's to explain
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line(row: dict[str, Any], where: str) -> bytes:
    try:
        return orjson.dumps(row, default=_refuse, option=orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        reason = str(error.__cause__ or error)
        raise RecordError(f"a row is no JSON: {reason}", where=where) from None


def _refuse(value: Any) -> Any:
    raise TypeError(f"a column holds {type(value).__name__}, which is no text, number or list")


# -- JSON arrays ---------------------------------------------------------------------------------


class _Text:
    """The text of a stream as far as it is read, and a place in it."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.decode = stream, codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.line = "", 0, 1

    def more(self) -> bool:
        """Read on, at least as much as is waiting; False at the end."""
        data = self.stream.read(max(_BLOCK_BYTES, len(self.text) - self.at))
        self.text = self.text[self.at :] + self.decode(data, not data)
        self.at = 0
        return bool(data)

    def move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found
            self.move(found.end())
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]


def _array(path: str) -> Iterator[tuple[str, bytes]]:
    """The entries of a file that is one JSON array, each with the line that it begins in."""
    name = reading.place_of(path)
    # It only says where a value ends. Numbers of thousands of digits are the parser's to refuse.
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    with open_bytes(path) as stream:
        text = _Text(stream)
        try:
            text.next()
            text.move(text.at + 1)
            if text.next() == "]":
                return
            while True:
                text.next()
                end = _end_of_value(text, decoder, name)
                yield f"{name}:{text.line}", text.text[text.at : end].encode()
                text.move(end)
                mark = text.next()
                if mark not in (",", "]"):
                    said = f"expected `,` or `]`, found `{mark}`" if mark else "it ends too early"
                    raise RecordError(f"no JSON array: {said}", where=f"{name}:{text.line}")
                text.move(text.at + 1)
                if mark == "]":
                    return
        except UnicodeDecodeError as error:
            raise RecordError(f"is not UTF-8: {error}", where=name) from None


def _end_of_value(text: _Text, decoder: json.JSONDecoder, name: str) -> int:
    while True:
        try:
            return decoder.raw_decode(text.text, text.at)[1]
        except RecursionError:
            said = reading.DEEP
        except json.JSONDecodeError as error:
            if len(text.text) - text.at > reading.MAX_LINE_BYTES:
                size = reading.MAX_LINE_BYTES >> 20
                said = f"an entry is longer than {size} MiB"
            elif text.more():
                continue
            else:
                text.move(text.at + max(error.pos - text.at, 0))
                said = f"no JSON array: {error.msg}"
        raise RecordError(said, where=f"{name}:{text.line}")


# -- CSV -----------------------------------------------------------------------------------------


def _csv(path: str, delimiter: str) -> Iterator[tuple[str, bytes]]:
    """The rows of a CSV file with a header; empty cells are left out.

    A cell is a text. One that holds JSON messages becomes these, and `label` and `margin` numbers.
    """
    name = reading.place_of(path)
    csv.field_size_limit(reading.MAX_LINE_BYTES)
    with open_bytes(path) as stream:
        rows = csv.reader(
            io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True
        )
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise RecordError("the header names a column twice", where=f"{name}:1")
            first = rows.line_num + 1
            for cells in rows:
                where, first = f"{name}:{first}", rows.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise RecordError(
                        f"{len(cells)} cells, and the header names {len(header)}", where=where
                    )
                fields = zip(header, cells, strict=True)
                yield where, orjson.dumps({k: _cell(k, v) for k, v in fields if v})
        except csv.Error as error:
            raise RecordError(f"no CSV: {error}", where=f"{name}:{rows.line_num}") from None
        except UnicodeDecodeError as error:
            raise RecordError(f"is not UTF-8: {error}", where=name) from None


def _cell(column: str, text: str) -> Any:
    if column in ("label", "margin") and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if column in ("label", "margin") or re.match(r"\s*\[\s*\{", text):
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
        if isinstance(value, int | float):
            return value
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            return value
    return text


# -- Parquet, data sets --------------------------------------------------------------------------


def _parquet(path: str) -> Iterator[tuple[str, bytes]]:
    pyarrow = require_pyarrow("data")
    name, number = reading.place_of(path), 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", _line(row, f"{name}:{number}")
    # A time beyond year 9999 or a text that is not UTF-8 is found when a row is made of it.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise RecordError(f"no Parquet: {console.plain(str(error))}", where=name) from None


def open_dataset(path: str, subset: str | None, split: str | None) -> Any:
    """An iterable over the rows of a data set: a folder, or an id on the Hub.

    Raises:
        MissingError: `datasets` is not installed, or the Hub cannot be reached.
        UsageError: No such data set, subset or split.
    """
    try:
        import datasets
    except ImportError:
        raise need("datasets", "data") from None
    datasets.disable_progress_bars()
    try:
        if os.path.isdir(path):
            if any(os.path.exists(os.path.join(path, name)) for name in _SAVED):
                found = datasets.load_from_disk(path)
                return _one_split(path, found, split) if hasattr(found, "keys") else found
        else:
            path = hub_id(path) or path
            _reach(path)
        found = datasets.load_dataset(path, subset, streaming=True)
    except (UsageError, MissingError):
        raise
    except Exception as error:  # datasets and what it builds on raise what they like
        said = console.plain(str(error))
        raise UsageError(
            f"{path}: no data set that can be read: {said}", hint=_hint(said)
        ) from None
    return _one_split(path, found, split)


def _hint(said: str) -> str | None:
    return "--subset NAME" if "onfig name is missing" in said or "BuilderConfig" in said else None


def _one_split(path: str, found: Any, split: str | None) -> Any:
    names = list(found)
    if split is not None and split not in names:
        raise UsageError(f"{path}: no split `{split}`", hint=f"there is {', '.join(names)}")
    if split is None:
        split = "train" if "train" in names else names[0]
        if len(names) > 1:
            if split != "train":
                raise UsageError(
                    f"{path}: has several splits", hint=f"--source-split {' or '.join(names)}"
                )
            console.choice("source split", split, f"of {', '.join(names)}; --source-split NAME")
    return found[split]


def _reach(name: str) -> None:
    """Raise within seconds when a data set is not on the Hub, or the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    way = f"hf download {name} --repo-type dataset --local-dir DIR, then convert DIR"
    try:
        HfApi(library_name="polarctl").dataset_info(name, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError:
        raise MissingError(
            f"{name}: the Hub asks for its terms to be accepted",
            hint=f"accept them at huggingface.co/datasets/{name}, then `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{name}: no such file or folder here, and no such data set on the Hub",
            hint="a private one needs `hf auth login`",
        ) from None
    except HfHubHTTPError as error:
        said = console.plain(str(error))
        raise MissingError(f"{name}: the Hub does not answer: {said}", hint=way) from None
    except Exception as error:  # of the HTTP library, which one depends on the version
        said = console.plain(str(error))
        raise MissingError(
            f"{name}: no such file or folder here, and the Hub cannot be reached: {said}", hint=way
        ) from None
