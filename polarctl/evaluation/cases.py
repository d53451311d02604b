"""From scored records to comparisons, and from comparisons to figures with intervals.

A case compares a better candidate with a worse one for the same prompt. The model is right when
the better one has the strictly higher reward. Two baselines look at the same two texts without any
model: `length` prefers the longer one, `overlap` the one that shares more words with the reference
(unigram F1). A baseline that cannot tell scores one half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from polarctl.errors import RecordError, UsageError
from polarctl.evaluation.metrics import (
    Interval,
    baseline_verdict,
    best_of_n,
    bootstrap_interval,
    kendall_tau_b,
    ndcg,
    pairs_of_group,
    quantiles,
    text_length,
    unigram_f1,
)
from polarctl.model.template import content_text
from polarctl.records import (
    Record,
    Score,
    check,
    find_kind,
    kind_of_scorable,
    outputs_of,
    prompt_id,
)

MODEL = "model"
_LARGEST = 1e100  # differences and quantiles of such rewards are finite


@dataclass
class Cases:
    """What is kept of every case: a few numbers, so memory grows slowly with the input.

    Attributes:
        verdicts: Scorer name to 1, 0.5 or 0 for every case.
        clusters: Prompt id of every case.
        categories: Category of every case, or None.
        margins: Reward of the better minus that of the worse.
        best: Scorer name to the label of the candidate that it ranks first, for every group.
        best_clusters: Prompt id of every group.
        ranks: "kendall_tau_b" and "ndcg" to scorer name to the value of every group of three
            candidates or more; no "ndcg" for a group with a negative label.
        rank_clusters: Prompt id of every such group.
        skipped: Reason to number of records that hold no comparison.
        between_policies: Cases whose reference and better candidate are by one policy.
    """

    verdicts: dict[str, list[float]] = field(default_factory=dict)
    clusters: list[str] = field(default_factory=list)
    categories: list[str | None] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    best: dict[str, list[float]] = field(default_factory=dict)
    best_clusters: list[str] = field(default_factory=list)
    ranks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    rank_clusters: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    between_policies: int = 0

    @property
    def metric(self) -> str:
        """What the accuracy is called: of telling policies apart, or of agreeing with people."""
        if self.between_policies == 0:
            return "preference accuracy"
        whole = self.between_policies == len(self.margins)
        return "discrimination accuracy" if whole else "accuracy (policies and preferences)"


def rewards_of(record: Record) -> list[float]:
    """The rewards of a scored record, one per candidate.

    Raises:
        RecordError: None, or not as many as candidates.
    """
    values = record.get("rewards", [record["reward"]] if "reward" in record else None)
    if values is None:
        raise RecordError(
            "has no reward", where=record.where, hint="`polarctl score` first, or pass --model"
        )
    if len(values) != len(outputs_of(record)):
        raise RecordError(
            f"{len(values)} rewards for {len(outputs_of(record))} candidates", where=record.where
        )
    rewards = [float(value) for value in values]
    for reward in rewards:
        if abs(reward) > _LARGEST:
            raise RecordError(f"a reward of {reward:g}: too large to compare", where=record.where)
    return rewards


def require_rewards(record: Record) -> None:
    """Raise RecordError for what is not a scored record."""
    if not {"candidates", "chosen", "output"} & record.keys():
        raise RecordError(
            "has no candidates: it is a verdict, or not a scored record",
            hint="`polarctl eval` reads what `polarctl score` writes",
        )
    # `score --no-reference` needs none, so neither does this.
    check({"reference": "", **record}, find_kind(kind_of_scorable(record)))
    check(record, Score)
    rewards_of(record)


def require_cases(cases: Cases, records: int) -> None:
    """Raise RecordError when so many records hold no comparison."""
    if not cases.margins:
        raise RecordError(
            f"nothing to compare in {records:,} records",
            hint="triples, or groups of candidates with different `label`s",
        )


def check_by(name: str | None, fields: set[str]) -> None:
    """Raise UsageError when no record has the field that is to group the figures."""
    if name is not None and name not in fields:
        near = get_close_matches(name, fields, 3) or sorted(fields)
        raise UsageError(
            f"`--by {name}`: no record has that field",
            hint=f"there is {', '.join(f'`{field}`' for field in near)}",
        )


def verdicts(record: Record, by: str, cases: Cases) -> Iterator[dict[str, Any]]:
    """The verdicts of one scored record, added to the cases on the way.

    Args:
        record: A scored triple or group.
        by: Field that holds the category.
        cases: Where to count them.
    """
    rewards = rewards_of(record)
    labels = labels_of(record)
    pairs = pairs_of_group(labels) if len(labels) == len(rewards) else []
    if not pairs:
        cases.skipped["no better and worse candidate"] += 1
        return
    scores = _baselines(record)
    cluster, category = prompt_id(record), record.get(by)
    if "candidates" in record:
        _best(cases, cluster, labels, {MODEL: rewards, **scores})
        if len(labels) > 2:
            _ranks(cases, cluster, labels, {MODEL: rewards, **scores})
    author = record.get("reference_policy")
    cases.between_policies += len(pairs) * (author is not None and author == record.get("policy"))
    names = [c.get("name") for c in record.get("candidates", [])] or ["chosen", "rejected"]
    for better, worse in pairs:
        margin = rewards[better] - rewards[worse]
        told = {name: baseline_verdict(s[better], s[worse]) for name, s in scores.items()}
        cases.clusters.append(cluster)
        cases.categories.append(None if category is None else str(category))
        cases.margins.append(margin)
        for name, value in {MODEL: float(margin > 0), **told}.items():
            cases.verdicts.setdefault(name, []).append(value)
        verdict = {
            "id": cluster,
            "correct": margin > 0,
            "margin": margin,
            "rewards": [rewards[better], rewards[worse]],
            "baselines": told,
            "category": None if category is None else str(category),
            "better": names[better],
            "worse": names[worse],
        }
        yield {key: value for key, value in verdict.items() if value is not None}


def labels_of(record: Record) -> list[float]:
    """True qualities: 1 and 0 for a triple; empty where a label is missing."""
    if "candidates" not in record:
        return [1.0, 0.0] if "chosen" in record else []
    labels = [candidate.get("label") for candidate in record["candidates"]]
    return [] if None in labels else [float(label) for label in labels]


def _baselines(record: Record) -> dict[str, list[float]]:
    """Baseline name to a score for every candidate."""
    texts = [content_text(output) for output in outputs_of(record)]
    scores = {"length": [float(text_length(text)) for text in texts]}
    reference = content_text(record.get("reference", ""))
    if reference.strip():
        scores["overlap"] = [unigram_f1(text, reference) for text in texts]
    return scores


def _best(
    cases: Cases, cluster: str, labels: Sequence[float], scores: Mapping[str, Sequence[float]]
) -> None:
    cases.best_clusters.append(cluster)
    found = {name: best_of_n(values, labels) for name, values in scores.items()}
    found["random"] = sum(labels) / len(labels)
    found["oracle"] = max(labels)
    for name, value in found.items():
        cases.best.setdefault(name, []).append(value)


def _ranks(
    cases: Cases, cluster: str, labels: Sequence[float], scores: Mapping[str, Sequence[float]]
) -> None:
    cases.rank_clusters.append(cluster)
    metrics = {"kendall_tau_b": kendall_tau_b}
    if min(labels) >= 0:
        metrics["ndcg"] = ndcg
    for metric, function in metrics.items():
        found = cases.ranks.setdefault(metric, {})
        for name, values in scores.items():
            found.setdefault(name, []).append(function(values, labels))


def summarise(cases: Cases, seed: int) -> dict[str, Any]:
    """The report record (`polarctl.records.Report`) of all cases.

    A scorer that could not judge every case (`overlap`, where a reference is missing) is left out.

    Args:
        cases: At least one case.
        seed: Seed of the bootstrap over prompts.
    """
    everything = range(len(cases.margins))
    scorers = [name for name, values in cases.verdicts.items() if len(values) == len(everything)]
    groups: dict[str, list[int]] = {}
    for index, category in enumerate(cases.categories):
        if category is not None:
            groups.setdefault(category, []).append(index)

    def figures(indices: Sequence[int]) -> dict[str, dict[str, Any]]:
        clusters = [cases.clusters[i] for i in indices]
        return {
            name: estimate([cases.verdicts[name][i] for i in indices], clusters, seed)
            for name in scorers
        }

    spread = quantiles(cases.margins)
    report: dict[str, Any] = {
        "metric": cases.metric,
        "overall": figures(everything),
        "categories": {name: figures(groups[name]) for name in sorted(groups)},
        "margins": spread,
        "skipped": dict(cases.skipped),
    }
    if cases.best_clusters and _are_shares(cases.best["oracle"]):
        report["best_of_n"] = {
            name: estimate(values, cases.best_clusters, seed)
            for name, values in cases.best.items()
            if len(values) == len(cases.best_clusters)
        }
    groups_ranked = len(cases.rank_clusters)
    if groups_ranked:
        report["ranking"] = {
            metric: {
                name: _rank_estimate(metric, values, cases.rank_clusters, seed)
                for name, values in found.items()
                if len(values) == groups_ranked
            }
            for metric, found in cases.ranks.items()
            if len(found[MODEL]) == groups_ranked
        }
    return report


def _are_shares(labels: Sequence[float]) -> bool:
    return all(0 <= label <= 1 for label in labels)


def estimate(values: Sequence[float], clusters: Sequence[str], seed: int) -> dict[str, Any]:
    """A mean with its 95 % interval as an `Estimate` record."""
    interval = bootstrap_interval(values, clusters, seed=seed)
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "clusters": interval.clusters,
    }


def _rank_estimate(
    metric: str, values: Sequence[float], clusters: Sequence[str], seed: int
) -> dict[str, Any]:
    """`estimate`, which takes shares, of values from -1 to 1 or from 0 to 1."""
    if metric == "ndcg":
        return estimate(values, clusters, seed)
    found = estimate([(value + 1) / 2 for value in values], clusters, seed)
    return found | {name: 2 * found[name] - 1 for name in ("value", "low", "high")}


def interval_of(figure: Mapping[str, Any]) -> Interval:
    """An `Estimate` record as an `Interval`."""
    return Interval(
        figure["value"], figure["low"], figure["high"], figure["n"], figure.get("clusters", 0)
    )
