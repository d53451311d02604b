"""Random numbers that depend on a seed and a step alone, many at a time."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Seeds: TypeAlias = NDArray[np.uint64]


def uniforms(seeds: Seeds, step: int) -> Floats:
    """One number in [0, 1) per seed for a step: output `step` of SplitMix64 from each seed.

    Counter-based: any step of any seed can be had alone. Source: Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64((step + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
