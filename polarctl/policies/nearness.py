"""How near two texts are, and two policies: what makes a negative false, or hard.

A rejected text that is nearly the chosen one teaches that a copy is worse than a copy. One by a
policy that is near the reference's is the opposite of that: few can tell it apart, so it teaches
most. The first is measured on texts, the second comes from a reward model's rewards or from names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from polarctl.errors import RecordError
from polarctl.model.template import content_text
from polarctl.records import Record
from polarctl.storage.read import Reader, expand

# A word, or one sign. Scripts without spaces give a sign at a time.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_PARTS = re.compile(r"[-_/@:.]+")
# Part of the weight that goes by nearness; the rest stays as it is without `--hard-by`.
HARD_SHARE = 0.5

# Two policies to how far apart they are, or None where nothing is known of them.
Distance = Callable[[str, str], float | None]


def words_of(text: str) -> list[str]:
    """The words and signs of a text; of a script without spaces, every sign."""
    return _TOKEN.findall(text)


def pairs_of_words(text: Any) -> Counter[tuple[str, str]]:
    """How often each word follows each; the first follows the text's beginning."""
    words = words_of(content_text(text))
    return Counter(zip(["", *words], words, strict=False))


def similarity(a: Counter[tuple[str, str]], b: Counter[tuple[str, str]]) -> float:
    """The share of the pairs of words that two texts have in common (Dice), in [0, 1].

    Time is linear in the lengths. A text of 100 words and the same with one other word: 0.98.
    """
    both = a.total() + b.total()
    return 2 * (a & b).total() / both if both else 1.0


def by_names(a: str, b: str) -> float:
    """Distance of two policies by their names: minus the parts that both begin with.

    `qwen2.5-7b-chat` and `qwen2.5-72b` have two in common: `qwen2` and `5`.
    """
    shared = 0
    for x, y in zip(_PARTS.split(a), _PARTS.split(b), strict=False):
        if x != y:
            break
        shared += 1
    return -float(shared)


class Margins:
    """Distances of policies by rewards: how far the rejected texts lie below the chosen ones.

    The mean over all scored triples of two policies, whichever of them was the reference's.

    Attributes:
        triples: Number of triples taken.
    """

    def __init__(self) -> None:
        self.triples = 0
        self._sums: dict[frozenset[str], list[float]] = {}

    def add(self, record: Record) -> None:
        """Take a triple that `score` has scored.

        Raises:
            RecordError: It has no rewards, or does not say whose texts they are.
        """
        names = record.get("policy"), record.get("rejected_policy")
        if not all(isinstance(name, str) for name in names):
            raise RecordError(
                "no `policy` and `rejected_policy`",
                hint="--hard-by reads triples of `pair` after `score`",
            )
        rewards = record.get("rewards")
        if not isinstance(rewards, list) or len(rewards) < 2:
            raise RecordError("no `rewards` of chosen and rejected", hint="`score` writes them")
        sums = self._sums.setdefault(frozenset(map(str, names)), [0.0, 0.0])
        sums[0] += rewards[0] - rewards[1]
        sums[1] += 1
        self.triples += 1

    def __call__(self, a: str, b: str) -> float | None:
        """The mean margin, or None if no triple of the two was scored."""
        found = self._sums.get(frozenset((a, b)))
        return found[0] / found[1] if found else None

    def table(self) -> list[tuple[list[str], float]]:
        """Every two policies and their margin, by name."""
        return sorted((sorted(k), total / count) for k, (total, count) in self._sums.items())


def distance_of(named: str | None) -> tuple[Distance | None, list[str]]:
    """What `--hard-by` names, and the files that were read for it.

    Args:
        named: `names`, or a file of triples that `score` has scored; None: nothing.

    Raises:
        RecordError: A row that is no such triple.
        UsageError: No such file.
    """
    if named is None:
        return None, []
    if named == "names":
        return by_names, []
    margins, paths = Margins(), expand([named])
    for _ in Reader(paths, "score", verify=margins.add):
        pass
    return margins, paths


def weights(
    first: str, others: Sequence[str], even: list[float], distance: Distance | None
) -> list[float]:
    """Weights of the other policies as the rejected one.

    Args:
        first: The reference's policy.
        others: The others.
        even: Their weights without nearness.
        distance: Half of the weight goes by it: to the nearest, half as much to the next, and so
            on. Policies of which it knows nothing have no part in that half. None: all is even.
    """
    if distance is None:
        return even
    known = [(far, name) for name in others if (far := distance(first, name)) is not None]
    if not known:
        return even
    ranks = {far: rank for rank, far in enumerate(sorted({far for far, _ in known}))}
    hard = {name: 0.5 ** ranks[far] for far, name in known}
    total, scale = sum(even), HARD_SHARE / sum(hard.values())
    return [
        (1 - HARD_SHARE) * share / total + scale * hard.get(name, 0.0)
        for share, name in zip(even, others, strict=True)
    ]


def shuffled(names: Iterable[tuple[float, Any]], draw: Callable[[], float]) -> list[Any]:
    """Items in random order, those of a larger weight (> 0) earlier on average.

    Args:
        names: Weight and item.
        draw: A number in [0, 1).
    """
    keyed = [(draw() ** (1 / weight), place, item) for place, (weight, item) in enumerate(names)]
    return [item for _, _, item in sorted(keyed, reverse=True)]
