"""Losses of the reward model, pure functions of tensors.

Shapes: B pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the Bradley-Terry loss of each pair, `-log sigmoid(chosen - rejected)`.

    This is the POLAR objective, in pre-training and in fine-tuning (arXiv 2507.05197): no margin,
    no temperature, no symmetric term. It is not reduced, because only the training loop knows the
    number of pairs of a whole step. ln 2 for equal rewards; never negative.

    Args:
        chosen: Rewards of the chosen trajectories. Shape: (B,).
        rejected: Rewards of the rejected trajectories. Shape: (B,).

    Returns:
        Loss per pair, at least in float32: the difference of near rewards does not survive
        bfloat16. Shape: (B,).

    Raises:
        ValueError: The shapes differ.
    """
    _check_pairs(chosen, rejected)
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    return -F.logsigmoid(chosen.to(dtype) - rejected.to(dtype))


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the fraction of pairs with `chosen > rejected`; a tie or a NaN counts as wrong.

    Args:
        chosen: Rewards of the chosen trajectories. Shape: (B,), B at least 1.
        rejected: Rewards of the rejected trajectories. Shape: (B,).

    Returns:
        A float32 in [0, 1], without gradient. Shape: ().

    Raises:
        ValueError: The shapes differ.
    """
    _check_pairs(chosen, rejected)
    return (chosen > rejected).float().mean()


def _check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    # (B,) against (B, 1) would broadcast to all B * B pairs and train on nonsense without a word.
    if chosen.shape != rejected.shape:
        shapes = f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        raise ValueError(f"chosen and rejected must have one shape, got {shapes}")
