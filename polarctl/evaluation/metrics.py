"""Pure functions of numbers: accuracies, their intervals, and the two text baselines.

Two rules decide a pair, and they differ on purpose. A **model** must score the chosen candidate
strictly above the rejected one: a tie is wrong, so a model that gives every text the same reward
has accuracy 0, not a flattering 50 %. A **baseline** (longer text, word overlap) gets half a point
for a tie, so that a baseline that cannot tell the two apart stands at chance, which is what a
reader compares the model with. `verdict` applies the first rule and `baseline_verdict` the second.

numpy is imported inside the one function that needs it, because the command line imports this
module for `--help`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Scripts written without spaces between words: Han, kana. `\w+` would make one word of a sentence.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_NUMBER = re.compile(r"(?<!\w)\d+(?:,\d{3})*(?:\.\d+)?")
_MOST_KINDS = 20_000
_WORD = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Interval:
    """A proportion with its confidence interval: `0 <= low <= value <= high <= 1`.

    `n` counts the cases and `clusters <= n` the independent groups of cases (prompts).
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int


def _check_lengths(name: str, these: Sized, other: str, those: Sized) -> None:
    if len(these) != len(those):
        raise ValueError(f"{len(these)} {name} but {len(those)} {other}")
    if not len(these):
        raise ValueError(f"no {name}: nothing to measure")


def verdict(chosen: float, rejected: float, *, tie: float = 0.0) -> float:
    """Judge one pair: 1.0 if `chosen > rejected`, `tie` if they are equal, else 0.0.

    Raises:
        ValueError: either number is NaN, which compares false with everything and would pass
            for an honest mistake of the model.
    """
    if math.isnan(chosen) or math.isnan(rejected):
        raise ValueError(f"cannot compare NaN rewards: chosen {chosen}, rejected {rejected}")
    if chosen == rejected:
        return tie
    return 1.0 if chosen > rejected else 0.0


def baseline_verdict(chosen: float, rejected: float) -> float:
    """Judge one pair for a baseline: 1.0, 0.0, or 0.5 for a tie (see the module docstring)."""
    return verdict(chosen, rejected, tie=0.5)


def wilson(p: float, n: float, level: float) -> tuple[float, float]:
    """Ends of the Wilson interval for an observed share `p` of `n` trials, both real numbers.

    Source: Wilson, JASA 22 (1927) 209-212.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding can put an end a few ulps past p or past the unit interval.
    low, high = (centre - half) / scale, (centre + half) / scale
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")


def bootstrap_interval(
    correct: Sequence[float] | NDArray[Any],
    clusters: Sequence[Hashable] | NDArray[Any],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of the mean of `correct`, resampling whole clusters.

    `correct` holds a verdict in [0, 1] per case and `clusters` the key of its cluster, such as the
    prompt. Cases that share a prompt rise and fall together: so prompts are drawn with
    replacement and each brings all its cases. The estimate stays a mean over cases.

    **When resampling cannot move the mean** (every cluster has the same mean: all right, all
    wrong, one cluster only) the percentile interval has no width, which claims certainty from a
    small sample. Then the ends come from Wilson's interval for the same share, with the number
    of trials set to the effective number of clusters, `(sum m)^2 / sum m^2` for cluster sizes m.
    That is the number of clusters when they are equally large, and assumes the worst, that the
    cases of one prompt all go the same way: the interval errs on the wide side.

    With more than 20,000 distinct kinds of clusters (sum and size) the ends are those of the normal
    distribution with the linearised standard error of a ratio, which the bootstrap then approaches.

    With fewer than about 20 clusters a percentile interval is known to be somewhat too narrow.
    Neither the order of the cases nor the cluster names matter; a non-negative `seed` gives the
    same numbers on one version of numpy.

    Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; Davison
    and Hinkley, Bootstrap Methods (1997), section 3.8, for whole clusters; Kish, Survey Sampling
    (1965), for the effective number; Cochran, Sampling Techniques (1977), section 6.3, for
    a ratio; Wilson, JASA 22 (1927) 209-212.

    Raises:
        ValueError: no cases, different lengths, or an argument outside its range.
    """
    _check_level(level)
    _check_lengths("verdicts", correct, "cluster keys", clusters)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    import numpy as np

    marks = np.asarray(correct, dtype=float)
    if not ((marks >= 0) & (marks <= 1)).all():  # NaN is neither
        raise ValueError(f"a verdict must lie in [0, 1], got {marks.min()} to {marks.max()}")
    value = min(1.0, math.fsum(marks) / len(marks))
    totals, sizes, numbers = _kinds(marks, _codes(clusters))
    count = int(numbers.sum())
    if len(np.unique(totals / sizes)) == 1:
        effective = len(marks) ** 2 / float((numbers * sizes**2).sum())
        low, high = wilson(value, effective, level)
        return Interval(value, low, high, len(marks), count)
    if len(totals) > _MOST_KINDS:
        error = math.sqrt(float((numbers * (totals - value * sizes) ** 2).sum())) / len(marks)
        reach = NormalDist().inv_cdf(0.5 + level / 2) * error
        return Interval(value, max(0.0, value - reach), min(1.0, value + reach), len(marks), count)
    rng = np.random.default_rng(seed)
    shares = numbers / count
    rows = max(1, 2_000_000 // len(totals))  # at most 16 MB of int64 at a time
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        drawn = rng.multinomial(count, shares, size=min(rows, resamples - start))
        means[start : start + rows] = (drawn @ totals) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # A very skewed sample or a handful of resamples can leave the estimate outside.
    low, high = min(value, float(low)), max(value, float(high))
    return Interval(value, low, high, len(marks), count)


def _codes(clusters: Any) -> Any:
    """Cluster keys as integers, the same for the same key."""
    import numpy as np

    if isinstance(clusters, np.ndarray):
        return clusters
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in clusters])


def _kinds(marks: Any, codes: Any) -> tuple[Any, Any, Any]:
    """Sum and size of the clusters, each pair once, and how many clusters have them.

    Clusters with equal (sum, size) are interchangeable, so that drawing K clusters is one
    multinomial over the distinct kinds: exact, and a few columns instead of K. Whatever the order
    of the cases and the names of the clusters, the result is the same.
    """
    import numpy as np

    order = np.lexsort((marks, codes))
    starts = np.flatnonzero(np.diff(codes[order], prepend=codes[order[0]] + 1))
    totals = np.add.reduceat(marks[order], starts)
    sizes = np.diff(np.append(starts, len(marks)))
    order = np.lexsort((sizes, totals))
    totals, sizes = totals[order], sizes[order]
    new = np.ones(len(totals), dtype=bool)
    new[1:] = (np.diff(totals) != 0) | (np.diff(sizes) != 0)
    firsts = np.flatnonzero(new)
    return totals[firsts], sizes[firsts], np.diff(np.append(firsts, len(totals)))


def unigram_f1(a: str, b: str) -> float:
    r"""Word overlap of two texts: F1 over their multisets of words, in [0, 1], symmetric.

    Words are lower-cased runs of `\w`, single digits and letters included ("the answer is 7" and
    "the answer is 8" differ); a Han or kana character is a word by itself. Two texts without a
    word give 1, one such text gives 0. This is ROUGE-1 F1 without stemming (Lin, 2004).
    """
    left, right = _words(a), _words(b)
    total = left.total() + right.total()
    if total == 0:
        return 1.0
    return 2 * (left & right).total() / total


def has_number(text: str) -> bool:
    """Whether a text holds a number in digits."""
    return _NUMBER.search(text) is not None


def number_f1(a: str, b: str) -> float:
    """Overlap of the numbers of two texts: F1 over their multisets, in [0, 1], symmetric.

    A number is a run of digits that no letter stands before, with an optional fraction; commas
    between groups of three digits are dropped, so that 1,200 is 1200; 3.50 is 3.5. Two texts
    without one give 1, one such text 0.
    """
    left, right = _numbers(a), _numbers(b)
    total = left.total() + right.total()
    return 2 * (left & right).total() / total if total else 1.0


# A reference is compared with several candidates, one after the other.
@lru_cache(maxsize=4)
def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


@lru_cache(maxsize=4)
def _numbers(text: str) -> Counter[str]:
    return Counter(map(_number, _NUMBER.findall(text)))


def _number(found: str) -> str:
    whole, _, fraction = found.replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")


def text_length(text: str) -> int:
    """Length in characters (code points), for the baseline in which the longer text wins."""
    return len(text)


def best_of_n(rewards: Sequence[float], labels: Sequence[float]) -> float:
    """Label that one gets by keeping the candidate with the highest reward.

    Candidates that tie for the top are equally likely, so the result is their mean label.

    Raises:
        ValueError: no candidates, different lengths, or a NaN reward.
    """
    _check_lengths("rewards", rewards, "labels", labels)
    if any(math.isnan(reward) for reward in rewards):
        raise ValueError("a reward is NaN")
    top = max(rewards)
    kept = [label for reward, label in zip(rewards, labels, strict=True) if reward == top]
    return math.fsum(kept) / len(kept)


def pairs_of_group(labels: Sequence[float]) -> list[tuple[int, int]]:
    """All index pairs `(i, j)` with `labels[i] > labels[j]`, in lexicographic order.

    Equal labels make no pair, so a group whose labels are all equal gives an empty list.
    """
    indices = range(len(labels))
    return [(i, j) for i in indices for j in indices if labels[i] > labels[j]]


def kendall_tau_b(rewards: Sequence[float], labels: Sequence[float]) -> float:
    """Rank correlation of rewards and true qualities, in [-1, 1], with ties on both sides.

    (C - D) / sqrt((P - T_r) (P - T_l)) over P pairs, C in the same order, D in opposite order, T_r
    with equal rewards and T_l with equal labels (Kendall, Biometrika 33 (1945) 239-251). Rewards
    that are all equal tell nothing and give 0.

    Raises:
        ValueError: no candidates, different lengths, a NaN, or labels that are all equal.
    """
    _check_ranked(rewards, labels)
    signs = [
        (_order(rewards[i], rewards[j]), _order(labels[i], labels[j]))
        for i in range(len(labels))
        for j in range(i)
    ]
    told = sum(r != 0 for r, _ in signs)
    true = sum(t != 0 for _, t in signs)
    agreed = sum(r * t for r, t in signs)
    return agreed / math.sqrt(told * true) if told else 0.0


def ndcg(rewards: Sequence[float], labels: Sequence[float]) -> float:
    """Gain of the order by reward over that of the best order, in [0, 1].

    A candidate at rank k gains label / log2(k + 1) (Järvelin and Kekäläinen, ACM TOIS 20 (2002)
    422-446, with linear gain). Candidates with equal rewards share the mean of their ranks'
    discounts, so that the order in which they happen to stand does not count.

    Raises:
        ValueError: no candidates, different lengths, a NaN, labels that are all equal or negative.
    """
    _check_ranked(rewards, labels)
    if min(labels) < 0:
        raise ValueError("a label is negative")
    discounts = [1 / math.log2(rank + 2) for rank in range(len(labels))]
    tied: dict[float, list[float]] = defaultdict(list)
    for reward, label in zip(rewards, labels, strict=True):
        tied[reward].append(label)
    gained, first = 0.0, 0
    for reward in sorted(tied, reverse=True):
        mine = tied[reward]
        gained += math.fsum(mine) / len(mine) * math.fsum(discounts[first : first + len(mine)])
        first += len(mine)
    best = math.fsum(map(math.prod, zip(sorted(labels, reverse=True), discounts, strict=True)))
    return min(1.0, gained / best)


def _order(a: float, b: float) -> int:
    return (a > b) - (a < b)


def _check_ranked(rewards: Sequence[float], labels: Sequence[float]) -> None:
    _check_lengths("rewards", rewards, "labels", labels)
    if any(map(math.isnan, (*rewards, *labels))):
        raise ValueError("a reward or a label is NaN")
    if min(labels) == max(labels):
        raise ValueError("all labels are equal: there is no order to find")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Summary of a sample: `min`, `p05`, `p25`, `p50`, `p75`, `p95` and `max`.

    Linear interpolation between order statistics (definition 7 of Hyndman and Fan, The American
    Statistician 50 (1996) 361-365; numpy's default).

    Raises:
        ValueError: no values, or one that is infinite or NaN.
    """
    if not len(values):
        raise ValueError("no values to summarise")
    if not all(map(math.isfinite, values)):
        raise ValueError("a value is infinite or NaN")
    ordered = sorted(map(float, values))
    points = {"min": 0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1}
    summary = {}
    for name, share in points.items():
        position = share * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        summary[name] = ordered[below] + (position - below) * (ordered[above] - ordered[below])
    return summary
