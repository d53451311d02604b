"""Trajectories by prompt, in bounded memory: they wait in a temporary database.

Trajectories of one prompt lie far apart, since a policy answers all prompts before the next policy
begins. They are written down as they come, and sorted by SQLite's external merge sort.

SQLite was chosen by measurement (docs/guides/corpus.md): it needs the least memory, and Python
brings it along.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import orjson

from polarctl.errors import RecordError
from polarctl.records import Record, prompt_id
from polarctl.storage.read import REJECTS, OnBad, Reader
from polarctl.storage.scratch import Scratch

_CACHE_MIB = 64
_READ_ROWS, _ROWS = 1024, 4096  # read, and written down, together

_TABLES = """
create table facts (row integer primary key, key, policy, number, prompt, place);
create table bodies (row integer primary key, body blob);
create table found (row, first, number);
create table numbered (row integer primary key, first, number);
create table refused (row integer primary key, reason);
"""
G = TypeVar("G")


class Fact(NamedTuple):
    """What is known of a trajectory without its texts.

    Attributes:
        row: Its place among all.
        policy: Who wrote it.
        number: What it brought: its sample number, or the number that it is judged by.
        prompt: Hash of its prompt.
    """

    row: int
    policy: str
    number: Any
    prompt: bytes


class ByPrompt(Generic[G]):
    """Trajectories by key, in the order in which the keys first appear.

    Add all, then `finish`, then iterate, as often as needed.
    """

    def __init__(self) -> None:
        self._count = self._rows = 0
        self._facts: list[tuple[Any, ...]] = []
        self._bodies: list[tuple[int, bytes]] = []
        self._store = Scratch(
            _TABLES,
            cache_mib=_CACHE_MIB,
            failure="trajectories cannot be sorted on disk",
            room="three times the input",
        )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[G]:
        rows = self._store.select(
            "select first, number, body from bodies join numbered using (row) order by first, row"
        )
        for _, alike in itertools.groupby(rows, itemgetter(0)):
            yield self.group((number, orjson.loads(body)) for _, number, body in alike)

    def group(self, rows: Iterable[tuple[Any, dict[str, Any]]]) -> G:
        """The group of the numbers and trajectories of one key, in their order."""
        raise NotImplementedError

    def look(self, name: str, facts: Iterable[Fact]) -> Iterator[tuple[int, Any, str | None]]:
        """See `sorted_out`; a number is taken as it is."""
        return sorted_out(name, facts, lambda policy, number: number)

    def read(self, paths: list[str], *, limit: int | None, on_bad: OnBad | None) -> str:
        """Add all of some files, and finish.

        Args:
            paths: Of `polarctl.storage.read.expand`.
            limit: Rows to read at most.
            on_bad: See `finish`; called with bad rows, too.

        Returns:
            Hash of the input.

        Raises:
            RecordError: A bad row, and no `on_bad`.
        """
        reader = Reader(
            paths, "trajectory", on_bad=on_bad, limit=limit, verify=self.add, hint=REJECTS
        )
        (digest,) = deque((window.digest for window in reader.windows(_READ_ROWS)), maxlen=1)
        self.finish(on_bad)
        return digest

    def add(self, record: Record) -> None:
        """Take one trajectory; raises RecordError for a bad one."""
        raise NotImplementedError

    def keep(self, record: Record, number: Any, *more: str) -> None:
        """Write down a trajectory; without `wrapper` it is `sft`.

        Args:
            record: The trajectory.
            number: Of `Fact`.
            *more: What keeps it apart from others of its prompt and wrapper.
        """
        self._rows += 1
        self._facts.append(
            (
                self._rows,
                key_of(record, *more),
                record["policy"],
                number,
                prompt_digest(record),
                record.where,
            )
        )
        self._bodies.append((self._rows, orjson.dumps(record)))
        if len(self._facts) == _ROWS:
            self._write_down()

    def finish(self, on_bad: OnBad | None = None) -> None:
        """All were added: count, and refuse what contradicts an earlier trajectory.

        Args:
            on_bad: Called with each refused trajectory, in their order.

        Raises:
            RecordError: A refused trajectory, and no `on_bad`.
        """
        self._write_down()
        rows = self._store.select(
            "select key, row, policy, number, prompt from facts order by key, row"
        )
        found: list[tuple[int, int, Any]] = []
        refused: list[tuple[int, str]] = []
        for key, alike in itertools.groupby(rows, itemgetter(0)):
            self._count += 1
            first = 0
            facts = (Fact(*row[1:]) for row in alike)
            for row, number, reason in self.look(orjson.loads(key)[0], facts):
                first = first or row
                if reason is None:
                    found.append((row, first, number))
                else:
                    refused.append((row, reason))
            if len(found) + len(refused) >= _ROWS:
                self._note(found, refused)
        self._note(found, refused)
        with self._store.change() as store:
            store.execute("insert into numbered select * from found order by row")
            store.execute("drop table found")
        bad = self._store.select(
            "select place, reason, body from refused join facts using (row) "
            "join bodies using (row) order by row"
        )
        for place, reason, body in bad:
            if on_bad is None:
                raise RecordError(reason, where=place, hint=REJECTS)
            on_bad(place, reason, body.decode())

    def _note(self, found: list[tuple[int, int, Any]], refused: list[tuple[int, str]]) -> None:
        self._store.insert("found", found)
        self._store.insert("refused", refused)
        found.clear()
        refused.clear()

    def _write_down(self) -> None:
        self._store.insert("facts", self._facts)
        self._store.insert("bodies", self._bodies)
        self._facts.clear()
        self._bodies.clear()


@dataclass
class PromptGroup:
    """What was written for one prompt in one wrapper.

    Attributes:
        id: Identity of the prompt.
        prompt: The prompt.
        wrapper: `sft` or `pretrain`.
        category: Of the first trajectory, or None.
        outputs: Policy to its texts, by sample index.
    """

    id: str
    prompt: Any
    wrapper: str
    category: str | None
    outputs: dict[str, dict[int, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[tuple[int, dict[str, Any]]]) -> PromptGroup:
        """The group of samples' numbers and trajectories, in their order."""
        found: PromptGroup | None = None
        for number, record in rows:
            if found is None:
                wrapper = record.get("wrapper", "sft")
                found = cls(prompt_id(record), record["prompt"], wrapper, record.get("category"))
            found.outputs.setdefault(record["policy"], {})[number] = record["output"]
        assert found is not None
        return found

    def firsts(self) -> list[str]:
        """Policies that can be the reference's: at least two samples."""
        return sorted(name for name, texts in self.outputs.items() if len(texts) > 1)

    def seconds(self) -> list[str]:
        """Policies that can be the rejected one's: all."""
        return sorted(self.outputs)


class Groups(ByPrompt[PromptGroup]):
    """Trajectories by prompt and wrapper.

    Args:
        keep: Says of a policy's name whether it takes part.

    Attributes:
        policies: Names of all policies met, also of those that take no part.
        firsts: Policy to the number of groups in which it has two samples or more.
        seconds: Policy to the number of groups in which it has any.
    """

    def __init__(self, takes_part: Callable[[str], bool] = lambda name: True):
        super().__init__()
        self.takes_part = takes_part
        self.policies: set[str] = set()
        self.firsts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Take one trajectory; without `wrapper` it is `sft`.

        Raises:
            RecordError: Its `sample` is too large.
        """
        check_sample(record)
        self.policies.add(record["policy"])
        if self.takes_part(record["policy"]):
            self.keep(record, record.get("sample"))

    def group(self, rows: Iterable[tuple[int, dict[str, Any]]]) -> PromptGroup:
        """See `ByPrompt`."""
        return PromptGroup.of(rows)

    def look(self, name: str, facts: Iterable[Fact]) -> Iterator[tuple[int, Any, str | None]]:
        """See `sorted_out`; no sample comes twice, and one without a number gets the next."""
        samples = SampleNumbers(name)
        yield from sorted_out(name, facts, samples)
        self.firsts.update(name for name, there in samples.numbers.items() if len(there) > 1)
        self.seconds.update(list(samples.numbers))


class SampleNumbers:
    """The samples of one prompt; called with a policy and a number, it gives the number.

    Args:
        name: The prompt's id.

    Attributes:
        numbers: Policy to the numbers of its samples.

    Raises:
        RecordError: This sample is there already.
    """

    def __init__(self, name: str):
        self.name = name
        self.numbers: dict[str, set[int]] = {}

    def __call__(self, policy: str, sample: int | None) -> int:
        """See the class."""
        there = self.numbers.setdefault(policy, set())
        number = len(there) if sample is None else sample
        if number in there:
            raise RecordError(
                f"sample {number} of policy `{policy}` for prompt `{self.name}` is there already"
            )
        there.add(number)
        return number


def sorted_out(
    name: str, facts: Iterable[Fact], take: Callable[[str, Any], Any]
) -> Iterator[tuple[int, Any, str | None]]:
    """Row, number and what is wrong (None: nothing) of the trajectories of one key.

    Args:
        name: The prompt's id.
        facts: In the order of the rows.
        take: From policy and number to the number that counts; raises RecordError.
    """
    first: bytes | None = None
    for row, policy, number, prompt in facts:
        first = first or prompt
        try:
            if prompt != first:
                raise RecordError(f"id `{name}` already names another prompt")
            yield row, take(policy, number), None
        except RecordError as error:
            yield row, None, error.reason


def check_sample(record: Record) -> None:
    """Raise RecordError for a sample number that a database cannot hold."""
    if record.get("sample", 0) >= 2**63:
        raise RecordError("field `sample`: more than 63 bits")


def key_of(record: dict[str, Any], *more: str) -> bytes:
    """What trajectories that belong together have in common; a list whose first is their id."""
    return orjson.dumps([prompt_id(record), record.get("wrapper", "sft"), *more])


def prompt_digest(record: dict[str, Any]) -> bytes:
    """A hash of the prompt's text, or of its messages whatever the order of their keys."""
    return digest_of(orjson.dumps(record["prompt"], option=orjson.OPT_SORT_KEYS))


def digest_of(text: bytes) -> bytes:
    """A hash of 16 bytes."""
    return hashlib.blake2b(text, digest_size=16).digest()
