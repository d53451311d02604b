"""The paper's law of the hyper-parameters of pre-training.

Source: arXiv 2507.05197. It says "in millions"; its own values come out with model sizes in units
of 2^20 and tokens in units of 2^30.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_SIZE, _TOKENS = 2.0**20, 2.0**30
_SUFFIX = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
# POLAR-7B, the largest model that was trained by it, has 7.4e9 weights.
_FITTED_SIZES, _FITTED_TOKENS = (50e6, 7.5e9), (1e9, 3.6e12)


def learning_rate(parameters: float, base_tokens: float, tokens: float) -> float:
    """Peak learning rate, `0.0002306 N^0.01125 D_p^-0.66587 D_r^0.33916`.

    Args:
        parameters: Weights of the reward model, N, above 0.
        base_tokens: Tokens that its base model was pre-trained on, D_p, above 0.
        tokens: Tokens of the reward model's pre-training, D_r, above 0.
    """
    size, base, own = parameters / _SIZE, base_tokens / _TOKENS, tokens / _TOKENS
    return float(0.0002306 * size**0.01125 * base**-0.66587 * own**0.33916)


def batch_size(parameters: float, tokens: float) -> float:
    """Triples of a batch, `31.9032 N^0.06944 D_r^0.52997`; arguments as of `learning_rate`."""
    return float(31.9032 * (parameters / _SIZE) ** 0.06944 * (tokens / _TOKENS) ** 0.52997)


@dataclass(frozen=True, kw_only=True)
class Law:
    """Hyper-parameters by the law, and what went in; see `of`."""

    lr: float
    batch_size: int
    parameters: float
    base_tokens: float
    tokens: float

    @classmethod
    def of(cls, parameters: float, base_tokens: float, tokens: float) -> Law:
        """The law's values; arguments as of `learning_rate`."""
        return cls(
            lr=learning_rate(parameters, base_tokens, tokens),
            batch_size=max(1, round(batch_size(parameters, tokens))),
            parameters=parameters,
            base_tokens=base_tokens,
            tokens=tokens,
        )

    def explain(self) -> str:
        """The numbers that went in."""
        return (
            f"N = {self.parameters:.4g} weights, D_p = {self.base_tokens:.4g} tokens of the base "
            f"model, D_r = {self.tokens:.4g} tokens of this run"
        )

    def outside(self) -> str:
        """Why the law says little here, in words; empty when it does."""
        beyond = [
            f"{what} from {low:.3g} to {high:.3g}"
            for what, value, (low, high) in (
                ("N", self.parameters, _FITTED_SIZES),
                ("D_r", self.tokens, _FITTED_TOKENS),
            )
            if not low <= value <= high
        ]
        return f"extrapolated: it was fitted for {' and '.join(beyond)}" if beyond else ""


def parse_tokens(text: str | float) -> float:
    """A number of tokens: `2.5T`, `940B`, `1e12`, `30M`, or a plain number.

    Raises:
        ValueError: Not such a number, or not more than 0.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMBGT]?)\s*", str(text).upper())
    try:
        value = float(found[1]) * _SUFFIX[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError("not a number of tokens such as 2.5T or 1e12")
    return value
