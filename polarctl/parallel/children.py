"""The processes that a run is made of, seen by the one that has started them: start, wait, why.

Not through torchrun's agent: stopped by SIGTERM it forgets how its processes have ended and kills
them after 30 s, in the middle of a long save; and it knows only to the second which one was first.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from polarctl import console
from polarctl.errors import Interrupted, PolarctlError
from polarctl.parallel import rank

_POLL_S = 0.05
_RESUME = "the same command goes on from here"


class ProcessFailed(PolarctlError):
    """One of the processes failed; the exit status is its own.

    Args:
        message: Why.
        exit_status: Of that process.
        hint: What to do about it, or None.
    """

    def __init__(self, message: str, *, exit_status: int, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Words:
    """What a process said last (see `adopted.tell`); `at` is in ns of the machine's clock."""

    at: int
    status: int
    message: str
    hint: str | None
    trace: str


class Child:
    """One of the processes.

    Args:
        command: What it runs.
        environment: Its variables; RANK and WORLD_SIZE say its place.
        stdout: File descriptor of its stdout.
        threads_chosen: Whether OMP_NUM_THREADS was chosen for it.

    Raises:
        PolarctlError: It cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        *,
        stdout: int,
        threads_chosen: bool,
    ):
        self.name = f"process {environment['RANK']} of {environment['WORLD_SIZE']}"
        self._heard = b""
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        mark = f"{os.getpid()}:{write}:{int(threads_chosen)}"
        try:
            self.process = subprocess.Popen(
                command,
                env={**environment, rank.MARK: mark},
                stdout=stdout,
                pass_fds=(write,),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on
            )
        except OSError as error:
            os.close(self._pipe)
            raise PolarctlError(f"cannot start a process: {error.strerror}") from error
        finally:
            os.close(write)

    def status(self) -> int | None:
        """How it has ended, minus the signal if by one; None while it runs."""
        found = self.process.poll()
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._pipe, 1 << 16):  # a long text would block the process
                self._heard += part
        return found

    @property
    def words(self) -> Words | None:
        """Its last words so far."""
        line, end, _ = self._heard.partition(b"\n")
        return Words(**json.loads(line)) if end else None

    def stop(self) -> None:
        """Ask it to stop: it finishes its step and saves."""
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        """End it, and what it has started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        self.process.wait()
        os.close(self._pipe)


class Signals:
    """Counts SIGTERM and Ctrl-C while it is open; nothing happens but the counting.

    Only the main thread can take signals: elsewhere it counts nothing.
    """

    def __init__(self) -> None:
        self.count = {signal.SIGTERM: 0, signal.SIGINT: 0}

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count[signal.Signals(number)] += 1

    def __enter__(self) -> Signals:
        main = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self._take) for number in self.count if main}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def wait(children: Sequence[Child], signals: Signals, patience_s: float) -> None:
    """Wait until all processes have ended.

    A process that fails stops the others; so do SIGTERM and Ctrl-C, however long a save takes. A
    second signal kills them.

    Args:
        children: The processes.
        signals: Open.
        patience_s: Seconds for the others to end once one has failed, before they are killed.

    Raises:
        Interrupted: They were stopped by SIGTERM or Ctrl-C.
        ProcessFailed: One failed; the first one's message and exit status.
    """
    failure: BaseException | None = None
    stopped, deadline = False, float("inf")
    while True:
        ended = [child.status() for child in children]
        terms, interrupts = signals.count.values()
        if failure is None:  # only the first: those that are stopped then say why, too
            if any(ended):
                failure = _failure(children)
            elif terms + interrupts > 1:
                failure = Interrupted("stopped by SIGTERM", hint=_RESUME)
        if (failure is not None or terms or interrupts) and not stopped:
            stopped = True
            if interrupts:
                console.note("stopping after this step; Ctrl-C again ends it at once")
            for child in children:
                child.stop()
        if failure is not None:
            deadline = min(deadline, time.monotonic() + patience_s)
        if terms + interrupts > 1 or time.monotonic() > deadline:
            for child in children:
                child.kill()
        if None not in ended:
            break
        time.sleep(_POLL_S)
    if failure is not None and any(ended):
        if interrupts and isinstance(failure, Interrupted):
            # They were sent SIGTERM, which also ends a process that has not taken signals yet.
            raise Interrupted("stopped by Ctrl-C", hint=_RESUME, exit_status=130)
        raise failure


def _failure(children: Sequence[Child]) -> PolarctlError:
    """Why the processes fail, of which at least one has.

    What a process says as an error is never the consequence of a partner's end; a traceback may
    be, and then it says less than that end.
    """
    spoken = sorted(
        ((child, words) for child in children if (words := child.words)),
        key=lambda pair: pair[1].at,
    )
    for _, words in spoken:
        if not words.trace and words.status == Interrupted.exit_status:
            return Interrupted(words.message, hint=words.hint)
        if not words.trace:
            return ProcessFailed(words.message, exit_status=words.status, hint=words.hint)
    codes = [(child, code) for child in children if (code := child.status())]
    for child, code in codes:
        if code < 0:
            return _killed(child.name, -code)
    for child, words in spoken:
        sys.stderr.write(words.trace)
        return ProcessFailed(f"{child.name}: {words.message}", exit_status=words.status)
    child, code = codes[0]
    return ProcessFailed(f"{child.name} ended with status {code}", exit_status=code)


def _killed(name: str, number: int) -> PolarctlError:
    if number == signal.SIGTERM:  # it came before the process could take it
        return Interrupted("stopped by SIGTERM", hint=_RESUME)
    try:
        known = signal.Signals(number).name
    except ValueError:
        known = f"signal {number}"
    hint: str | None = _RESUME
    if number == signal.SIGKILL:
        hint = "mostly for want of memory: a smaller --batch-tokens, --workers or --shuffle-window"
    return ProcessFailed(f"{name} was killed by {known}", exit_status=1, hint=hint)
