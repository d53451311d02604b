"""Ray's driver: a process of its own, one pipe to it.

Ray writes to stderr as it likes, takes SIGTERM for itself, and ends its process when the cluster is
lost. None of that reaches the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, need

_START_S = 120.0  # to join a cluster, or to start one
_CONNECT_S = 5.0
_LOST_S = 20.0  # without an answer of the head before the cluster counts as lost
END_S = 60.0  # for the workers to give back what they hold
_BEGIN = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from polarctl.parallel.ray_driver import drive
drive(int(sys.argv[2]))"""


class Driver:
    """The process that is Ray's driver, and what it tells.

    Use as a context manager: leaving it ends the process, with an error at once.

    Args:
        address: `auto` for the cluster that this machine belongs to, `local` for one that is
            started on this machine and ends with the run, or HOST:PORT of a cluster's head.
        job: What is done there, with the link to this process; a function that can be pickled. The
            first thing that it tells is `ready` with some value.
        hint: What helps when the cluster is lost.

    Attributes:
        ready: That value.

    Raises:
        MissingError: Ray is not installed; no such cluster; what the job raises before it is ready.
    """

    def __init__(self, address: str, job: Callable[[Link], None], hint: str | None):
        if importlib.util.find_spec("ray") is None:
            raise need("ray", "ray")
        self.address, self.hint = address, hint
        self.connection, theirs = Pipe()
        self.log = tempfile.TemporaryFile()
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
                start_new_session=True,  # Ctrl-C on the terminal is the parent's to handle
            )
        finally:
            theirs.close()
        try:
            self.send(pickle.dumps((address, job, hint)))
            if not self.connection.poll(_START_S):
                raise MissingError(f"{named(address)} has not answered for {_START_S:.0f} s")
            self.ready = self.receive()
        except BaseException:
            self.__exit__(True)
            raise

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, failed: object = None, *_: object) -> None:
        self.connection.close()  # which it takes as its end
        if not failed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S + _CONNECT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def send(self, data: bytes) -> None:
        """Hand it over; what is wrong is told when an answer is missing."""
        with contextlib.suppress(ConnectionError):
            self.connection.send_bytes(data)

    def receive(self) -> Any:
        """The next value that is told.

        Raises:
            PolarctlError: What the job was ended by.
            MissingError: The process is gone.
        """
        while True:
            try:
                kind, value = pickle.loads(self.connection.recv_bytes())
            except (EOFError, ConnectionError):
                raise self._death() from None
            if kind == "failed":
                raise value
            if kind != "warn":
                return value
            console.warn(value)

    def _death(self) -> PolarctlError:
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 10_000))
        lines = self.log.read().decode("utf-8", "replace").strip().splitlines()
        why = f": {console.plain(lines[-1])}" if lines else ""
        return MissingError(f"{named(self.address)} is lost{why}", hint=self.hint)


def named(address: str) -> str:
    """How a cluster is called in messages."""
    return f"the Ray cluster `{address}`"


def first_line(error: BaseException) -> str:
    """What an error says, without its traceback."""
    lines = str(error).strip().splitlines()
    return console.plain(lines[0]) if lines else type(error).__name__


# -- in that process ------------------------------------------------------------------------------


def drive(handle: int) -> None:
    """Be Ray's driver until all is done or the parent is gone.

    Args:
        handle: File descriptor of the socket to it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent ends this process
        signal.signal(number, signal.SIG_IGN)
    link = Link(Connection(handle))
    try:
        address, job, hint = pickle.loads(link.connection.recv_bytes())
        _join(address)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which Ray has taken
        threading.Thread(target=_watch, args=(link, address, hint), daemon=True).start()
        job(link)
        import ray

        ray.shutdown()
    except PolarctlError as error:
        link.fail(error)
    except (EOFError, ConnectionError):  # the parent has what it wanted, or is gone
        pass
    link.end()


class Link:
    """The pipe to the parent, which several threads may use."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.lock = threading.Lock()

    def tell(self, kind: str, value: Any) -> None:
        """Send a message."""
        with self.lock:
            self.connection.send_bytes(pickle.dumps((kind, value)))

    def fail(self, error: PolarctlError) -> NoReturn:
        """Have the parent raise an error; ends this process."""
        with contextlib.suppress(OSError):
            self.tell("failed", error)
        self.end()

    def end(self) -> NoReturn:
        """End this process, and a cluster that it has started; Ray ends its workers on others."""
        os.killpg(0, signal.SIGKILL)
        os._exit(1)  # never reached


def _join(address: str) -> None:
    """Join a cluster, or start one.

    Raises:
        MissingError: There is none.
    """
    import logging

    import ray

    if ":" in address and not _answers(address):
        raise MissingError(
            f"{named(address)} does not answer", hint="HOST:PORT of its head, port 6379 by default"
        )
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, ...
        raise MissingError(
            f"{named(address)} cannot be joined: {first_line(error)}",
            hint="`ray start` on this machine makes it a part of a cluster; "
            "`--ray local` needs none",
        ) from None


def _watch(link: Link, address: str, hint: str | None) -> None:
    """End this process when the cluster's head is gone: Ray waits longer, and for more."""
    import ray

    head = ray.get_runtime_context().gcs_address
    heard = time.monotonic()
    while time.monotonic() - heard < _LOST_S:
        if _answers(head):
            heard = time.monotonic()
        time.sleep(2)
    link.fail(MissingError(f"{named(address)} is lost: no answer for {_LOST_S:.0f} s", hint=hint))


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S):
            return True
    except (OSError, ValueError, OverflowError):
        return False
