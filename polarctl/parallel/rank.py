"""This process among several: its rank, and its last words to the one that has started it.

Of several processes one fails first, and the others a moment later because they have lost a
partner. So each sends its last words through a pipe, and the one that started them says the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

MARK = "POLARCTL_PARENT"  # pid of the parent : pipe to it : whether it chose the threads

_pipe: int | None = None
threads_chosen = False


def adopt() -> None:
    """Make this process one of several, if `polarctl.parallel.launcher` has started it.

    An error that is not caught becomes its last words, instead of one traceback a process.
    """
    global _pipe, threads_chosen
    mark = os.environ.pop(MARK, None)  # not for programs that this one starts
    if mark is None or "RANK" not in os.environ:
        return
    parent, pipe, chosen = (int(part) for part in mark.split(":"))
    _die_with(parent)
    os.set_inheritable(pipe, False)
    _pipe, threads_chosen = pipe, bool(chosen)
    sys.excepthook = _fault


def _die_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that ends."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    else:
        import threading

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _fault(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
    last = traceback.format_exception_only(kind, error)[-1].strip()
    tell(1, last, trace="".join(traceback.format_exception(kind, error, trace)))


def tell(exit_status: int, message: str, hint: str | None = None, trace: str = "") -> bool:
    """Send this process's last words to the one that has started it; only the first count.

    Args:
        exit_status: That this process is going to end with.
        message: Why it ends.
        hint: What to do about it.
        trace: A traceback, where the fault is the program's.

    Returns:
        False when no launcher of ours listens: this process reports the error itself.
    """
    if _pipe is None:
        return False
    words = {"at": time.monotonic_ns(), "status": exit_status, "message": message}
    line = json.dumps({**words, "hint": hint, "trace": trace}) + "\n"
    with contextlib.suppress(OSError), open(_pipe, "wb", closefd=False) as pipe:
        pipe.write(line.encode())
    return True


def is_one_of_several() -> bool:
    """True under a launcher, ours or torchrun, which says so by RANK."""
    return "RANK" in os.environ


def is_first() -> bool:
    """True in the process that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def count() -> int:
    """Processes of the run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local() -> int | None:
    """This process's number on its machine, from 0; None without a launcher."""
    found = os.environ.get("LOCAL_RANK")
    return None if found is None else int(found)


def prefix() -> str:
    """Which of several processes speaks: `process 1 of 2: `, counted from 0 as in RANK."""
    return (
        f"process {os.environ['RANK']} of {count()}: "
        if is_one_of_several() and count() > 1
        else ""
    )
