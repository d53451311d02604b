"""Several rewards made one: weighted sums, a gate between verifiers and models, sums of z-scores.

GRPO and RLOO compare the rollouts of one prompt with each other, its group. So the values of a
group have to come from the same rewards; one that applies to some rollouts of a group and not to
others is refused. Between groups the rewards may differ: GRPO divides each group by its own spread,
so that verifiers (0 to 1) and POLAR (unbounded) can stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from polarctl.errors import PolarctlError
from polarctl.scoring.reward_function import normalise_group

Values = Mapping[str, Sequence[float | None]]
How = Literal["sum", "gate", "zsum"]


def combined(
    values: Values,
    weights: Mapping[str, float],
    how: How,
    *,
    gates: frozenset[str] = frozenset(),
    models: frozenset[str] = frozenset(),
) -> list[float]:
    """One number for each rollout of a group.

    Args:
        values: Reward name to its values, one for each rollout; None: not applicable.
        weights: Reward name to its factor.
        how: `sum`: the sum of weight times value, over the rewards that apply. `gate`: the same
            without `models` where one of `gates` applies. `zsum`: the sum of weight times (value -
            mean) / standard deviation within the group; a reward that is equal for all adds 0.
        gates: Names of the verifiers that compare with a truth.
        models: Names of the reward models.

    Raises:
        PolarctlError: No reward applies, or one applies to a part of the group.
    """
    applying: dict[str, list[float]] = {}
    for name, column in values.items():
        known = [value for value in column if value is not None]
        if known and len(known) < len(column):
            raise PolarctlError(
                f"`{name}` applies to {len(known)} of {len(column)} rollouts of one prompt: their "
                "rewards cannot be compared",
                hint="what is not applicable must depend on the record, not on the output",
            )
        if known:
            applying[name] = known
    if how == "gate" and not gates.isdisjoint(applying):
        applying = {name: column for name, column in applying.items() if name not in models}
    if not applying:
        raise PolarctlError(f"none of the rewards applies ({', '.join(values)})")
    if how == "zsum":
        size = len(next(iter(applying.values())))
        applying = {
            name: normalise_group(column, "zscore") if size > 1 else [0.0] * size
            for name, column in applying.items()
        }
    return [
        math.fsum(weights[name] * value for name, value in zip(applying, row, strict=True))
        for row in zip(*applying.values(), strict=True)
    ]


def overlong_penalty(tokens: int, longest: int, buffer: int) -> float:
    """DAPO's soft penalty of a long rollout (arXiv 2503.14476, equation 13), from 0 to -1.

    0 up to `longest - buffer` tokens, then falling on a straight line to -1 at `longest`.

    Args:
        tokens: Of the rollout.
        longest: Most that it may have.
        buffer: Tokens over which the penalty grows.
    """
    return max(-1.0, min(0.0, (longest - buffer - tokens) / buffer))
