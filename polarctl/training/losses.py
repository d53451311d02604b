"""Losses of the reward model, pure functions of tensors.

Shapes: B pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LIMIT = 5.0  # of the log barrier
_EDGE = 1e-3  # how near to it a reward counts


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Return the Bradley-Terry loss of each pair, `-log sigmoid(chosen - rejected - margin)`.

    Without a margin this is the POLAR objective, in pre-training and in fine-tuning (arXiv
    2507.05197): no temperature, no symmetric term. It is not reduced, because only the training
    loop knows the number of pairs of a whole step. ln 2 for equal rewards; never negative.

    Args:
        chosen: Rewards of the chosen trajectories. Shape: (B,).
        rejected: Rewards of the rejected trajectories. Shape: (B,).
        margin: By how much they should differ; of each pair, Shape: (B,), or of all.

    Returns:
        Loss per pair, at least in float32: the difference of near rewards does not survive
        bfloat16. Shape: (B,).

    Raises:
        ValueError: The shapes differ.
    """
    return -F.logsigmoid(_difference(chosen, rejected, margin))


def focal(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Return InternLM2's focal ranking loss, `-(1 - 2 max(0, P - 1/2))^2 log P`.

    P = sigmoid(chosen - rejected - margin). A pair that is ranked right counts the less the surer
    it is; one that is ranked wrong counts as in Bradley-Terry. Source: arXiv 2403.17297, section
    on the conditional reward model.

    Args:
        chosen: Rewards of the chosen trajectories. Shape: (B,).
        rejected: Rewards of the rejected trajectories. Shape: (B,).
        margin: By how much they should differ; of each pair, Shape: (B,), or of all.

    Returns:
        Loss per pair, at least in float32. Shape: (B,).

    Raises:
        ValueError: The shapes differ.
    """
    difference = _difference(chosen, rejected, margin)
    # 1 - 2 (P - 1/2) = 2 (1 - P) = 2 sigmoid(-d): as a difference it would lose all its digits.
    weight = (2 * torch.sigmoid(-difference)).clamp(max=1.0)
    return -weight.square() * F.logsigmoid(difference)


def barrier(rewards: Tensor) -> Tensor:
    """Return the log barrier of each reward, `-(log(x + 5) + log(5 - x))`.

    It keeps rewards between -5 and 5 (arXiv 2403.17297). As in xtuner's code rewards count as
    within 0.001 of the limits: the first one beyond would be NaN otherwise, and end the training.

    Args:
        rewards: Rewards. Shape: (B,).

    Returns:
        At least float32, from -3.22 (at 0) up. Shape: (B,).
    """
    x = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    x = x.clamp(-_LIMIT + _EDGE, _LIMIT - _EDGE)
    return -(torch.log(x + _LIMIT) + torch.log(_LIMIT - x))


def l2(rewards: Tensor) -> Tensor:
    """Return the square of each reward, at least float32. Shape: (B,)."""
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32)).square()


RANKINGS = {"bradley-terry": bradley_terry, "focal": focal}
PENALTIES = {"none": None, "barrier": barrier, "l2": l2}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a pair: how it is ranked, and a penalty on both of its rewards.

    Attributes:
        ranking: "bradley-terry" or "focal".
        margin: By how much every pair should differ.
        penalty: "none", "barrier" or "l2".
        penalty_weight: Weight of the penalty, at least 0.

    Raises:
        ValueError: No such ranking or penalty, or a weight below 0.
    """

    ranking: str = "bradley-terry"
    margin: float = 0.0
    penalty: str = "none"
    penalty_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("loss", self.ranking, RANKINGS),
            ("penalty", self.penalty, PENALTIES),
        ):
            if value not in choices:
                raise ValueError(f"{name} `{value}`: one of {', '.join(choices)}")
        if self.penalty_weight < 0:
            raise ValueError(f"penalty weight {self.penalty_weight}: at least 0")

    def __call__(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """The loss of each pair, not reduced.

        Args:
            chosen: Rewards of the chosen trajectories. Shape: (B,).
            rejected: Rewards of the rejected trajectories. Shape: (B,).
            margin: What the records ask for beside the constant. Shape: (B,), or None.

        Returns:
            At least float32. Shape: (B,).

        Raises:
            ValueError: The shapes differ.
        """
        asked = self.margin if margin is None else margin + self.margin
        loss = RANKINGS[self.ranking](chosen, rejected, asked)
        penalty = PENALTIES[self.penalty]
        if penalty is None or not self.penalty_weight:
            return loss
        return loss + self.penalty_weight * (penalty(chosen) + penalty(rejected))


PRESETS: dict[str, Loss] = {
    "polar": Loss(),
    "internlm2": Loss(ranking="focal", penalty="barrier", penalty_weight=0.02),
    "xtuner": Loss(ranking="focal", penalty="barrier", penalty_weight=0.01),
}


def _difference(chosen: Tensor, rejected: Tensor, margin: Tensor | float) -> Tensor:
    _check_pairs(chosen, rejected)
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    if isinstance(margin, Tensor):
        if margin.shape != chosen.shape:  # it would broadcast as in `_check_pairs`
            shapes = f"{tuple(margin.shape)} for rewards of {tuple(chosen.shape)}"
            raise ValueError(f"a margin must have the shape of the rewards, got {shapes}")
        margin = margin.to(dtype)
    return chosen.to(dtype) - rejected.to(dtype) - margin


def _check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    # (B,) against (B, 1) would broadcast to all B * B pairs and train on nonsense without a word.
    if chosen.shape != rejected.shape:
        shapes = f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        raise ValueError(f"chosen and rejected must have one shape, got {shapes}")
