"""Public benchmarks' own arithmetic: from scored rows to a score for each section.

`polarctl.formats.benchmarks` makes the rows. A benchmark sorts them into **leaves** (a subset, a
domain), takes the mean of one or more figures over each leaf, and makes sections and one overall
figure of the means. A section without rows is left out and named, never counted as 0.

Everything after the means is arithmetic that arrays can do as well as numbers. So the interval of
a section comes from the same code: rows are drawn with replacement within their leaf (leaves are
strata, their sizes are fixed by the benchmark), and the percentiles of the results are taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from polarctl import seeding
from polarctl.errors import RecordError
from polarctl.evaluation.metrics import wilson
from polarctl.records import Record

Leaf = tuple[str, ...]
Figures = tuple[float | None, ...]  # None: this row does not count for this figure
Means = Mapping[Leaf, Sequence[Any]]  # a number each, or an array of resampled ones

RESAMPLES = 2000


@dataclass(frozen=True)
class BenchmarkRow:
    """What a scored row says.

    Attributes:
        leaf: Where it counts.
        figures: Its figures, or what it holds of them where there is a `key`.
        key: Rows of one leaf with the same key are one item of the benchmark.
    """

    leaf: Leaf
    figures: Any
    key: str | None = None


class Suite(ABC):
    """A benchmark. Subclasses say how a row is read and how means become sections.

    Attributes:
        name: As in `--benchmark`.
        sections: The benchmark's own names, in its own order; empty where the rows name them.
        rows: Figures of every item of a leaf.
        counted: Number of rows that count.
        one_sided: Whether a row may hold candidates of one label only.
        left_out: Reason to number of rows that count for nothing.
    """

    name: ClassVar[str]
    sections: ClassVar[tuple[str, ...]] = ()
    one_sided: ClassVar[bool] = False

    def __init__(self) -> None:
        self.rows: defaultdict[Leaf, list[Figures]] = defaultdict(list)
        self.left_out: Counter[str] = Counter()
        self.counted = 0
        self._held: defaultdict[tuple[Leaf, str], list[Any]] = defaultdict(list)

    # -- a benchmark's own part ------------------------------------------------------------------

    @abstractmethod
    def row(self, record: Record, good: list[float], bad: list[float]) -> BenchmarkRow | str:
        """Read a row; a text says why it counts for nothing.

        Args:
            record: The row.
            good: Rewards of the candidates with the highest label, in their order.
            bad: Rewards of the others.
        """

    def item(self, parts: list[Any]) -> Figures:
        """The figures of an item whose rows share a key; for benchmarks whose rows do."""
        raise TypeError(f"rows of {self.name} share no key")

    @abstractmethod
    def total(self, means: Means) -> tuple[Any, dict[str, Any]]:
        """The overall figure, and that of every section that has rows."""

    def leaves(self, section: str) -> list[Leaf]:
        """The leaves whose items a section counts."""
        return [leaf for leaf in self.rows if leaf[0] == section]

    def details(self, means: Means) -> dict[str, dict[str, float]]:
        """Finer figures by kind: `{"subset": {NAME: accuracy}}`."""
        return {}

    # -- what all of them do ---------------------------------------------------------------------

    def check(self, record: Record, labels: Sequence[float]) -> None:
        """Raise RecordError for what is no row of this benchmark."""
        self._read(record, [0.0] * len(labels), labels)

    def add(self, record: Record, rewards: Sequence[float], labels: Sequence[float]) -> None:
        """Count a scored row."""
        row = self._read(record, rewards, labels)
        if isinstance(row, str):
            self.left_out[row] += 1
            return
        self.counted += 1
        if row.key is None:
            self.rows[row.leaf].append(row.figures)
        else:
            self._held[row.leaf, row.key].append(row.figures)

    def _read(
        self, record: Record, rewards: Sequence[float], labels: Sequence[float]
    ) -> BenchmarkRow | str:
        said = record.get("benchmark")
        if said is not None and said != self.name:
            raise RecordError(f"is a row of `{said}`, not of `{self.name}`", where=record.where)
        if not labels:
            raise wrong(
                record,
                "has no group of candidates with a `label` each",
                f"`polarctl convert --from {self.name}` makes groups",
            )
        top = max(labels)
        pairs = list(zip(rewards, labels, strict=True))
        good = [reward for reward, label in pairs if label == top]
        bad = [reward for reward, label in pairs if label != top]
        if not bad and not self.one_sided:
            raise wrong(record, "all candidates have the same label")
        return self.row(record, good, bad)

    def result(self, seed: int) -> dict[str, Any]:
        """The `BenchmarkResult` record.

        Args:
            seed: Seed of the bootstrap.

        Raises:
            RecordError: No row counts, or rows of one item contradict each other.
        """
        for (leaf, _), parts in self._held.items():
            self.rows[leaf].append(self.item(parts))
        self._held.clear()
        if not self.rows:
            why = "; ".join(self.left_out)
            raise RecordError(f"no row counts for {self.name}: {why}")
        means = {leaf: _means(rows) for leaf, rows in self.rows.items()}
        overall, sections = self.total(means)
        drawn = {leaf: _resampled(rows, seed, leaf) for leaf, rows in self.rows.items()}
        low_high, parts_low_high = self.total(drawn)
        counts = {name: sum(len(self.rows[x]) for x in self.leaves(name)) for name in sections}
        ends = {"overall": _ends(overall, low_high, self.counted)}
        for name, value in sections.items():
            ends[name] = _ends(value, parts_low_high[name], counts[name])
        return {
            "name": self.name,
            "overall": float(overall),
            "sections": {name: float(value) for name, value in sections.items()},
            "counts": counts,
            "rows": self.counted,
            "intervals": ends,
            "details": self.details(means),
            "missing": [name for name in self.sections if name not in sections],
            "left_out": dict(self.left_out),
        }


def wrong(record: Record, what: str, hint: str | None = None) -> RecordError:
    """What is wrong with a row, for `raise`."""
    return RecordError(what, where=record.where, hint=hint)


def subset_of(record: Record, *fields: str) -> str:
    """The first of some fields, looked for in the record and in its `meta`."""
    for name in fields:
        for place in (record, record.get("meta")):
            if isinstance(place, dict) and isinstance(place.get(name), str) and place[name]:
                return str(place[name])
    raise wrong(record, f"has no `{fields[0]}`", "`polarctl convert --from` writes it")


def beats(good: list[float], bad: list[float]) -> float:
    """1 when every good one is strictly above every bad one."""
    return float(bool(bad) and min(good) > max(bad))


def _means(rows: Sequence[Figures]) -> list[float]:
    """The mean of each figure over the rows that have it; 0 where none has."""
    found = []
    for figure in range(len(rows[0])):
        values = [v for row in rows if (v := row[figure]) is not None]
        found.append(math.fsum(values) / len(values) if values else 0.0)
    return found


def _resampled(rows: Sequence[Figures], seed: int, leaf: Leaf) -> list[Any]:
    """The same means for each of `RESAMPLES` draws of the rows."""
    import numpy as np

    # Rows with equal figures are interchangeable: a draw is one multinomial over the kinds.
    kinds = Counter(rows)
    ordered = sorted(kinds, key=lambda row: [(v is None, v or 0.0) for v in row])
    shares = np.array([kinds[kind] for kind in ordered]) / len(rows)
    rng = np.random.default_rng(seeding.derive(seed, "benchmark", *leaf))
    drawn = rng.multinomial(len(rows), shares, size=RESAMPLES)
    found = []
    for figure in range(len(ordered[0])):
        has = np.array([kind[figure] is not None for kind in ordered])
        values = np.array([kind[figure] or 0.0 for kind in ordered])
        weights = drawn[:, has].sum(axis=1)
        found.append((drawn[:, has] @ values[has]) / np.maximum(weights, 1))
    return found


def _ends(value: Any, drawn: Any, items: int) -> list[float]:
    """Ends of a 95 % interval that holds the value."""
    import numpy as np

    low, high = np.quantile(np.broadcast_to(drawn, RESAMPLES), [0.025, 0.975])
    if high - low < 1e-12 and 0 <= value <= 1:  # all right or all wrong: it tells no width
        return list(wilson(float(value), items, 0.95))
    return [min(float(low), float(value)), max(float(high), float(value))]
