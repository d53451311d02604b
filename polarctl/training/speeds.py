"""What is known of GPUs before a run: their memory, and how fast others have trained on them.

None of these speeds was measured with this program: they are published figures of dense training,
or worked out from one. They say what order of magnitude to expect.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_GIB = 2**30
# What torch reports as the total of the usual card of this name.
MEMORY = {
    "A100": 79 * _GIB,
    "A800": 79 * _GIB,
    "B200": 178 * _GIB,
    "H100": 79 * _GIB,
    "H200": 139 * _GIB,
    "H800": 79 * _GIB,
    "L40S": 44 * _GIB,
}
_RANGE = 2.0  # how far a model may be from a published one in size


@dataclass(frozen=True)
class Speed:
    """Training at some speed.

    Attributes:
        tokens_per_s: Tokens through the model a second, on one GPU.
        source: Who says so.
    """

    tokens_per_s: float
    source: str


_POLAR = "POLAR's pre-training, worked out from arXiv 2507.05197"
_FOUNDRY = "dense training on 8 GPUs at length 4,096, llm-foundry scripts/train/benchmarking"
# GPU, weights, tokens a second of one GPU, source. The two on H800 are 0.94e12 tokens in 57 h on
# 320 GPUs and 3.6e12 tokens in 175 h on 912.
_PUBLISHED = (
    ("H800", 1.8e9, 14_300, _POLAR),
    ("H800", 7e9, 6_300, _POLAR),
    ("H100", 0.76e9, 55_459, _FOUNDRY),
    ("H100", 1.32e9, 38_535, _FOUNDRY),
    ("H100", 2.66e9, 20_964, _FOUNDRY),
    ("H100", 6.67e9, 8_611, _FOUNDRY),
    ("H100", 12.9e9, 4_717, _FOUNDRY),
    ("A100", 0.36e9, 49_555, _FOUNDRY),
    ("A100", 0.76e9, 27_351, _FOUNDRY),
    ("A100", 1.32e9, 17_807, _FOUNDRY),
    ("A100", 2.66e9, 9_457, _FOUNDRY),
    ("A100", 6.67e9, 3_684, _FOUNDRY),
    ("A100", 12.9e9, 2_060, _FOUNDRY),
    ("H200", 8e9, 10_471, "dense training at length 4,096, KempnerForge mfu_scaling.md"),
)


def published(gpu: str, parameters: float) -> Speed | None:
    """What somebody has published for a GPU and a model of about this size, or None.

    A speed is carried over to another size by 6 N FLOPs a token, up to a factor of two.

    Args:
        gpu: A name such as `H100` or `NVIDIA H100 80GB HBM3`.
        parameters: Weights of the model.
    """
    near = [
        (max(size / parameters, parameters / size), size, rate, source)
        for name, size, rate, source in _PUBLISHED
        if re.search(rf"\b{name}\b", gpu, re.IGNORECASE)
    ]
    if not near or min(near)[0] > _RANGE:
        return None
    _, size, rate, source = min(near)
    return Speed(rate * size / parameters, source)
