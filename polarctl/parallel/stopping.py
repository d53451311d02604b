"""When a training run saves its state, and stops: at a signal, or by the clock.

Both happen after the step in hand, and in all processes after the same step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polarctl import console
from polarctl.errors import Interrupted
from polarctl.parallel import rank

if TYPE_CHECKING:
    from torch import Tensor


class SaveClock:
    """Says when so many minutes have gone by since the last checkpoint.

    Args:
        minutes: How many; 0: never.
        clock: Seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = 60 * minutes, clock
        self.restart()

    def restart(self) -> None:
        """A checkpoint has just been written."""
        self.last = self.clock()

    @property
    def due(self) -> bool:
        """Whether it is time for the next one."""
        return 0 < self.seconds <= self.clock() - self.last


class StopFlag:
    """SIGTERM or Ctrl-C lets the step in hand finish, so that what is saved is whole.

    A second Ctrl-C ends the process at once.

    Attributes:
        asked: Number of the signal that asks to stop; 0: none has.
    """

    asked = 0

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self.asked == signal.SIGINT:
                os._exit(130)
            console.note_at_once("stopping after this step; Ctrl-C again ends it at once")
        self.asked = number

    def __enter__(self) -> StopFlag:
        self.before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(
        self, clock: SaveClock, add: Callable[[Tensor], Tensor] | None, device: Any
    ) -> tuple[int, bool]:
        """What all processes of the run do after this step.

        Every process calls it. A signal counts whichever process was sent it; of the clocks, which
        differ, only that of the first process does.

        Args:
            clock: When the next checkpoint is due.
            add: Sums a tensor over all processes; None: there is one process.
            device: Where that tensor has to be.

        Returns:
            The signal at which all stop, or 0; and whether the clock asks for a checkpoint.
        """
        if add is None:
            return self.asked, clock.due
        import torch

        signals = (signal.SIGINT, signal.SIGTERM)
        own = [*(self.asked == number for number in signals), clock.due and rank.is_first()]
        *seen, save = add(torch.tensor(own, dtype=torch.float32, device=device)).tolist()
        found = [number for number, count in zip(signals, seen, strict=True) if count]
        return (found[0] if found else 0), save > 0


def stopped(number: int, step: int, steps: int) -> Interrupted:
    """The error of a training run that a signal has stopped after a step; its state is saved."""
    by_hand = number == signal.SIGINT
    return Interrupted(
        f"stopped by {'Ctrl-C' if by_hand else 'SIGTERM'} after step {step} of {steps}",
        hint="the same command goes on from here",
        exit_status=130 if by_hand else 75,
    )
