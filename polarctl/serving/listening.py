"""From an application to a process that listens, and its end by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from polarctl import console
from polarctl.errors import UsageError
from polarctl.serving.app import Service, create
from polarctl.serving.connections import Connection, Seldom, Settings

_FINISH_S = 2.5  # for requests under way
_COMPUTED_S = 0.3  # then for what the model computes
_TOLD_S = 1.0  # then for the replies
_ENDED_S = 4.5  # for all of it
_FILES = 128  # beside the connections: what the process has open, and clients being refused
_QUEUE = 1024  # clients that are not accepted yet


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket and its address; taken before a large model is loaded for nothing.

    Raises:
        UsageError: The address is taken, or is none of this machine's.
    """
    try:
        ((family, _, _, _, place), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.create_server(place[:2], family=family)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    with listener:
        shown = f"[{host}]" if ":" in host else host
        yield listener, f"http://{shown}:{listener.getsockname()[1]}"


def connections_of(wanted: int) -> int:
    """How many connections there can be; raises the limit of open files if it must."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    found = min(wanted, max(1, needed - _FILES))
    if found < wanted:
        console.warn(f"{found:,} connections in place of {wanted:,}: `ulimit -n` is {needed:,}")
    return found


def serve(
    service: Service,
    key: str | None,
    listener: socket.socket,
    greeting: str,
    *,
    connections: int,
    arrives_s: float,
) -> NoReturn:
    """Answer until SIGTERM, the normal end, or Ctrl-C; then end the process within 5 s.

    Requests under way are finished if they can be by then, else answered with 503. The exit status
    is 0, or 130 after Ctrl-C.

    Args:
        service: Who answers.
        key: See `polarctl.serving.app.create`.
        listener: Where to listen.
        greeting: What is said when it is ready.
        connections: How many may be open.
        arrives_s: Seconds in which a request must have arrived, and its reply be taken.
    """
    # Of what clients do wrong they are told, not the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    # A request of a million lists would be gone through again and again while it is read.
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)
    settings = Settings(create(service, key), connections_of(connections), arrives_s)
    server = _Server(settings, service, greeting)
    server.run(sockets=[listener])
    server.leave()


def _give_back() -> None:
    """Return freed memory to the system; glibc keeps it for each thread that had large bodies."""
    gc.collect()  # an error keeps what its frames held
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Server(uvicorn.Server):
    """Says when it is ready, watches its connections, and ends by a signal."""

    def __init__(self, config: Settings, service: Service, greeting: str):
        super().__init__(config)
        self.service, self.greeting = service, greeting
        self.interrupted = self.hurried = False
        self._full = Seldom()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._failed)
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_QUEUE)
        if self.started:
            console.note(self.greeting)

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.watch(now)
            self.service.bodies.settle(_give_back)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        last = threading.Timer(_ENDED_S, self.leave)
        last.daemon = True
        last.start()
        finish = asyncio.create_task(self._finish())
        await super().shutdown(sockets)
        finish.cancel()

    def leave(self) -> NoReturn:
        """End the process.

        Python's own end would wait for what the model computes, and takes a second of processor
        time to take everything down.
        """
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(130 if self.interrupted else 0)

    async def _finish(self) -> None:
        """End what takes too long."""
        until = time.monotonic() + _FINISH_S
        while time.monotonic() < until and not self.hurried:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.service.close, _COMPUTED_S)
        await asyncio.sleep(_TOLD_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # their clients do not take the reply

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "out of system resource" in context["message"]:
            self._full.warn("no more files can be opened (`ulimit -n`): new connections wait")
        else:
            loop.default_exception_handler(context)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            # A second signal does not wait for the requests under way.
            self.hurried = self.should_exit
            self.should_exit = True
            self.interrupted |= number == signal.SIGINT

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)  # until the process ends
        yield
