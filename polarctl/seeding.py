"""One seed becomes a seed per record, per sample and per rank, whatever the order of the work.

A record's random choices depend on the run's seed and the record's identity alone, never on its
position, batch, shard or worker, so that any way of cutting the work gives the same result.
"""

from __future__ import annotations

import hashlib
import random


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit seed from `seed` and the names of what it is for.

    Args:
        seed: The run's seed.
        *parts: Record id, sample index, rank, purpose, ...; their order matters.

    Returns:
        An integer in [0, 2**63), equal on every platform and Python version.
    """
    digest = hashlib.blake2b(repr((int(seed), *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(seed: int, *parts: str | int) -> random.Random:
    """A `random.Random` seeded by `derive`."""
    return random.Random(derive(seed, *parts))
