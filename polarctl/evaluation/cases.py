"""From scored records to comparisons, and from comparisons to figures with intervals.

A case compares a better candidate with a worse one for the same prompt. The model is right when
the better one has the strictly higher reward. Two baselines look at the same two texts without any
model: `length` prefers the longer one, `overlap` the one that shares more words with the reference
(unigram F1), `numbers` the one that shares more numbers. A baseline that cannot tell scores one
half.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from heapq import heappush, heapreplace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from polarctl.errors import RecordError, UsageError
from polarctl.evaluation.discrimination import Duels, prompt_key
from polarctl.evaluation.metrics import (
    Interval,
    baseline_verdict,
    best_of_n,
    bootstrap_interval,
    has_number,
    kendall_tau_b,
    ndcg,
    number_f1,
    pairs_of_group,
    text_length,
    unigram_f1,
)
from polarctl.evaluation.reference_agreement import Agreement, check_rows
from polarctl.evaluation.reference_source import origin
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

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL, NUMBERS = "model", "numbers"
WORST = 20  # cases with the lowest margins that a report shows
_ANY = ("utf-8", "surrogatepass")
_LARGEST = 1e100  # differences and quantiles of such rewards are finite


@dataclass
class Cases:
    """What is kept of every case: numbers in arrays, about 40 bytes a case.

    Attributes:
        verdicts: Scorer name to 1, 0.5 or 0 for every case.
        clusters: Hash of the prompt id of every case.
        categories: Index into `names` of every case's category; -1: it has none.
        names: The categories.
        margins: Reward of the better minus that of the worse.
        lengths: Length of the better minus that of the worse, in characters.
        best: Scorer name to the label of the candidate that it ranks first, for every group.
        best_clusters: Hash of the prompt id of every group.
        decided: 1 for a group whose labels differ, 0 for one that is all right or all wrong.
        ranks: "kendall_tau_b" and "ndcg" to scorer name to the value of every group of three
            candidates or more; no "ndcg" for a group with a negative label.
        rank_clusters: Hash of the prompt id of every such group.
        skipped: Reason to number of records that hold no comparison.
        between_policies: Cases whose reference and better candidate are by one policy.
        with_numbers: Cases whose reference holds a number.
        references: Where the references are from (`reference_source.WORDS`) to number of records.
        leaks: Records with a candidate that is the reference, whatever the white space.
        duels: The cases between two policies.
        agreement: Whether the references of a prompt agree.
        worst: The verdicts of the `WORST` lowest margins, none above 0, as a heap.
    """

    verdicts: dict[str, array[float]] = field(default_factory=dict)
    clusters: array[int] = field(default_factory=lambda: array("Q"))
    categories: array[int] = field(default_factory=lambda: array("i"))
    names: dict[str, int] = field(default_factory=dict)
    margins: array[float] = field(default_factory=lambda: array("d"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    best: dict[str, array[float]] = field(default_factory=dict)
    best_clusters: array[int] = field(default_factory=lambda: array("Q"))
    decided: array[int] = field(default_factory=lambda: array("b"))
    ranks: dict[str, dict[str, array[float]]] = field(default_factory=dict)
    rank_clusters: array[int] = field(default_factory=lambda: array("Q"))
    skipped: Counter[str] = field(default_factory=Counter)
    between_policies: int = 0
    with_numbers: int = 0
    references: Counter[str] = field(default_factory=Counter)
    leaks: int = 0
    duels: Duels = field(default_factory=Duels)
    agreement: Agreement = field(default_factory=Agreement)
    worst: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)

    def category(self, name: str | None) -> int:
        """The index of a category."""
        return -1 if name is None else self.names.setdefault(name, len(self.names))

    def keep_if_worst(self, verdict: dict[str, Any]) -> None:
        """Keep a verdict that is among the worst so far; of equal ones the first."""
        if verdict["margin"] > 0:
            return
        entry = (-verdict["margin"], -len(self.margins), verdict)
        if len(self.worst) < WORST:
            heappush(self.worst, entry)
        elif entry[:2] > self.worst[0][:2]:
            heapreplace(self.worst, entry)

    def worst_first(self) -> list[dict[str, Any]]:
        """Those verdicts, the worst one first."""
        return [verdict for _, _, verdict in sorted(self.worst, key=lambda e: e[:2], reverse=True)]

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
    check_rows(record)


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


def verdicts(
    record: Record,
    by: str,
    cases: Cases,
    *,
    text: bool = True,
    more: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """The verdicts of one scored record, added to the cases on the way.

    Args:
        record: A scored triple or group.
        by: Field that holds the category.
        cases: Where to count them.
        text: Whether verdicts hold the texts; else each text's hash and length.
        more: Further baselines: name to a score for every candidate.
    """
    rewards = rewards_of(record)
    labels = labels_of(record)
    cluster = prompt_id(record)
    key = prompt_key(cluster)
    cases.agreement.add(record, key)
    known = len(labels) == len(rewards)
    pairs = pairs_of_group(labels) if known else []
    group = known and "candidates" in record and len(labels) > 1
    if not pairs:
        cases.skipped["no better and worse candidate"] += 1
        if not group:
            return
    outputs = [content_text(output) for output in outputs_of(record)]
    scores = _baselines(record, outputs) | {name: list(s) for name, s in more.items()}
    category = record.get(by)
    reference = content_text(record.get("reference", "")).split()
    cases.references[origin(record)] += 1
    cases.leaks += bool(reference) and any(text.split() == reference for text in outputs)
    if group:
        _best(cases, key, labels, {MODEL: rewards, **scores}, decided=bool(pairs))
        if pairs and len(labels) > 2:
            _ranks(cases, key, labels, {MODEL: rewards, **scores})
    author = record.get("reference_policy")
    cases.between_policies += len(pairs) * (author is not None and author == record.get("policy"))
    if pairs and not group and "overlap" in scores:
        gap = scores["overlap"][0] - scores["overlap"][1]
        cases.duels.add(record, key, rewards[0] - rewards[1], gap)
    if NUMBERS in scores:
        cases.with_numbers += len(pairs)
    names = [c.get("name") for c in record.get("candidates", [])] or [
        record.get("policy", "chosen"),
        record.get("rejected_policy", "rejected"),
    ]
    index = cases.category(None if category is None else str(category)) if pairs else -1
    shared = {name: record[name] for name in ("prompt", "reference") if name in record}
    for better, worse in pairs:
        margin = rewards[better] - rewards[worse]
        told = {name: baseline_verdict(s[better], s[worse]) for name, s in scores.items()}
        cases.clusters.append(key)
        cases.categories.append(index)
        cases.margins.append(margin)
        cases.lengths.append(len(outputs[better]) - len(outputs[worse]))
        # A reference without a number tells the two apart no more than a coin.
        for name, value in {NUMBERS: 0.5, MODEL: float(margin > 0), **told}.items():
            cases.verdicts.setdefault(name, array("f")).append(value)
        verdict = {
            "id": cluster,
            "where": record.where,
            "correct": margin > 0,
            "margin": margin,
            "rewards": [rewards[better], rewards[worse]],
            "baselines": told,
            "category": None if category is None else str(category),
            "better": names[better],
            "worse": names[worse],
        }
        made = {key: value for key, value in verdict.items() if value is not None}
        whole = outputs_of(record)
        made["texts"] = {**shared, "better": whole[better], "worse": whole[worse]}
        if not text:
            made["texts"] = {name: text_mark(value) for name, value in made["texts"].items()}
        cases.keep_if_worst(made)
        yield made


def text_mark(text: Any) -> dict[str, Any]:
    """What is left of a text: a hash to know it again, and its length in characters."""
    plain = content_text(text)
    return {
        "hash": hashlib.blake2b(plain.encode(*_ANY), digest_size=8).hexdigest(),
        "length": len(plain),
    }


def labels_of(record: Record) -> list[float]:
    """True qualities: 1 and 0 for a triple; empty where a label is missing."""
    if "candidates" not in record:
        return [1.0, 0.0] if "chosen" in record else []
    labels = [candidate.get("label") for candidate in record["candidates"]]
    return [] if None in labels else [float(label) for label in labels]


def _baselines(record: Record, texts: Sequence[str]) -> dict[str, list[float]]:
    """Baseline name to a score for every candidate."""
    scores = {"length": [float(text_length(text)) for text in texts]}
    reference = content_text(record.get("reference", ""))
    if reference.strip():
        scores["overlap"] = [unigram_f1(text, reference) for text in texts]
        if has_number(reference):
            scores[NUMBERS] = [number_f1(text, reference) for text in texts]
    return scores


def _best(
    cases: Cases,
    key: int,
    labels: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    *,
    decided: bool,
) -> None:
    cases.best_clusters.append(key)
    cases.decided.append(decided)
    found = {name: best_of_n(values, labels) for name, values in scores.items()}
    found["random"] = sum(labels) / len(labels)
    found["oracle"] = max(labels)
    for name, value in found.items():
        cases.best.setdefault(name, array("d")).append(value)


def _ranks(
    cases: Cases, key: int, labels: Sequence[float], scores: Mapping[str, Sequence[float]]
) -> None:
    cases.rank_clusters.append(key)
    metrics = {"kendall_tau_b": kendall_tau_b}
    if min(labels) >= 0:
        metrics["ndcg"] = ndcg
    for metric, function in metrics.items():
        found = cases.ranks.setdefault(metric, {})
        for name, values in scores.items():
            found.setdefault(name, array("d")).append(function(values, labels))


def estimate(
    values: Sequence[float] | NDArray[Any],
    clusters: Sequence[Hashable] | NDArray[Any],
    seed: int,
) -> dict[str, Any]:
    """A mean with its 95 % interval as an `Estimate` record."""
    interval = bootstrap_interval(values, clusters, seed=seed)
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "clusters": interval.clusters,
    }


def interval_of(figure: Mapping[str, Any]) -> Interval:
    """An `Estimate` record as an `Interval`."""
    return Interval(
        figure["value"], figure["low"], figure["high"], figure["n"], figure.get("clusters", 0)
    )
