"""Two sets of rewards for the same items: which is better, by how much, and where they disagree.

Items are matched by id and content, so that a case is compared with itself and nothing else. The
difference of two accuracies over the same items has a much narrower interval than either, since
what is hard for both drops out.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from polarctl.evaluation.cases import labels_of, rewards_of
from polarctl.evaluation.metrics import bootstrap_interval, pairs_of_group
from polarctl.records import Record, outputs_of, prompt_id

Key = tuple[str, str, int]  # id, hash of the content, and which one of several equal ones


@dataclass
class Sheet:
    """The cases of one scored file, by item.

    Attributes:
        name: What the file is called in tables.
        items: Key to the two rewards, better and worse, of each of the item's cases.
        categories: Key to the item's category, where it has one.
        skipped: Records without a comparison.
    """

    name: str
    items: dict[Key, list[tuple[float, float]]] = field(default_factory=dict)
    categories: dict[Key, str] = field(default_factory=dict)
    skipped: int = 0
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def key(self, record: Record) -> Key:
        """The key of the next record; a record must be given once."""
        name, content = prompt_id(record), content_hash(record)
        self._seen[name, content] += 1
        return (name, content, self._seen[name, content])

    def add(self, record: Record, by: str) -> Key | None:
        """Take a scored record; its key, or None when it holds no comparison."""
        key, pairs = self.key(record), pairs_of_group(labels_of(record))
        if not pairs:
            self.skipped += 1
            return None
        rewards = rewards_of(record)
        self.items[key] = [(rewards[better], rewards[worse]) for better, worse in pairs]
        if record.get(by) is not None:
            self.categories[key] = str(record[by])
        return key

    def right(self, key: Key) -> list[bool]:
        """Whether each case of an item is right."""
        return [better > worse for better, worse in self.items[key]]


def content_hash(record: Mapping[str, Any]) -> str:
    """What is compared: prompt, answers and labels; not the reference, which a model may lack."""
    said = [record["prompt"], outputs_of(dict(record)), labels_of(Record(dict(record)))]
    return hashlib.blake2b(msgspec.json.encode(said, order="sorted"), digest_size=12).hexdigest()


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value that the two are as often alone in being right.

    Twice the smaller tail of a binomial with probability one half over the items on which the two
    differ, at most 1 (McNemar, Psychometrika 12 (1947) 153-157, in its exact form).

    Args:
        first_only: Items that only the first has right.
        second_only: Items that only the second has right.
    """
    total, few = first_only + second_only, min(first_only, second_only)
    if total == 0:
        return 1.0
    # In logarithms: 2^-total is no float for more than a thousand items.
    terms = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        for k in range(few + 1)
    ]
    largest = max(terms)
    tail = math.fsum(math.exp(term - largest) for term in terms)
    return min(1.0, 2 * math.exp(largest - total * math.log(2)) * tail)


def difference(first: Sheet, second: Sheet, keys: Sequence[Key], seed: int) -> dict[str, Any]:
    """Accuracy of the second minus that of the first over common items, with its interval.

    The bootstrap draws prompts. Where the two agree on everything it has no width; then the ends
    are the largest share of differing items that would go unseen: 1 - 0.025^(1/n).

    Returns:
        `value`, `low`, `high`, `n` (cases), `items`, `first_only` and `second_only` (items on which
        one has more cases right), `p` (`mcnemar` of these).
    """
    changes, clusters = [], []
    first_only = second_only = 0
    for key in keys:
        pairs = zip(first.right(key), second.right(key), strict=True)
        steps = [int(b) - int(a) for a, b in pairs]
        changes += steps
        clusters += [key[0]] * len(steps)
        first_only += sum(steps) < 0
        second_only += sum(steps) > 0
    found = bootstrap_interval([(step + 1) / 2 for step in changes], clusters, seed=seed)
    value, low, high = (2 * end - 1 for end in (found.value, found.low, found.high))
    if not any(changes):
        reach = 1 - 0.025 ** (1 / found.clusters)
        value, low, high = 0.0, -reach, reach
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": found.n,
        "items": len(keys),
        "first_only": first_only,
        "second_only": second_only,
        "p": mcnemar(first_only, second_only),
    }


def sign(found: Mapping[str, Any]) -> int:
    """1 or -1 where a `difference` is one beyond doubt, else 0.

    The interval must lie on one side of 0 and the p-value below 0.05: where only a few items
    differ, a percentile interval alone is too sure.
    """
    if found["p"] >= 0.05:
        return 0
    return int(found["low"] > 0) - int(found["high"] < 0)


def words(first: str, second: str, found: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    value, low, high = (100 * found[end] for end in ("value", "low", "high"))
    told = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], p = {found['p']:.2g}"
    if (told_apart := sign(found)) > 0:
        return f"{second} is better than {first}: {told}"
    if told_apart < 0:
        return f"{second} is worse than {first}: {told}"
    return f"no difference can be told between {first} and {second}: {told}"


def matched(sheets: Sequence[Sheet]) -> list[Key]:
    """The items that all sheets have, in the order of the first."""
    return [key for key in sheets[0].items if all(key in sheet.items for sheet in sheets[1:])]


def unmatched(sheets: Sequence[Sheet], common: Iterable[Key]) -> list[dict[str, int]]:
    """For each sheet, how many items are not compared: `absent` elsewhere, or of other `content`.

    An item is of other content when another sheet has its id, but no item with its content.
    """
    kept = set(common)
    found = []
    for sheet in sheets:
        ids = {key[0] for other in sheets if other is not sheet for key in other.items}
        left = [key for key in sheet.items if key not in kept]
        content = sum(key[0] in ids for key in left)
        found.append({"absent": len(left) - content, "content": content})
    return found


def unpaired(baseline: Mapping[str, Any], figure: Mapping[str, Any]) -> tuple[float, float]:
    """Ends of the interval of `figure` minus `baseline`, two estimates of separate runs.

    Each end adds the distances of the two intervals' ends as squares (Newcombe, Statistics in
    Medicine 17 (1998) 873-890, method 10). The same items would allow a narrower one: `compare`.
    """
    value = figure["value"] - baseline["value"]
    low = math.hypot(figure["value"] - figure["low"], baseline["high"] - baseline["value"])
    high = math.hypot(figure["high"] - figure["value"], baseline["value"] - baseline["low"])
    return value - low, value + high
