"""Work for tests of `polarctl.parallel.ray_pool`: does what an item tells, on any machine."""

import os
import signal
import sys
import time
from pathlib import Path

from polarctl.errors import RecordError


class Told:
    """Called with (number, what to do). Writes a line to `folder`/seen for each call."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.calls = 0

    def __call__(self, item):
        number, what, *more = item
        with open(self.folder / "seen", "a") as seen:
            seen.write(f"{number} {os.getpid()}\n")
        if what == "wait":
            while not (self.folder / "go").exists():
                time.sleep(0.02)
        elif what == "meet":  # another process that has an item
            while len({line.split()[1] for line in open(self.folder / "seen")}) < 2:
                time.sleep(0.02)
        elif what == "die-once":
            mark = self.folder / f"died-{number}"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "bad":
            raise RecordError("missing field `x`", where="in.jsonl:7", hint="look")
        elif what == "fault":
            raise ZeroDivisionError("a fault")
        elif what == "say":
            sys.stderr.write("dtype: float32 (as told)\n")
        self.calls += 1
        if what == "large":
            return number, "x" * more[0]
        return number, number * number

    def close(self):
        with open(self.folder / "closed", "a") as closed:
            closed.write(f"{os.getpid()} {self.calls}\n")


def broken(part):
    """As `read` of `polarctl.parallel.ray_data.Grouped`."""
    raise ZeroDivisionError("a fault")
