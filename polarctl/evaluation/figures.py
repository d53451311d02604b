"""From cases to the figures of a report: accuracies with intervals, calibration, length bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from polarctl.evaluation import discrimination
from polarctl.evaluation.cases import MODEL, NUMBERS, Cases, estimate
from polarctl.evaluation.metrics import quantiles

BINS = 10


def summarise(cases: Cases, seed: int) -> dict[str, Any]:
    """The report record (`polarctl.records.Report`) of all cases.

    A scorer that could not judge every case (`overlap`, where a reference is missing) is left out.

    Args:
        cases: At least one case.
        seed: Seed of the bootstrap over prompts.
    """
    import numpy as np

    count = len(cases.margins)
    marks = {
        name: np.asarray(values, dtype=float)
        for name, values in cases.verdicts.items()
        if len(values) == count and (name != NUMBERS or cases.with_numbers)
    }
    order = [MODEL, *(n for n in marks if n not in (MODEL, NUMBERS)), NUMBERS]
    marks = {name: marks[name] for name in order if name in marks}
    clusters, categories = np.asarray(cases.clusters), np.asarray(cases.categories)

    def figures(which: Any) -> dict[str, dict[str, Any]]:
        return {
            name: estimate(values[which], clusters[which], seed) for name, values in marks.items()
        }

    report: dict[str, Any] = {
        "metric": cases.metric,
        "overall": figures(slice(None)),
        "categories": {
            name: figures(categories == cases.names[name]) for name in sorted(cases.names)
        },
        "margins": quantiles(cases.margins),
        "calibration": calibration(cases.margins),
        "length_bias": _length_bias(cases, marks[MODEL], clusters, seed),
        "skipped": dict(cases.skipped),
    }
    if cases.duels.margins:
        report["discrimination"] = discrimination.summary(cases.duels, seed)
    if agreement := cases.agreement.summary(seed):
        report["reference_agreement"] = agreement
    groups = len(cases.best_clusters)
    if groups and all(0 <= label <= 1 for label in cases.best["oracle"]):
        decided = np.asarray(cases.decided, dtype=bool)
        keys = np.asarray(cases.best_clusters)
        whole = {n: np.asarray(v) for n, v in cases.best.items() if len(v) == groups}
        report["best_of_n"] = {n: estimate(v, keys, seed) for n, v in whole.items()}
        if decided.any():
            report["best_of_n_decided"] = {
                n: estimate(v[decided], keys[decided], seed) for n, v in whole.items()
            }
    ranked = len(cases.rank_clusters)
    if ranked:
        keys = np.asarray(cases.rank_clusters)
        report["ranking"] = {
            metric: {
                name: _rank_estimate(metric, np.asarray(values), keys, seed)
                for name, values in found.items()
                if len(values) == ranked
            }
            for metric, found in cases.ranks.items()
            if len(found[MODEL]) == ranked
        }
    return report


def _rank_estimate(metric: str, values: Any, clusters: Any, seed: int) -> dict[str, Any]:
    """`estimate`, which takes shares, of values from -1 to 1 or from 0 to 1."""
    if metric == "ndcg":
        return estimate(values, clusters, seed)
    found = estimate((values + 1) / 2, clusters, seed)
    return found | {name: 2 * found[name] - 1 for name in ("value", "low", "high")}


def calibration(margins: Sequence[float]) -> dict[str, Any]:
    """How often the model is right where it says to be so sure.

    The loss of a reward model reads sigmoid(difference of two rewards) as the probability that the
    first is the better. So its confidence in a case is sigmoid(|margin|), from 0.5 to 1, put into
    bins of equal width; a margin of 0 is right by half. `ece` is the mean over cases of
    |accuracy - confidence| of their bin (Naeini et al., AAAI 2015; Guo et al., ICML 2017).

    Args:
        margins: Reward of the better minus that of the worse; at least one.
    """
    import numpy as np

    values = np.asarray(margins, dtype=float)
    # exp of what is not positive cannot overflow.
    confidence = 1 / (1 + np.exp(-np.abs(values)))
    right = (values > 0) + 0.5 * (values == 0)
    places = np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)
    bins, error = [], 0.0
    for place in range(BINS):
        here = places == place
        if not here.any():
            continue
        sure, accuracy = float(confidence[here].mean()), float(right[here].mean())
        number = int(here.sum())
        bins.append({"confidence": sure, "accuracy": accuracy, "n": number})
        error += number * abs(accuracy - sure)
    return {"ece": error / len(values), "bins": bins}


def _length_bias(cases: Cases, right: Any, clusters: Any, seed: int) -> dict[str, Any]:
    """Whether the model likes length: see `polarctl schema report`.

    `correlation` is sum(dr dl) / sqrt(sum(dr^2) sum(dl^2)) over pairs, for differences dr in reward
    and dl in characters: Pearson's r if every pair stood in the data in both orders.
    """
    import numpy as np

    margins = np.asarray(cases.margins)
    lengths = np.asarray(cases.lengths, dtype=float)
    # Scaled, so that the squares of very large rewards stay finite.
    margins = margins / (np.abs(margins).max() or 1.0)
    scale = math.sqrt(float((margins**2).sum()) * float((lengths**2).sum()))
    found: dict[str, Any] = {}
    if scale > 0:
        found["correlation"] = max(-1.0, min(1.0, float((margins * lengths).sum()) / scale))
    for name, which in (("longer_is_worse", lengths < 0), ("longer_is_better", lengths > 0)):
        if which.any():
            found[name] = estimate(right[which], clusters[which], seed)
    return found
