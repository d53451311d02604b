"""Telling policies apart, the task of pre-training: on new prompts, on new policies, by distance.

A case is a triple whose reference and chosen text are by one policy and its rejected text by
another. The distance of two policies is taken from their texts alone, not from any model: how much
less the rejected text overlaps with the reference (unigram F1) than the chosen one does, the mean
over all cases of the two, whichever of them was chosen.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polarctl.evaluation.metrics import bootstrap_interval, wilson
from polarctl.records import prompt_id

# What training has not seen of a case, as bits: its prompt, one of its two policies.
NEW_PROMPT, NEW_POLICY = 1, 2
PARTS = {
    0: "prompts and policies of training",
    NEW_PROMPT: "new prompts",
    NEW_POLICY: "new policies",
    NEW_PROMPT | NEW_POLICY: "new prompts and policies",
}
BINS = 5


def prompt_key(name: str) -> int:
    """64 bits of a hash of a prompt's identity (`records.prompt_id`)."""
    data = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


@dataclass
class TrainedOn:
    """The prompts and policies of the triples that a model was trained on."""

    prompts: Any
    policies: frozenset[str]

    @classmethod
    def read(cls, records: Iterable[dict[str, Any]]) -> TrainedOn:
        """From its triples; 8 bytes a record are kept."""
        import numpy as np

        keys: array[int] = array("Q")
        policies: set[Any] = set()
        for record in records:
            keys.append(prompt_key(prompt_id(record)))
            policies |= {record.get("policy"), record.get("rejected_policy")}
        return cls(np.unique(np.asarray(keys, dtype=np.uint64)), frozenset(policies - {None}))

    def knows(self, key: int) -> bool:
        """Whether a prompt was among them."""
        import numpy as np

        place = int(np.searchsorted(self.prompts, np.uint64(key)))
        return place < len(self.prompts) and int(self.prompts[place]) == key


@dataclass
class Duels:
    """What is kept of every case between two policies, about 30 bytes.

    Attributes:
        trained_on: What the model was trained on, where that is known.
        names: Policy to its number.
        own: Policy of the chosen text.
        other: Policy of the rejected text.
        margins: Reward of the chosen minus that of the rejected.
        gaps: By how much more the chosen overlaps with the reference.
        prompts: Key of the prompt.
        new: What training has not seen of it, as bits; 0 where that is not known.
    """

    trained_on: TrainedOn | None = None
    names: dict[str, int] = field(default_factory=dict)
    own: array[int] = field(default_factory=lambda: array("i"))
    other: array[int] = field(default_factory=lambda: array("i"))
    margins: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("f"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    new: array[int] = field(default_factory=lambda: array("b"))

    def add(self, record: Mapping[str, Any], key: int, margin: float, gap: float) -> None:
        """Count a scored triple, unless it is none of two policies."""
        own, other = record.get("policy"), record.get("rejected_policy")
        if own is None or other is None or record.get("reference_policy") != own:
            return
        for name, places in ((own, self.own), (other, self.other)):
            places.append(self.names.setdefault(name, len(self.names)))
        self.margins.append(margin)
        self.gaps.append(gap)
        self.prompts.append(key)
        new = 0
        if self.trained_on is not None:
            new = 0 if self.trained_on.knows(key) else NEW_PROMPT
            new |= 0 if {own, other} <= self.trained_on.policies else NEW_POLICY
        self.new.append(new)


def summary(duels: Duels, seed: int) -> dict[str, Any]:
    """The figures of all cases, at least one.

    Returns:
        `parts`: part of the cases (`all`, and those of `PARTS`) to `accuracy` and `loss`, each a
        figure with its interval. The loss is that of pre-training, -log sigmoid(margin). `policies`
        and `matrix`: of each ordered pair `policy`, `rejected_policy`, `n`, `accuracy`, its Wilson
        interval `low` to `high`, and `loss`. `distance`: `correlation` (Spearman's, over pairs of
        policies), `pairs` of them (`distance`, `accuracy`, `n`) and `bins` of equally many cases
        (`distance` and `accuracy` with its interval); absent for fewer than three pairs.
    """
    import numpy as np

    margins = np.asarray(duels.margins)
    right = (margins > 0).astype(float)
    losses = np.logaddexp(0, -margins)
    prompts, new = np.asarray(duels.prompts), np.asarray(duels.new)

    def figures(which: Any) -> dict[str, Any]:
        return {
            "accuracy": _estimate(right[which], prompts[which], seed),
            "loss": _estimate(losses[which], prompts[which], seed),
        }

    parts = {"all": figures(slice(None))}
    if duels.trained_on is not None:
        parts |= {name: figures(new == bits) for bits, name in PARTS.items() if (new == bits).any()}
    order = sorted(duels.names)
    place = np.empty(len(order), dtype=int)
    place[[duels.names[name] for name in order]] = np.arange(len(order))
    own, other = place[np.asarray(duels.own)], place[np.asarray(duels.other)]
    matrix = []
    codes, numbers, (hits, loss) = _by_code(own * len(order) + other, right, losses)
    for code, n, share, mean in zip(codes, numbers, hits, loss, strict=True):
        low, high = wilson(float(share), int(n), 0.95)
        cell = {"policy": order[code // len(order)], "rejected_policy": order[code % len(order)]}
        matrix.append(
            {**cell, "n": int(n), "accuracy": float(share)}
            | {"low": low, "high": high, "loss": float(mean)}
        )
    found: dict[str, Any] = {"parts": parts, "policies": order, "matrix": matrix}
    pairs = np.minimum(own, other) * len(order) + np.maximum(own, other)
    distance = _by_distance(pairs, np.asarray(duels.gaps, dtype=float), right, prompts, seed)
    return found | ({"distance": distance} if distance else {})


def _by_code(codes: Any, *values: Any) -> tuple[Any, Any, list[Any]]:
    """The distinct codes, how often each stands, and the mean of each of the values for it."""
    import numpy as np

    distinct, places, numbers = np.unique(codes, return_inverse=True, return_counts=True)
    means = [np.bincount(places, weights=value) / numbers for value in values]
    return distinct, numbers, means


def _by_distance(
    pairs: Any, gaps: Any, right: Any, prompts: Any, seed: int
) -> dict[str, Any] | None:
    import numpy as np

    codes, numbers, (distances, shares) = _by_code(pairs, gaps, right)
    if len(codes) < 3:
        return None
    mine = distances[np.searchsorted(codes, pairs)]  # of every case, that of its pair
    edges = np.unique(np.quantile(mine, np.linspace(0, 1, min(BINS, len(codes)) + 1)[1:-1]))
    bins = []
    places = np.searchsorted(edges, mine, side="left")
    for number in np.unique(places):
        here = places == number
        bins.append(
            {"distance": float(mine[here].mean())} | _estimate(right[here], prompts[here], seed)
        )
    found: dict[str, Any] = {
        "pairs": [
            {"distance": float(d), "accuracy": float(s), "n": int(n)}
            for d, s, n in zip(distances, shares, numbers, strict=True)
        ],
        "bins": bins,
    }
    if min(np.ptp(distances), np.ptp(shares)) > 0:
        from scipy.stats import spearmanr

        found["correlation"] = float(spearmanr(distances, shares).statistic)
    return found


def _estimate(values: Any, clusters: Any, seed: int) -> dict[str, Any]:
    """A mean with its 95 % interval over prompts, of values of any size."""
    low, scale = (0.0, 1.0)
    if values.min() < 0 or values.max() > 1:
        low, scale = float(values.min()), float(values.max() - values.min()) or 1.0
    found = bootstrap_interval((values - low) / scale, clusters, seed=seed)
    ends = {name: low + scale * getattr(found, name) for name in ("value", "low", "high")}
    return {**ends, "n": found.n, "clusters": found.clusters}
