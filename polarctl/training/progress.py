"""What is said of a run while it goes: speed, what is left, and other people's dashboards."""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polarctl import console
from polarctl.errors import MissingError, UsageError
from polarctl.training import flops

TRACKERS = ("tensorboard", "wandb", "trackio")
_WINDOW_STEPS = 50


def peak_of(accelerator: Any, *, half: bool) -> float | None:
    """FLOP/s of all devices of a run together at best, or None where it is not known.

    Args:
        accelerator: Knows devices and processes.
        half: Computing in bfloat16.
    """
    if accelerator.device.type != "cuda":
        return None
    import torch

    peak = flops.peak(torch.cuda.get_device_name(accelerator.device), half=half)
    return None if peak is None else peak * accelerator.num_processes


class Meter:
    """Tokens a second over the last steps, and the time that is left.

    Effective tokens are those of all candidates as whole sequences; computed ones went through the
    model, which is fewer where prefixes are shared.

    Args:
        parameters: Weights without the input embedding, for the MFU.
        peak: FLOP/s of all devices together at best, or None where it is not known.
        clock: Seconds.
    """

    def __init__(
        self,
        *,
        parameters: int,
        peak: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.parameters, self.peak, self.clock = parameters, peak, clock
        self.start = clock()
        # Of the last steps: time, effective and computed tokens so far.
        self.points = deque([(self.start, 0, 0)], maxlen=_WINDOW_STEPS + 1)
        self.steps_left = self.steps_done = 0

    def update(self, step: int, steps: int, effective: int, computed: int) -> None:
        """Count a step.

        Args:
            step: Steps done, in earlier runs too.
            steps: Steps of the whole run.
            effective: Effective tokens of this step.
            computed: Computed tokens of this step.
        """
        _, before, through = self.points[-1]
        self.points.append((self.clock(), before + effective, through + computed))
        self.steps_left, self.steps_done = steps - step, self.steps_done + 1

    @property
    def effective_per_s(self) -> float:
        """Effective tokens a second."""
        return self._rate(1)

    @property
    def computed_per_s(self) -> float:
        """Computed tokens a second."""
        return self._rate(2)

    @property
    def mfu(self) -> float | None:
        """Share of the peak that is used (see `polarctl.training.flops`), or None."""
        if self.peak is None:
            return None
        return flops.mfu(self.computed_per_s, self.parameters, self.peak)

    @property
    def eta_s(self) -> float:
        """Seconds that the remaining steps take at this speed."""
        seconds = self.points[-1][0] - self.points[0][0]
        return seconds / max(1, len(self.points) - 1) * self.steps_left

    def _rate(self, column: int) -> float:
        (begin, *old), (end, *new) = self.points[0], self.points[-1]
        return (new[column - 1] - old[column - 1]) / max(end - begin, 1e-9)

    def rates(self) -> dict[str, float]:
        """The speeds, by name."""
        found = {
            "tokens_per_s": self.computed_per_s,
            "effective_tokens_per_s": self.effective_per_s,
        }
        return found if self.mfu is None else {**found, "mfu": self.mfu}

    def summary(self) -> dict[str, float]:
        """Seconds of this run's steps, and the speeds at its end."""
        if not self.steps_done:
            return {}
        return {"seconds": self.points[-1][0] - self.start, **self.rates()}

    def line(self, loss: float, accuracy: float) -> str:
        """The state in a line."""
        parts = [
            f"loss {loss:.4f} accuracy {accuracy:.3f}",
            f"{_short(self.computed_per_s)} tok/s ({_short(self.effective_per_s)} effective)",
        ]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.0%}")
        if self.steps_left:
            parts.append(f"{console.duration(self.eta_s)} left")
        return " | ".join(parts)


def _short(number: float) -> str:
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


class Trackers:
    """Dashboards that get the figures of every step, through accelerate.

    Args:
        names: `tensorboard`, `wandb` or `trackio`.
        folder: The run's output folder; TensorBoard's files go to `runs/` in it, wandb's
            to `wandb/`; trackio keeps its own in the user's cache.
        config: The options of the run, plain values.
        run_name: Its name there.

    Raises:
        UsageError: No such tracker.
        MissingError: Its package is not installed.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], *, run_name: str
    ):
        check_trackers(names)
        from accelerate import PartialState, tracking

        PartialState(cpu=True)  # the trackers ask it for the rank; a run that has one keeps it
        makers: dict[str, Callable[[], Any]] = {
            "tensorboard": lambda: tracking.TensorBoardTracker("runs", logging_dir=folder),
            "wandb": lambda: tracking.WandBTracker("polarctl", name=run_name, dir=str(folder)),
            "trackio": lambda: tracking.TrackioTracker("polarctl", name=run_name),
        }
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
        self.trackers = [makers[name]() for name in dict.fromkeys(names)]
        for tracker in self.trackers:
            tracker.start()
            tracker.store_init_configuration(plain)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Give the figures of a step."""
        figures = {name: value for name, value in values.items() if name != "step"}
        for tracker in self.trackers:
            tracker.log(figures, step=step)

    def close(self) -> None:
        """Let them finish."""
        for tracker in self.trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker that does not exist, MissingError for one not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"`--report-to {name}`: unknown", hint=f"one of {', '.join(TRACKERS)}")
        spec = importlib.util.find_spec(name)
        # No origin: a mere folder of this name, such as the one that wandb leaves where it ran.
        if spec is None or spec.origin is None:
            raise MissingError(
                f"`--report-to {name}`: its package is not installed", hint=f"pip install {name}"
            )
