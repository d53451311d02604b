"""How much of a GPU's peak a run uses (MFU), by the convention of 6 N FLOPs a token.

N counts all weights but those of the input embedding, which are looked up and not multiplied. The
attention scores and the second forward pass of gradient checkpointing are not counted, so figures
of other projects with the same convention compare.
"""

from __future__ import annotations

import re

# Dense peak in FLOP/s by words of the device's name, from the vendor's data sheets: bfloat16 (and
# float16) by tensor cores without sparsity, float32 without TF32. The first match counts.
_PEAKS = (
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H200 NVL", 835e12, 60e12),
    ("H800 PCIe", 756e12, 51e12),
    ("H200", 989e12, 67e12),
    ("H100", 989e12, 67e12),
    ("H800", 989e12, 67e12),
    ("B200", 2250e12, 80e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("A10", 125e12, 31.2e12),
    ("RTX 4090", 165e12, 82.6e12),
)
# Slower things under the same name: a slice of a GPU, a notebook's, and the RTX 4090 D.
_LESS = re.compile(r"\bMIG\b|\bLaptop\b|4090 D\b", re.IGNORECASE)


def per_token(parameters: float) -> float:
    """FLOPs of training a token, forward and backward: 6 N.

    Args:
        parameters: Weights without the input embedding, N.
    """
    return 6 * parameters


def peak(device_name: str, *, half: bool) -> float | None:
    """A device's dense peak in FLOP/s, or None where it is not known (a CPU, a new GPU).

    Args:
        device_name: `torch.cuda.get_device_name()`.
        half: In bfloat16 or float16, else in float32.
    """
    if _LESS.search(device_name):
        return None
    for words, fast, exact in _PEAKS:
        if re.search(rf"\b{words}\b", device_name, re.IGNORECASE):  # RTX A1000 is not an A100
            return fast if half else exact
    return None


def mfu(tokens_per_s: float, parameters: float, peak: float) -> float:
    """Share of the peak that a run uses, from 0 to 1.

    Args:
        tokens_per_s: Tokens that went through the model, each counted once.
        parameters: Weights without the input embedding, N.
        peak: FLOP/s of all devices together at best.
    """
    return tokens_per_s * per_token(parameters) / peak
