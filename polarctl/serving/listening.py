"""From an application to a process that listens, and its end by a signal."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from polarctl import console
from polarctl.errors import UsageError

_FINISH_S = 60  # for requests under way


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


def serve(app: FastAPI, listener: socket.socket, greeting: str) -> bool:
    """Answer until SIGTERM, the normal end, or Ctrl-C; requests under way are finished.

    Args:
        app: The application.
        listener: Where to listen.
        greeting: What is said when it is ready.

    Returns:
        Whether it was Ctrl-C.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FINISH_S,
    )
    server = _Server(config, greeting)
    server.run(sockets=[listener])
    return server.interrupted


class _Server(uvicorn.Server):
    """Says when it is ready, and ends by a signal without raising it again."""

    def __init__(self, config: uvicorn.Config, greeting: str):
        super().__init__(config)
        self.greeting, self.interrupted = greeting, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            console.note(self.greeting)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            # A second signal does not wait for the requests under way.
            self.force_exit = self.should_exit
            self.should_exit = True
            self.interrupted |= number == signal.SIGINT

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
