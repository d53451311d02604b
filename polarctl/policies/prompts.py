"""The prompts of a run: read once, cut to prefixes, given their identity, and read per policy.

They wait in a temporary database (`polarctl.storage.scratch`), so that memory does not grow with
them and standard input is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import orjson

from polarctl import seeding
from polarctl.errors import RecordError
from polarctl.policies.by_prompt import prompt_digest
from polarctl.records import Prompt, Record, check, prompt_id
from polarctl.storage.read import Reader
from polarctl.storage.scratch import Scratch

_CACHE_MIB = 32
_TABLES = """
create table prompts (row integer primary key, place, body blob);
create table windows (window integer primary key, first, last);
create table facts (row integer primary key, name, text);
create table again (row integer primary key);
"""
# Rows of one name whose text is not that of the first of them.
_CLASHES = """
select row, name, first from facts join (
    select name, min(row) as first from facts group by name having count(*) > 1
) using (name) where text != (select text from facts as other where other.row = first)
order by row limit 1
"""
_REPEATED = """
insert into again select row from (
    select row, row_number() over (partition by name order by row) as nth from facts
) where nth > 1 order by row
"""


class Prompts:
    """Prompts in windows of rows, on disk.

    Attributes:
        digest: Hash of the input, or None when nothing was read.
        repeated: Prompts left out by `identify`, being there already.
        windows: Number of windows.
    """

    def __init__(self) -> None:
        self.digest: str | None = None
        self.repeated = self.windows = self._rows = 0
        self._store = Scratch(
            _TABLES,
            cache_mib=_CACHE_MIB,
            failure="prompts cannot be kept on disk",
            room="twice the prompts",
        )

    def read(self, reader: Reader, rows: int) -> None:
        """Read everything, in windows of so many rows."""
        with self._store.change() as store:
            for window in reader.windows(rows):
                first = self._rows
                store.executemany(
                    "insert into prompts values (?, ?, ?)",
                    (
                        (row, record.where, orjson.dumps(record))
                        for row, record in enumerate(window.records, first)
                    ),
                )
                self._rows += len(window.records)
                store.execute(
                    "insert into windows values (?, ?, ?)", (self.windows, first, self._rows)
                )
                self.windows += 1
                self.digest = window.digest

    def __len__(self) -> int:
        return self._rows - self.repeated

    def __iter__(self) -> Iterator[Record]:
        for number in range(self.windows):
            yield from self.window(number)

    def window(self, number: int) -> list[Record]:
        """The prompts of a window with their `id`; those that are repeated are not among them."""
        found = self._window(number)
        for record in found:
            record["id"] = prompt_id(record)
        return found

    def _window(self, number: int) -> list[Record]:
        rows = self._store.select(
            "select place, body from prompts, windows where window = ? and row >= first "
            "and row < last and row not in (select row from again) order by row",
            (number,),
        )
        return [Record(orjson.loads(body), place) for place, body in rows]

    def change(self, cut: Callable[[list[Record]], Iterable[Record]]) -> None:
        """Put other prompts in the place of those of each window, as many."""
        with self._store.change() as store:
            for number in range(self.windows):
                (first,) = store.execute(
                    "select first from windows where window = ?", (number,)
                ).fetchone()
                store.executemany(
                    "update prompts set body = ? where row = ?",
                    (
                        (orjson.dumps(record), row)
                        for row, record in enumerate(cut(self._window(number)), first)
                    ),
                )

    def identify(self) -> None:
        """Leave out the prompts that are there already.

        Raises:
            RecordError: One id names two prompts.
        """
        with self._store.change() as store:
            rows = store.execute("select row, body from prompts order by row")
            store.executemany("insert into facts values (?, ?, ?)", map(_fact, rows))
            store.execute("create index names on facts (name, row)")
            clash = store.execute(_CLASHES).fetchone()
            if clash is not None:
                row, name, first = clash
                raise RecordError(
                    f"id `{name}` already names another prompt, at {self._place(first)}",
                    where=self._place(row),
                    hint="give every prompt its own id, or none",
                )
            store.execute(_REPEATED)
            (self.repeated,) = store.execute("select count(*) from again").fetchone()
            store.execute("drop table facts")

    def _place(self, row: int) -> str | None:
        ((place,),) = self._store.select("select place from prompts where row = ?", (row,))
        return None if place is None else str(place)


def _fact(row: tuple[int, bytes]) -> tuple[int, str, bytes]:
    """Row, id and a hash of the text of a prompt."""
    record = orjson.loads(row[1])
    return row[0], prompt_id(record), prompt_digest(record)


def prompt_in(text_field: str) -> Callable[[Record], None]:
    """A check for `Reader` that also moves the text of `text_field` to `prompt`."""

    def verify(record: Record) -> None:
        if text_field != "prompt":
            if text_field not in record:
                raise RecordError(f"missing field `{text_field}`", hint="see --text-field")
            record["prompt"] = record.pop(text_field)
        check(record, Prompt)

    return verify


def cut_to_prefixes(
    records: Iterable[Record], tokenizer: Any, max_tokens: int, seed: int
) -> Iterator[Record]:
    """Each record with its text cut to the first n tokens, 1 <= n <= min(max_tokens, length - 1).

    n is uniform and depends on the seed and the identity of the whole text alone. The text is cut,
    not decoded, so the prefix is a true one. Messages and prompts with the wrapper `sft` are
    instructions and stay whole.

    Args:
        records: Prompt records.
        tokenizer: A fast tokenizer.
        max_tokens: Longest prefix.
        seed: The run's seed.
    """
    for record in records:
        text = record["prompt"]
        if isinstance(text, str) and record.get("wrapper") != "sft":
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in encoded["offset_mapping"]]
            if len(ends) > 1:
                draw = seeding.rng(seed, "prefix", prompt_id(record))
                text = text[: ends[draw.randint(1, min(max_tokens, len(ends) - 1)) - 1]]
        yield Record({**record, "prompt": text}, record.where)
