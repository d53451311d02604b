"""The prompts of a run: read whole, cut to prefixes, given their identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from polarctl import seeding
from polarctl.errors import RecordError
from polarctl.records import Prompt, Record, check, prompt_id
from polarctl.storage.read import Reader


@dataclass
class Prompts:
    """Prompts in windows, kept in memory: they are small beside what is written for them.

    Attributes:
        windows: Prompts by windows of rows, as `polarctl.storage.read.Reader` hands them out.
        digest: Hash of the input, or None when nothing was read.
        repeated: Prompts left out by `identify`, being there already.
    """

    windows: list[list[Record]] = field(default_factory=list)
    digest: str | None = None
    repeated: int = 0

    def read(self, reader: Reader, rows: int) -> None:
        """Read everything, in windows of so many rows."""
        for window in reader.windows(rows):
            self.windows.append(window.records)
            self.digest = window.digest

    def __len__(self) -> int:
        return sum(map(len, self.windows))

    def __iter__(self) -> Iterator[Record]:
        for window in self.windows:
            yield from window

    def identify(self) -> None:
        """Give every prompt its `id` and leave out those that are there already.

        Raises:
            RecordError: One id names two prompts.
        """
        seen: dict[str, Record] = {}
        before = len(self)
        for number, window in enumerate(self.windows):
            fresh = []
            for record in window:
                record["id"] = prompt_id(record)
                first = seen.setdefault(record["id"], record)
                if first is record:
                    fresh.append(record)
                elif first["prompt"] != record["prompt"]:
                    raise RecordError(
                        f"id `{record['id']}` already names another prompt, at {first.where}",
                        where=record.where,
                        hint="give every prompt its own id, or none",
                    )
            self.windows[number] = fresh
        self.repeated = before - len(self)


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
