"""Rollouts on their way to the rewards, and what one reward gives to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from polarctl.records import Record


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rollouts to be rewarded; those of one prompt stand together.

    Attributes:
        records: The record of each one's prompt.
        rows: The same as the trainer has it: `reference`, `wrapper`.
        prompts: Texts or messages.
        completions: Texts or messages.
        tokens: Tokens of each completion.
        ended: Whether the policy ended it itself.
        numbers: A number for each prompt.
    """

    records: Sequence[Record]
    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    tokens: Sequence[int]
    ended: Sequence[bool]
    numbers: Sequence[int]


@dataclass(frozen=True)
class Values:
    """What one reward gives to a batch.

    Attributes:
        raw: Its value for each rollout; None: not applicable.
        used: The same on the scale that is trained on.
        floored: Why a value is the floor; empty where it is not.
    """

    raw: Sequence[float | None]
    used: Sequence[float | None]
    floored: Sequence[str]


def groups_of(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of the rollouts that are compared with each other.

    Args:
        numbers: A number for the prompt of each rollout.
        size: Rollouts of a prompt.
    """
    if len(numbers) % size == 0:  # also where a prompt is followed by itself
        yield from (list(range(i, i + size)) for i in range(0, len(numbers), size))
        return
    # A group is dealt to several processes.
    for _, group in itertools.groupby(range(len(numbers)), numbers.__getitem__):
        yield list(group)
