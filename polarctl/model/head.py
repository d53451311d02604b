"""The reward head, in float32 whatever the model is in.

Half precision has 8 bits: rewards near -10 would lie on a grid of 0.0625, and tie.

Shapes: B sequences, E width of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def head(model: Any, states: Tensor) -> Tensor:
    """Rewards of hidden states, in float32 at least, whatever the model and autocast compute in.

    Args:
        model: A `...ForSequenceClassification`.
        states: Hidden states at the reward tokens. Shape: (B, E).

    Returns:
        Shape: (B,).
    """
    for part in model.score.modules():  # LoRA keeps the head in a wrapper
        if type(part) is nn.Linear:
            part.__class__ = _WideLinear
    with torch.autocast(states.device.type, enabled=False):
        values: Tensor = model.score(states).squeeze(-1)
    return values


class _WideLinear(nn.Linear):
    """A linear layer that computes in float32 at least.

    The cast is in here, and not around the call, because ZeRO-3 gathers weights for the call only.
    """

    def forward(self, states: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return nn.functional.linear(states.to(wide), self.weight.to(wide), bias)
