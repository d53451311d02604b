"""What one look at one output may take."""

from __future__ import annotations

from dataclasses import dataclass

TIMEOUT_S, MEMORY_GIB = 10.0, 4.0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of a verifier's program.

    Attributes:
        timeout_s: Seconds.
        memory_gib: Address space in GiB.
    """

    timeout_s: float = TIMEOUT_S
    memory_gib: float = MEMORY_GIB
