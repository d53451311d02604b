"""Trajectories by prompt on a Ray cluster: what `by_prompt.Groups` does on one machine.

Every machine reads files and looks at the trajectories of its prompts. This process learns how many
prompts each policy has and what is bad, and gets the triples, prompt by prompt, in the order in
which one machine finds the prompts.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from polarctl.errors import MissingError, RecordError, UsageError
from polarctl.parallel.ray_data import Grouped, Keyed
from polarctl.policies.by_prompt import (
    Fact,
    PromptGroup,
    SampleNumbers,
    check_sample,
    key_of,
    prompt_digest,
    sorted_out,
)
from polarctl.policies.pairing import Pairing
from polarctl.records import prompt_id
from polarctl.storage.compression import is_compressed
from polarctl.storage.read import REJECTS, OnBad, Reader, is_pipe, place_of

_LINE_BITS = 40  # of a row's order; above them the number of its file
_COMPRESSION = 4  # by which text shrinks, about


class Bad(NamedTuple):
    """A row that is refused, or a file that cannot be read on.

    Attributes:
        late: Whether other rows had to be known for that: those come after all others.
        order: Of the row.
        where: Its place.
        reason: What is wrong.
        hint: What helps.
        raw: The row as text; None: the file cannot be read on.
    """

    late: bool
    order: int
    where: str
    reason: str
    hint: str | None
    raw: str | None


@dataclass
class Note:
    """What this process learns of some rows.

    Attributes:
        policies: All policies met.
        firsts: See `by_prompt.Groups`.
        seconds: See there.
        groups: Prompts.
        files: Number of a file to its rows and bytes, as a machine has read it.
        bad: What is refused.
    """

    policies: set[str] = field(default_factory=set)
    firsts: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    files: dict[int, tuple[int, int]] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)

    def add(self, other: Note) -> None:
        """Take in what is known of other rows."""
        self.policies |= other.policies
        self.firsts += other.firsts
        self.seconds += other.seconds
        self.groups += other.groups
        self.files |= other.files
        self.bad += other.bad


class RemoteGroups:
    """Trajectories by prompt and wrapper, on the machines of a cluster. A context manager.

    Args:
        address: See `polarctl.parallel.ray_driver.Driver`.
        takes_part: Says of a policy's name whether it takes part; can be pickled.

    Attributes:
        policies: See `by_prompt.Groups`.
        firsts: See there.
        seconds: See there.
    """

    def __init__(self, address: str, takes_part: Callable[[str], bool]):
        self.address, self.takes_part = address, takes_part
        self.policies: set[str] = set()
        self.firsts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._count = 0
        self._held = ExitStack()
        self._grouped: Grouped | None = None

    def __enter__(self) -> RemoteGroups:
        return self

    def __exit__(self, *failed: object) -> None:
        self._held.close()

    def __len__(self) -> int:
        return self._count

    def read(self, paths: list[str], *, limit: int | None, on_bad: OnBad | None) -> str:
        """As of `by_prompt.ByPrompt`; the machines read the files, too.

        Raises:
            MissingError: No such cluster, or one of its machines does not see these files.
            RecordError: A bad row, and no `on_bad`.
            UsageError: An input can be read only once.
        """
        pipe = next(filter(is_pipe, paths), None)
        if pipe is not None:
            raise UsageError(
                f"--ray reads files on every machine, and {place_of(pipe)} is none",
                hint="write it to a file that all machines see, or leave --ray out",
            )
        survey = _survey(paths, limit) if limit else None
        rows = [survey.files[n][0] if survey else None for n in range(len(paths))]
        # The machines' working folders are others.
        files = [os.path.abspath(path) for path in paths]
        steps = _Steps(files, [place_of(path) for path in paths], self.takes_part)
        sizes = ((Path(path).stat().st_size, is_compressed(path)) for path in paths)
        size = sum(size * _COMPRESSION if packed else size for size, packed in sizes)
        self._grouped = self._held.enter_context(
            Grouped(self.address, list(enumerate(rows)), size, steps.read, steps.group)
        )
        survey = survey or _survey(paths, None)  # while the cluster is at work
        note = Note()
        for part in self._grouped.notes(partial(_merged, first_only=on_bad is None)):
            note.add(pickle.loads(part))
        self._refuse(note.bad, on_bad)
        for number, path in enumerate(paths):
            if note.files.get(number, (0, 0)) != survey.files[number]:
                raise MissingError(
                    f"{path}: a machine of the cluster has another file of this name, or none",
                    hint="name files on a file system that all machines share",
                )
        if not any(count for count, _ in survey.files):
            raise Reader(paths, None).no_records()
        self.policies, self.firsts, self.seconds = note.policies, note.firsts, note.seconds
        self._count = note.groups
        return survey.digest

    @staticmethod
    def _refuse(bad: list[Bad], on_bad: OnBad | None) -> None:
        for one in sorted(bad, key=lambda one: one[:2]):
            if on_bad is None or one.raw is None:
                hint = one.hint or REJECTS
                raise RecordError(one.reason, where=one.where, hint=hint)
            on_bad(one.where, one.reason, one.raw)

    def triples(
        self, pairing: Pairing, is_mine: Callable[[PromptGroup], bool]
    ) -> Iterator[list[dict[str, Any]]]:
        """The triples of each prompt, in the order of the prompts; counts go to `pairing`.

        Args:
            pairing: What draws them.
            is_mine: Says of a prompt whether it takes part; can be pickled.
        """
        assert self._grouped is not None
        for packed in self._grouped.ordered(_Draw(pairing, is_mine)):
            triples, counts, roles = pickle.loads(packed)
            pairing.counts.update(counts)
            for policy, role in roles.items():
                known = pairing.roles.setdefault(policy, dict.fromkeys(role, 0))
                for name, count in role.items():
                    known[name] += count
            yield triples


class _Survey(NamedTuple):
    """The inputs as this process reads them: rows and bytes of each, and a hash of all."""

    files: list[tuple[int, int]]
    digest: str


def _survey(paths: list[str], limit: int | None) -> _Survey:
    files, left, running = [], limit, hashlib.blake2b(digest_size=16)
    for path in paths:
        rows = size = 0
        try:
            for _, line in Reader([path], None, limit=left).lines() if left != 0 else ():
                rows, size = rows + 1, size + len(line)
                running.update(line)
        except RecordError:
            if limit is not None:  # no machine reads beyond these rows
                raise
            # A machine comes upon it, too, and what is wrong before it is told first.
        files.append((rows, size))
        left = None if left is None else left - rows
    return _Survey(files, running.hexdigest())


# -- on the machines ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    """What is done with files and rows."""

    files: list[str]
    names: list[str]  # in messages
    takes_part: Callable[[str], bool]

    def read(self, part: tuple[int, int | None]) -> Iterator[Keyed]:
        """The rows of a file, as many as there are given, and a note on it."""
        number, limit = part
        note, rows, size = Note(), 0, 0
        order = first = number << _LINE_BITS
        reader = Reader([self.files[number]], "trajectory", limit=limit, verify=check_sample)
        try:
            for where, line in reader.lines() if limit != 0 else ():
                rows, size = rows + 1, size + len(line)
                order = first + int(where.rpartition(":")[2])
                try:
                    record = reader.parse(where, line)
                except RecordError as error:
                    raw = line.decode("utf-8", "replace").rstrip("\n")
                    bad = Bad(False, order, self._place(order), error.reason, error.hint, raw)
                    yield _told(order, Note(bad=[bad]))
                    continue
                assert record is not None
                note.policies.add(record["policy"])
                if self.takes_part(record["policy"]):
                    yield Keyed(_short(key_of(record)), order, orjson.dumps(record), None)
        except RecordError as error:
            name = self.names[number]
            note.bad.append(Bad(False, order + 1, name, error.reason, error.hint, None))
        except (OSError, UsageError):
            pass  # no such file on this machine: missed where the rows are counted
        note.files[number] = rows, size
        yield _told(first, note)

    def group(self, rows: list[Keyed]) -> Iterator[Keyed]:
        """The prompts among rows that may belong together, and what contradicts them."""
        alike: dict[bytes, list[tuple[Keyed, dict[str, Any]]]] = {}
        for row in rows:
            record = orjson.loads(row.body or b"")
            alike.setdefault(key_of(record), []).append((row, record))
        for together in alike.values():
            yield from self._group(together)

    def _group(self, together: list[tuple[Keyed, dict[str, Any]]]) -> Iterator[Keyed]:
        name, note, good = prompt_id(together[0][1]), Note(groups=1), []
        facts = (
            Fact(row.order, record["policy"], record.get("sample"), prompt_digest(record))
            for row, record in together
        )
        for (order, number, reason), (row, record) in zip(
            sorted_out(name, facts, SampleNumbers(name)), together, strict=True
        ):
            if reason is None:
                good.append((number, record))
                continue
            raw = (row.body or b"").decode()
            note.bad.append(Bad(True, order, self._place(order), reason, None, raw))
        group = PromptGroup.of(good)
        note.firsts.update(group.firsts())
        note.seconds.update(group.seconds())
        yield Keyed(0, together[0][0].order, pickle.dumps(group), pickle.dumps(note))

    def _place(self, order: int) -> str:
        return f"{self.names[order >> _LINE_BITS]}:{order & ((1 << _LINE_BITS) - 1)}"


def _told(order: int, note: Note) -> Keyed:
    """A row for this process alone."""
    return Keyed(_short(b"%d" % order), order, None, pickle.dumps(note))


def _short(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)


def _merged(notes: Iterable[bytes], first_only: bool) -> bytes:
    """Several notes as one.

    Args:
        notes: Packed.
        first_only: Keep nothing of what is refused but the first: it is an error.
    """
    found = Note()
    for note in notes:
        found.add(pickle.loads(note))
        if first_only:
            found.bad = sorted(found.bad, key=lambda one: one[:2])[:1]
    return pickle.dumps(found)


@dataclass
class _Draw:
    """From a prompt to its triples, and what was counted."""

    pairing: Pairing
    is_mine: Callable[[PromptGroup], bool]

    def __call__(self, packed: bytes) -> bytes | None:
        group = pickle.loads(packed)
        if not self.is_mine(group):
            return None
        self.pairing.counts, self.pairing.roles = Counter(), {}
        triples = list(self.pairing.triples(group))
        return pickle.dumps((triples, self.pairing.counts, self.pairing.roles))
