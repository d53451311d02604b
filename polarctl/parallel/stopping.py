"""How SIGTERM and Ctrl-C stop a training run: after the step in hand, with its state saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polarctl import console
from polarctl.errors import Interrupted

if TYPE_CHECKING:
    from torch import Tensor


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

    def agreed(self, add: Callable[[Tensor], Tensor] | None, device: Any) -> int:
        """The signal that any process of the run was sent: all stop after the same step.

        Args:
            add: Sums a tensor over all processes; None: there is one process.
            device: Where that tensor has to be.
        """
        if add is None:
            return self.asked
        import torch

        signals = (signal.SIGINT, signal.SIGTERM)
        seen = torch.tensor([float(self.asked == number) for number in signals], device=device)
        found = [number for number, count in zip(signals, add(seen).tolist(), strict=True) if count]
        return found[0] if found else 0


def stopped(number: int, step: int, steps: int) -> Interrupted:
    """The error of a training run that a signal has stopped after a step; its state is saved."""
    by_hand = number == signal.SIGINT
    return Interrupted(
        f"stopped by {'Ctrl-C' if by_hand else 'SIGTERM'} after step {step} of {steps}",
        hint="the same command goes on from here",
        exit_status=130 if by_hand else 75,
    )
