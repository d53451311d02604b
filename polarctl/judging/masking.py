"""In which order, and so under which masked name, a judge sees the candidates of a record.

The k-th candidate that is shown is called `model-k`: place and name are one thing, and neither
says who wrote the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from polarctl import seeding

_NAME = re.compile(r"\bmodel-([1-9]\d{0,3})\b")


def masked_names(count: int) -> list[str]:
    """`model-1` to `model-<count>`."""
    return [f"model-{place}" for place in range(1, count + 1)]


def orders_of(count: int, orders: int, seed: int, record_id: str) -> list[list[int]]:
    """The orders in which the candidates of one record are shown.

    The first is a shuffle; the next are its rotations, so that over `count` orders every candidate
    has every place once; then comes another shuffle. More orders begin with the same ones.

    Args:
        count: Number of candidates, >= 1.
        orders: Number of orders, >= 1.
        seed: The run's seed.
        record_id: Identity of the record.

    Returns:
        Per order the index of the candidate at each place.
    """
    generator = seeding.rng(seed, "mask", record_id)
    found: list[list[int]] = []
    while len(found) < orders:
        shuffled = list(range(count))
        generator.shuffle(shuffled)
        found += [shuffled[turn:] + shuffled[:turn] for turn in range(count)]
    return found[:orders]


def unmasked(text: str, order: Sequence[int], name_of: Callable[[int], str]) -> str:
    """A text with the candidates' own names in place of the masked ones.

    Args:
        text: What the judge wrote. A `model-9` that was never shown stays.
        order: Index of the candidate at each place.
        name_of: Index of a candidate to its name.
    """

    def own(match: re.Match[str]) -> str:
        place = int(match[1])
        return name_of(order[place - 1]) if place <= len(order) else match[0]

    return _NAME.sub(own, text)
