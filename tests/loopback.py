"""An OpenAI-compatible server on the loopback interface that tests tell what to answer.

Subclasses say what a good reply is (`answer`); what they are sent and how they fail is here.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

_COUNT = threading.Lock()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 refuses connections that come together
    daemon_threads = True
    block_on_close = False
    connections = 0  # that are open

    def process_request(self, *connection: Any) -> None:
        with _COUNT:
            self.connections += 1
        super().process_request(*connection)

    def shutdown_request(self, connection: Any) -> None:
        super().shutdown_request(connection)
        with _COUNT:
            self.connections -= 1

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is no error."""


class LoopbackServer:
    """The server and what it was sent.

    Attributes:
        url: Its address, without a path.
        bodies: Body of every request that was answered or met a fault.
        paths: Path of each of them.
        keys: Authorization header of every request, or None.
        faults: What the next requests meet, in turn, in place of an answer: (status, body) or
            (status, body, headers), "reset" or "stall".
        dies_after: Answers after which it gives status 503 alone; None: never.
        meet: Requests that have to be under way at a time before the first is answered.
        models: Rows of `/v1/models`; None: there is no such list.
        most_busy: Requests that were under way at a time, at most.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.faults: list[Any] = []
        self.dies_after: int | None = None
        self.meet = 1
        self.models: list[dict[str, Any]] | None = None
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("H", (_Handler,), {"own": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def settle(self) -> None:
        """Wait until the clients are gone: no request of theirs is still on its way."""
        deadline = time.monotonic() + 60
        while self._server.connections and time.monotonic() < deadline:
            time.sleep(0.005)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON that a good request gets."""
        raise NotImplementedError


class _Handler(BaseHTTPRequestHandler):
    own: LoopbackServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.own.keys.append(self.headers.get("Authorization"))
        if self.own.models is None or self.path != "/v1/models":
            self._send(404, {"error": {"message": f"no {self.path}"}})
        else:
            self._send(200, {"data": self.own.models})

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        sent = self.rfile.read(size)
        if len(sent) < size:  # the client has gone away
            self.close_connection = True
            return
        own, body = self.own, json.loads(sent)
        with own.lock:
            fault: Any = own.faults.pop(0) if own.faults else None
            if own.dies_after is not None and len(own.bodies) >= own.dies_after:
                fault = (503, {"error": "out of breath"})
            else:
                own.bodies.append(body)
                own.paths.append(self.path)
            own.keys.append(self.headers.get("Authorization"))
            own.busy += 1
            own.most_busy = max(own.most_busy, own.busy)
        deadline = time.monotonic() + 10
        while own.most_busy < own.meet and time.monotonic() < deadline:
            time.sleep(0.001)
        made = own.answer(self.path, body) if fault is None else None
        if fault == "stall":
            time.sleep(3)
        with own.lock:  # before the reply, after which the next request may come
            own.busy -= 1
        if fault == "reset":
            self.connection.close()
            self.close_connection = True
        elif fault != "stall":
            self._send(*(made or fault))

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
