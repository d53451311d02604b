"""What a scoring run says at its end: how the rewards are spread, and how fast it went."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable

from polarctl import console


class Summary:
    """Collects the raw rewards of this run, 8 bytes each; not those from before a resume."""

    def __init__(self) -> None:
        self.rewards = array("d")
        self.records = self.tokens = 0
        self.start = time.monotonic()

    def add(self, records: int, rewards: Iterable[float], tokens: int) -> None:
        """Count some scored records."""
        self.records += records
        self.tokens += tokens
        self.rewards.extend(rewards)

    def say(self) -> None:
        """Say mean, standard deviation, range and quartiles, and the throughput."""
        if not self.rewards:
            return
        import numpy as np

        values = np.frombuffer(self.rewards)
        low, first, middle, third, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
        seconds = max(time.monotonic() - self.start, 1e-9)
        console.note(
            f"rewards: {len(values):,}, mean {values.mean():.4g}, standard deviation "
            f"{values.std():.4g}; least {low:.4g}, quartiles {first:.4g}, {middle:.4g}, "
            f"{third:.4g}, largest {high:.4g}",
            rewards=len(values),
            mean=float(values.mean()),
            standard_deviation=float(values.std()),
            quantiles=[low, first, middle, third, high],
        )
        tokens = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        console.note(
            f"speed: {self.records:,} records in {seconds:.1f} s, loading included: "
            f"{self.records / seconds:,.1f} records/s, {len(values) / seconds:,.1f} "
            f"rewards/s{tokens}",
            seconds=seconds,
        )
