"""How often the tests of faults are run, from which seed, and points at which a process dies.

`FAULTS=full` (`make test-faults`) takes the full counts; without it a few of each are tried.
`FAULTS_SEED=7` tries others. A test that fails prints what makes it fail again.
"""

import contextlib
import hashlib
import os
import random
import resource
import signal
from pathlib import Path

FULL = os.environ.get("FAULTS") == "full"
SEED = int(os.environ.get("FAULTS_SEED", "0"))


def count(few: int, full: int) -> int:
    """How often to try."""
    return full if FULL else few


def draws(name: str) -> random.Random:
    """Random numbers for a test, from the seed and its name; says how to have them again."""
    full = "FAULTS=full " if FULL else ""
    print(f"{name}: again with {full}FAULTS_SEED={SEED}")
    return random.Random(f"{SEED} {name}")


def report(name: str, **counts: int) -> None:
    """Add a line of figures to the file that `FAULTS_REPORT` names."""
    line = f"{name}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items())
    print(line)
    if path := os.environ.get("FAULTS_REPORT"):
        with open(path, "a") as stream:
            stream.write(line + "\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- in the process that dies ---------------------------------------------------------------------

_OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir")


def die_at(number: int, *, after: bool) -> None:
    """SIGKILL this process before or after its file operation of that number, from 0."""
    seen = -1

    def wrapped(real):
        def operation(*arguments, **options):
            nonlocal seen
            seen += 1
            mine = seen == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation

    for name in _OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))


def die_beyond(size: int) -> None:
    """Have the system kill this process when a file would grow beyond a size, in a write.

    The bytes up to that size reach the file.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def count_operations(path: str) -> None:
    """Leave a file with a byte for each file operation of this process."""
    stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def wrapped(real):
        def operation(*arguments, **options):
            os.write(stream, b".")
            return real(*arguments, **options)

        return operation

    for name in _OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))


def is_gone(child: int) -> bool:
    """Whether a process has ended, though nobody has waited for it yet."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f"/proc/{child}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    return True
