"""Trajectories by prompt, in bounded memory: they wait in a temporary SQLite database.

Trajectories of one prompt lie far apart, since a policy answers all prompts before the next policy
begins. They are written down as they come, and sorted by SQLite's external merge sort. What does
not fit into its cache lies in a file without a name, in the folder of SQLITE_TMPDIR or TMPDIR, else
in /var/tmp; the operating system removes it whatever happens to the process.

SQLite was chosen by measurement (docs/guides/corpus.md): it needs the least memory, and Python
brings it along.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from polarctl.errors import PolarctlError, RecordError
from polarctl.records import Record, prompt_id
from polarctl.storage.read import OnBad

_CACHE_MIB = 64  # of SQLite: for pages, and again for a sort
_ROWS = 4096  # written down together

_TABLES = f"""
pragma cache_size = -{_CACHE_MIB << 10};
pragma temp_store = file;
pragma journal_mode = off;
pragma synchronous = off;
create table facts (row integer primary key, name, wrapper, policy, sample, prompt, place);
create table bodies (row integer primary key, body blob);
create table found (row, first, sample);
create table numbered (row integer primary key, first, sample);
create table refused (row integer primary key, reason);
"""


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

    def firsts(self) -> list[str]:
        """Policies that can be the reference's: at least two samples."""
        return sorted(name for name, texts in self.outputs.items() if len(texts) > 1)

    def seconds(self) -> list[str]:
        """Policies that can be the rejected one's: all."""
        return sorted(self.outputs)


class Groups:
    """Trajectories by prompt and wrapper, in the order in which the prompts first appear.

    Add all, then `finish`, then iterate, as often as needed.

    Args:
        keep: Says of a policy's name whether it takes part.

    Attributes:
        policies: Names of all policies met, also of those that take no part.
        firsts: Policy to the number of groups in which it has two samples or more.
        seconds: Policy to the number of groups in which it has any.
    """

    def __init__(self, keep: Callable[[str], bool] = lambda name: True):
        self.keep = keep
        self.policies: set[str] = set()
        self.firsts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._count = self._rows = 0
        self._facts: list[tuple[Any, ...]] = []
        self._bodies: list[tuple[int, bytes]] = []
        self._store = sqlite3.connect("", isolation_level=None)
        self._store.executescript(_TABLES)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[PromptGroup]:
        rows = self._select(
            "select first, sample, body from bodies join numbered using (row) order by first, row"
        )
        for _, alike in itertools.groupby(rows, lambda row: row[0]):
            group: PromptGroup | None = None
            for _, sample, body in alike:
                record = orjson.loads(body)
                if group is None:
                    wrapper = record.get("wrapper", "sft")
                    group = PromptGroup(
                        prompt_id(record), record["prompt"], wrapper, record.get("category")
                    )
                group.outputs.setdefault(record["policy"], {})[sample] = record["output"]
            assert group is not None
            yield group

    def add(self, record: Record) -> None:
        """Take one trajectory; without `wrapper` it is `sft`."""
        policy = record["policy"]
        self.policies.add(policy)
        if not self.keep(policy):
            return
        self._rows += 1
        prompt = orjson.dumps(record["prompt"], option=orjson.OPT_SORT_KEYS)
        self._facts.append(
            (
                self._rows,
                prompt_id(record),
                record.get("wrapper", "sft"),
                policy,
                record.get("sample"),
                hashlib.blake2b(prompt, digest_size=16).digest(),
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
            RecordError: An id names another prompt, or a sample is there twice, and no `on_bad`.
        """
        self._write_down()
        rows = self._select(
            "select name, wrapper, row, policy, sample, prompt from facts "
            "order by name, wrapper, row"
        )
        found: list[tuple[int, int, int]] = []
        refused: list[tuple[int, str]] = []
        for _, alike in itertools.groupby(rows, lambda row: row[:2]):
            self._look(list(alike), found, refused)
            if len(found) + len(refused) >= _ROWS:
                self._note(found, refused)
        self._note(found, refused)
        with self._writing():
            self._store.execute("insert into numbered select * from found order by row")
            self._store.execute("drop table found")
        bad = self._select(
            "select place, reason, body from refused join facts using (row) "
            "join bodies using (row) order by row"
        )
        for place, reason, body in bad:
            if on_bad is None:
                hint = "--rejects FILE sets bad records aside and goes on"
                raise RecordError(reason, where=place, hint=hint)
            on_bad(place, reason, body.decode())

    def _look(
        self,
        alike: list[tuple[Any, ...]],
        found: list[tuple[int, int, int]],
        refused: list[tuple[int, str]],
    ) -> None:
        """The trajectories of one group, in their order: which are good, and which sample each is.

        Args:
            alike: Their rows of `facts`.
            found: Where (row, first row of the group, sample) go.
            refused: Where (row, reason) go.
        """
        _, _, first, _, _, prompt = alike[0]
        samples: dict[str, set[int]] = {}
        for name, _, row, policy, sample, own in alike:
            there = samples.get(policy, set())
            number = len(there) if sample is None else sample
            if own != prompt:
                refused.append((row, f"id `{name}` already names another prompt"))
            elif number in there:
                reason = f"sample {number} of policy `{policy}` for prompt `{name}`"
                refused.append((row, f"{reason} is there already"))
            else:
                samples.setdefault(policy, set()).add(number)
                found.append((row, first, number))
        self._count += 1
        self.firsts.update(policy for policy, numbers in samples.items() if len(numbers) > 1)
        self.seconds.update(list(samples))

    def _note(self, found: list[tuple[int, int, int]], refused: list[tuple[int, str]]) -> None:
        self._insert("found", 3, found)
        self._insert("refused", 2, refused)
        found.clear()
        refused.clear()

    def _write_down(self) -> None:
        self._insert("facts", 7, self._facts)
        self._insert("bodies", 2, self._bodies)
        self._facts.clear()
        self._bodies.clear()

    def _insert(self, table: str, columns: int, rows: list[Any]) -> None:
        with self._writing():
            self._store.execute("begin")
            places = ", ".join("?" * columns)
            self._store.executemany(f"insert into {table} values ({places})", rows)
            self._store.execute("commit")

    def _select(self, query: str) -> Iterator[tuple[Any, ...]]:
        with self._writing():
            yield from self._store.execute(query)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise PolarctlError(
                f"trajectories cannot be sorted on disk: {error}",
                hint="TMPDIR=FOLDER names a folder with room for three times the input",
            ) from None
