"""How good policies are: accuracy, pass@k, best of n by reward, win rates; with intervals.

Every figure is a mean over prompts of an unbiased estimate from all samples of the prompt, and its
interval is a bootstrap over prompts.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from polarctl.evaluation.cases import estimate

RIGHT = 0.5  # a value from here on is a correct answer
_NONE = math.nan


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k samples, drawn of these without replacement, is right.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al., arXiv 2107.03374).

    Args:
        samples: n, how many there are.
        right: c, how many of them are right, 0 to n.
        k: How many are drawn, 1 to n.

    Raises:
        ValueError: An argument outside its range.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {right} of them right")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def best_of(values: Sequence[float], rewards: Sequence[float], n: int) -> float:
    """Mean value of the sample with the highest reward among n drawn without replacement.

    The exact mean over all C(N, n) draws. Samples that tie for the top are equally likely.

    Args:
        values: How good each of the N samples is.
        rewards: What they are chosen by, as many.
        n: How many are drawn, 1 to N.

    Raises:
        ValueError: `n` out of its range, or different lengths.
    """
    total = len(values)
    if len(rewards) != total or not 1 <= n <= total:
        raise ValueError(f"best of {n} of {total} samples with {len(rewards)} rewards")
    tied: defaultdict[float, list[float]] = defaultdict(list)
    for reward, value in zip(rewards, values, strict=True):
        tied[reward].append(value)
    mean, left = 0.0, total
    for reward in sorted(tied, reverse=True):
        mine = tied[reward]
        # The highest of the draw is among these: none is above, and not all are below.
        ways = math.comb(left, n) - math.comb(left - len(mine), n)
        mean += ways / math.comb(total, n) * math.fsum(mine) / len(mine)
        left -= len(mine)
    return mean


def steps_to(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and that itself."""
    found = [1 << place for place in range(most.bit_length())]
    return found if found[-1] == most else [*found, most]


@dataclass
class Samples:
    """What is kept of every answer: numbers, about 28 bytes.

    Attributes:
        names: Policy to its number.
        policies: Policy of every answer.
        prompts: Key of its prompt.
        values: How right it is, 0 to 1; NaN: not known.
        rewards: Its reward; NaN: none.
    """

    names: dict[str, int] = field(default_factory=dict)
    policies: array[int] = field(default_factory=lambda: array("i"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    rewards: array[float] = field(default_factory=lambda: array("d"))

    def add(self, policy: str, prompt: int, value: float | None, reward: float | None) -> None:
        """Count an answer."""
        self.policies.append(self.names.setdefault(policy, len(self.names)))
        self.prompts.append(prompt)
        self.values.append(_NONE if value is None else value)
        self.rewards.append(_NONE if reward is None else reward)

    def by_prompt(self, numbers: array[float]) -> dict[str, dict[int, list[int]]]:
        """Policy to prompt to the places of its answers for which the numbers are known."""
        found: dict[str, dict[int, list[int]]] = {name: defaultdict(list) for name in self.names}
        order = list(self.names)
        for place, (policy, prompt) in enumerate(zip(self.policies, self.prompts, strict=True)):
            if not math.isnan(numbers[place]):
                found[order[policy]][prompt].append(place)
        return found


def summary(samples: Samples, seed: int) -> dict[str, Any]:
    """The figures of all policies.

    Returns:
        `policies`: name to `answers`, `prompts` and, where it is known what is right, `accuracy`,
        `pass_at_k` and, with rewards, `best_of_n`: n to a figure, and `accuracy_differences` to the
        first policy; with rewards `wins`: of each pair of policies with common prompts `policy`,
        `other`, the win rate as a figure and `ties`, the share of comparisons that tie.
    """
    known, scored = samples.by_prompt(samples.values), samples.by_prompt(samples.rewards)
    found: dict[str, Any] = {"policies": {}}
    counts = samples.by_prompt(array("d", bytes(8 * len(samples.policies))))
    for name in samples.names:
        figures: dict[str, Any] = {
            "answers": sum(map(len, counts[name].values())),
            "prompts": len(counts[name]),
        }
        if known[name]:
            figures |= _of_right(samples, known[name], seed)
        found["policies"][name] = figures
    first, *others = samples.names
    found["accuracy_differences"] = {
        other: _difference(samples, known[first], known[other], seed)
        for other in others
        if known[first].keys() & known[other].keys()
    }
    wins = [
        _win(samples, a, b, scored, seed)
        for a, b in combinations(samples.names, 2)
        if scored[a].keys() & scored[b].keys()
    ]
    return found | ({"wins": wins} if wins else {})


def _of_right(samples: Samples, places: Mapping[int, list[int]], seed: int) -> dict[str, Any]:
    values = {prompt: [samples.values[i] for i in mine] for prompt, mine in places.items()}
    keys = list(values)
    found = {"accuracy": _mean([math.fsum(v) / len(v) for v in values.values()], keys, seed)}
    fewest = min(map(len, values.values()))
    ks = steps_to(fewest)
    right = [(len(v), sum(value >= RIGHT for value in v)) for v in values.values()]
    found["pass_at_k"] = {
        str(k): _mean([pass_at_k(n, c, k) for n, c in right], keys, seed) for k in ks
    }
    rewards = {prompt: [samples.rewards[i] for i in mine] for prompt, mine in places.items()}
    if not any(math.isnan(reward) for mine in rewards.values() for reward in mine):
        found["best_of_n"] = {
            str(k): _mean([best_of(values[p], rewards[p], k) for p in keys], keys, seed) for k in ks
        }
    return found


def _difference(
    samples: Samples, first: Mapping[int, list[int]], other: Mapping[int, list[int]], seed: int
) -> dict[str, Any]:
    """Accuracy of another policy minus that of the first, prompt by prompt."""
    keys = [prompt for prompt in first if prompt in other]

    def share(places: Sequence[int]) -> float:
        return math.fsum(samples.values[i] for i in places) / len(places)

    found = _mean([(share(other[p]) - share(first[p]) + 1) / 2 for p in keys], keys, seed)
    return found | {end: 2 * found[end] - 1 for end in ("value", "low", "high")}


def _win(
    samples: Samples,
    policy: str,
    other: str,
    scored: Mapping[str, Mapping[int, list[int]]],
    seed: int,
) -> dict[str, Any]:
    """How often an answer of one policy has the higher reward than one of the other.

    All pairs of their answers to a prompt are compared, a tie is half a win; then the mean over
    common prompts.
    """
    keys = [prompt for prompt in scored[policy] if prompt in scored[other]]
    shares, ties, pairs = [], 0, 0
    for prompt in keys:
        mine, theirs = ([samples.rewards[i] for i in scored[n][prompt]] for n in (policy, other))
        equal = sum(a == b for a in mine for b in theirs)
        won = sum(a > b for a in mine for b in theirs)
        shares.append((won + equal / 2) / (len(mine) * len(theirs)))
        ties, pairs = ties + equal, pairs + len(mine) * len(theirs)
    figure = _mean(shares, keys, seed)
    return {"policy": policy, "other": other, **figure, "ties": ties / pairs}


def _mean(values: Iterable[float], clusters: Sequence[int], seed: int) -> dict[str, Any]:
    # Sums may leave the unit interval by their last digit.
    return estimate([min(1.0, max(0.0, value)) for value in values], clusters, seed)


def words(first: str, other: str, found: Mapping[str, Any]) -> str:
    """A difference of two policies as a sentence."""
    value, low, high = (100 * found[end] for end in ("value", "low", "high"))
    told = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}] over {found['n']:,} prompts"
    if low > 0:
        return f"{other} is right more often than {first}: {told}"
    if high < 0:
        return f"{other} is right less often than {first}: {told}"
    return f"{other} and {first} cannot be told apart by accuracy: {told}"
