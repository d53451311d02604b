"""How far each policy of a run is: samples done, running and failed, tokens a second, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polarctl import console
from polarctl.policies.filters import REASONS
from polarctl.policies.pool import Policy

_SHOWN_RUNNING = 3  # policies that a line names
# A column of the last table for each of these counts.
_MARKS = {"loop": "Loops cut", "incomplete": "Ends cut", "refusal": "Refusals"}
HEAD = ("Policy", "Done", "Running", "Failed", "Tokens/s", "Left")
# Of few words: a log is 80 columns wide.
_LAST_HEAD = ("Policy", "Texts", "Failed", *_MARKS.values(), "Tokens/s")


@dataclass
class _Course:
    """One policy: samples in all, finished, handed out, and when; times of this run."""

    total: int
    samples: int  # per prompt
    done: int = 0
    before: int = 0  # done by an earlier run
    running: int = 0
    tokens: int = 0
    begun: float | None = None
    last: float = 0.0

    def left_s(self) -> float | None:
        """Seconds that it needs yet, at its own speed, or None where that is not known."""
        if self.begun is None or self.done == self.before:
            return None
        return (self.total - self.done) * (self.last - self.begun) / (self.done - self.before)

    def rate(self) -> float | None:
        """Tokens a second, from its first unit of work, loading included, to its last."""
        if self.begun is None or self.last <= self.begun:
            return None
        return self.tokens / (self.last - self.begun)


class Status:
    """Watches a run, unit of work by unit of work.

    Args:
        prompts: For each policy the prompts that it is asked.
        tallies: Policy name to its counts, as they are kept for the manifest.

    Attributes:
        total: Samples to be made, those of prompts that a policy cannot take included.
        done: Those that are finished.
    """

    def __init__(
        self, prompts: Sequence[tuple[Policy, int]], tallies: Mapping[str, Mapping[str, int]]
    ):
        self._tallies = tallies
        self._courses = {
            policy.name: _Course(total=count * policy.samples, samples=policy.samples)
            for policy, count in prompts
        }
        self.total = sum(course.total for course in self._courses.values())
        self.done = 0
        self._latest: str | None = None

    def skip(self, policy: Policy, prompts: int) -> None:
        """An earlier run has done so many of the policy's prompts."""
        course = self._courses[policy.name]
        course.done += prompts * course.samples
        course.before = course.done
        self.done += prompts * course.samples

    def begin(self, policy: Policy, prompts: int) -> None:
        """A unit of work of so many prompts is handed out."""
        course = self._courses[policy.name]
        course.running += prompts * course.samples
        if course.begun is None:
            course.begun = time.monotonic()

    def end(self, policy: Policy, prompts: int, tokens: int) -> None:
        """A unit of work is back."""
        course = self._courses[policy.name]
        course.running -= prompts * course.samples
        course.done += prompts * course.samples
        course.tokens += tokens
        course.last = time.monotonic()
        self._latest = policy.name
        self.done += prompts * course.samples

    def failed(self, name: str) -> int:
        """Samples that gave no record: without text, or of prompts that the policy cannot take."""
        tally = self._tallies.get(name, {})
        return tally.get("empty", 0) + tally.get("unfit", 0) * self._courses[name].samples

    def idle(self) -> list[str]:
        """Policies that are asked nothing, as texts in a message."""
        return [f"`{name}`" for name, course in self._courses.items() if not course.total]

    def line(self) -> str:
        """The policies that are at work, in a few words."""
        busy = self._at_work()
        parts = []
        for name, course in busy[:_SHOWN_RUNNING]:
            words = [f"{name}: {course.done:,}/{course.total:,}"]
            if failed := self.failed(name):
                words.append(f"{failed:,} failed")
            if (rate := course.rate()) is not None:
                words.append(f"{rate:,.0f} tokens/s")
            if (left := course.left_s()) is not None:
                words.append(f"{console.duration(left)} left")
            parts.append(", ".join(words))
        if len(busy) > _SHOWN_RUNNING:
            parts.append(f"{len(busy) - _SHOWN_RUNNING} more policies")
        return "; ".join(parts)

    def running(self) -> list[tuple[str, ...]]:
        """Rows under `HEAD`: the policies that are at work."""
        return [
            (
                name,
                f"{course.done:,}/{course.total:,}",
                f"{course.running:,}",
                f"{self.failed(name):,}",
                _number(course.rate()),
                "-" if (left := course.left_s()) is None else console.duration(left),
            )
            for name, course in self._at_work()
        ]

    def _at_work(self) -> list[tuple[str, _Course]]:
        """Policies with units of work handed out; between two units, the last one's."""
        found = [(name, course) for name, course in self._courses.items() if course.running]
        if not found and self._latest is not None:
            found = [(self._latest, self._courses[self._latest])]
        return found

    def filtered(self) -> bool:
        """Whether a filter has left out a text."""
        return any(tally.get(why) for tally in self._tallies.values() for why in REASONS)

    def head(self) -> tuple[str, ...]:
        """Columns of `rows`."""
        return (*_LAST_HEAD, "Filtered") if self.filtered() else _LAST_HEAD

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of the last table: every policy. Its speed is that of this run."""
        return [
            (
                name,
                f"{tally.get('records', 0):,}",
                f"{self.failed(name):,}",
                *(_share(tally.get(mark, 0), tally.get("records", 0)) for mark in _MARKS),
                _number(course.rate()),
                *([f"{sum(tally.get(why, 0) for why in REASONS):,}"] if self.filtered() else []),
            )
            for name, course in self._courses.items()
            for tally in [self._tallies.get(name, {})]
        ]


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.1%})" if count else "0"


def _number(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}"
