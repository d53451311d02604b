"""A client's connection: its deadlines, and how many there may be."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
import orjson
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from polarctl import console

_HEAD_S = 10.0  # the first line and the headers
_IDLE_S = 20  # more than common clients wait: no request meets a connection that is being closed
_CLOSED_S = 10.0  # a connection that we have closed, with what is still to be sent
_SELDOM_S = 60.0
_REASONS = {408: "Request Timeout", 503: "Service Unavailable"}


class Seldom:
    """Says what happens very often once a minute."""

    def __init__(self) -> None:
        self._next = 0.0

    def warn(self, message: str) -> None:
        """Say it, unless something was said within the last minute."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SELDOM_S
            console.warn(message)


class Settings(uvicorn.Config):
    """Uvicorn's settings and ours.

    Args:
        app: The application.
        connections: How many may be open.
        arrives_s: Seconds in which a request must have arrived, and its reply be taken.
    """

    def __init__(self, app: Any, connections: int, arrives_s: float):
        self.connections, self.crowded = connections, Seldom()
        self.limits_s = {
            "head": min(_HEAD_S, arrives_s),
            "body": arrives_s,
            "sending": arrives_s,
            "idle": _IDLE_S + 5,  # where Uvicorn's own timer does not run
            "closing": _CLOSED_S,
        }
        super().__init__(
            app,
            loop="asyncio",
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            backlog=32,  # also how many are accepted before one of them can be refused
        )


class Connection(H11Protocol):
    """Uvicorn's connection, ended when its client takes too long."""

    config: Settings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a client, or refuse it."""
        super().connection_made(transport)
        self._stage: tuple[str, object] = ("", None)
        self._since = 0.0
        if len(self.connections) > self.config.connections:
            most = self.config.connections
            self.config.crowded.warn(
                f"all {most:,} connections are in use; more are answered with 503"
            )
            self._end(503, "too many connections are open; ask again in a second")

    def watch(self, now: float) -> None:
        """End the connection if it has been in one stage for too long.

        Args:
            now: Seconds, of a clock that does not go back.
        """
        stage = self._now_in()
        if stage != self._stage:
            self._stage, self._since = stage, now
            return
        limit = self.config.limits_s.get(stage[0])
        if limit is None or now - self._since < limit:
            return
        if stage[0] in ("head", "body") and (stage[0] == "head" or not self._answered()):
            self._end(408, f"the request did not arrive within {limit:g} s")
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        """Finish what has been asked; a request that has not arrived is not waited for."""
        if self._now_in()[0] == "body" and not self._answered():
            self._end(503, "the server is stopping")
        else:
            super().shutdown()

    def _now_in(self) -> tuple[str, object]:
        """The stage, with what tells it from the same stage of another request."""
        if self.transport.is_closing():
            return "closing", None
        if self.transport.get_write_buffer_size():
            return "sending", self.cycle
        if self.conn.their_state is h11.IDLE:
            fresh = self.cycle is None or bool(self.conn.trailing_data[0])
            return "head" if fresh else "idle", self.cycle
        return "body" if self.conn.their_state is h11.SEND_BODY else "working", self.cycle

    def _answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_started

    def _end(self, status: int, message: str) -> None:
        """Answer in the application's place, and close."""
        body = orjson.dumps({"error": {"message": message, "type": "error", "code": status}})
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n"
        head += "Retry-After: 1\r\n\r\n" if status == 503 else "\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application is told
            self.cycle.message_event.set()
