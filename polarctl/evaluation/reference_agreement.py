"""Whether the references of a prompt say the same: do they put its candidates in one order?

A record with several `references` has a reward of each candidate against each of them
(`reference_rewards`, as `score` writes it). Two references agree on two candidates when both give
the higher reward to the same one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

from polarctl.errors import RecordError
from polarctl.evaluation.metrics import bootstrap_interval, kendall_tau_b
from polarctl.records import Record, outputs_of

SAME_ORDER, TAU = "same_order", "kendall_tau_b"
RANKED = 3  # candidates from which an order is more than one pair

Row = Sequence[float | None]


@dataclass
class Agreement:
    """What is kept of every record whose references can be compared, 16 to 32 bytes.

    Attributes:
        values: "same_order" and "kendall_tau_b" to a mean for every such record.
        clusters: The same names to the key of its prompt.
    """

    values: dict[str, array[float]] = field(default_factory=dict)
    clusters: dict[str, array[int]] = field(default_factory=dict)

    def add(self, record: Record, key: int) -> None:
        """Count a scored record, if two of its references judge two candidates or more.

        Args:
            record: What `score` wrote, and `check_rows` has passed.
            key: Of its prompt.
        """
        rows = record.get("reference_rewards", [])
        found = same_order(rows), mean_tau(rows)
        for name, value in zip((SAME_ORDER, TAU), found, strict=True):
            if value is not None:
                self.values.setdefault(name, array("d")).append(value)
                self.clusters.setdefault(name, array("Q")).append(key)

    def summary(self, seed: int) -> dict[str, Any]:
        """Name to the mean over records with its 95 % interval over prompts; empty without any.

        Args:
            seed: Seed of the bootstrap.
        """
        import numpy as np

        made = {}
        for name, values in self.values.items():
            # The bootstrap takes shares; a correlation is one of -1 to 1.
            low, scale = (-1, 2) if name == TAU else (0, 1)
            marks = (np.asarray(values) - low) / scale
            found = bootstrap_interval(marks, np.asarray(self.clusters[name]), seed=seed)
            ends = {end: low + scale * getattr(found, end) for end in ("value", "low", "high")}
            made[name] = {**ends, "n": found.n, "clusters": found.clusters}
        return made


def check_rows(record: Record) -> None:
    """Raise RecordError when its `reference_rewards` are not one for each candidate."""
    count = len(outputs_of(record))
    if any(len(row) != count for row in record.get("reference_rewards", [])):
        raise RecordError(
            f"`reference_rewards`: each row must have {count} rewards, one for each candidate",
            where=record.where,
        )


def same_order(rows: Sequence[Row]) -> float | None:
    """Share of pairs of candidates that two references put in the same order.

    The mean over all pairs of references and all pairs of candidates that both have judged. Where
    one of the two gives equal rewards and the other does not, it counts half.

    Args:
        rows: Of each reference, the rewards of all candidates; None where it has judged none.

    Returns:
        0 to 1; None where no two references have judged two candidates.
    """
    shares = []
    for a, b in combinations(rows, 2):
        both = _common(a, b)
        for (a1, b1), (a2, b2) in combinations(both, 2):
            orders = [(first > second) - (first < second) for first, second in ((a1, a2), (b1, b2))]
            shares.append(1 - abs(orders[0] - orders[1]) / 2)
    return fmean(shares) if shares else None


def mean_tau(rows: Sequence[Row]) -> float | None:
    """Kendall's tau-b between the orders by two references, the mean over pairs of references.

    A reference that gives all candidates the same reward orders nothing: 0.

    Args:
        rows: As in `same_order`.

    Returns:
        -1 to 1; None where no two references have judged three candidates.
    """
    taus = []
    for a, b in combinations(rows, 2):
        both = _common(a, b)
        if len(both) < RANKED:
            continue
        one, other = ([pair[side] for pair in both] for side in (0, 1))
        taus.append(kendall_tau_b(one, other) if min(other) < max(other) else 0.0)
    return fmean(taus) if taus else None


def _common(a: Row, b: Row) -> list[tuple[float, float]]:
    """The rewards of the candidates that both references have judged."""
    return [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
