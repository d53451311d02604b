"""A policy on the loopback interface that answers as an OpenAI-compatible server does.

Its text can be computed by eye: the last word of the prompt, then the seed. It has a token a word.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 refuses connections that come together

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is no error."""


class CompletionServer:
    """The server and what it was sent.

    Attributes:
        url: Its address, without a path.
        bodies: (path, body) of every request that was answered or met a fault.
        keys: Authorization header of every request, or None.
        faults: What the next requests meet, in turn, in place of an answer: (status, body) or
            (status, body, headers), or "reset".
        dies_after: Answers after which it gives status 503 alone; None: never.
        change: From the body of a request and its good reply to what is sent.
        meet: Requests that have to be under way at a time before the first is answered.
        models: Rows of `/v1/models`.
    """

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.faults: list[Any] = []
        self.meet = 1
        self.dies_after: int | None = None
        self.change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda body, reply: reply
        self.models: list[dict[str, Any]] = [{"id": "m", "object": "model"}]
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("H", (_Handler,), {"own": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> CompletionServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def reply_to(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A good reply: `length` for odd seeds, `stop` for even ones."""
    chat = path.endswith("/chat/completions")
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    text = f" {prompt.split()[-1]} {body['seed']}"
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    end = "length" if body["seed"] % 2 else "stop"
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 2}
    return {
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": end, **said}],
        "usage": usage,
    }


class _Handler(BaseHTTPRequestHandler):
    own: CompletionServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.own.keys.append(self.headers.get("Authorization"))
        self._send(200 if self.path == "/v1/models" else 404, {"data": self.own.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        own = self.own
        with own.lock:
            dead = own.dies_after is not None and len(own.bodies) >= own.dies_after
            fault = own.faults.pop(0) if own.faults else None
            own.keys.append(self.headers.get("Authorization"))
            if not dead:
                own.bodies.append((self.path, body))
            own.busy += 1
            own.most_busy = max(own.most_busy, own.busy)
        deadline = time.monotonic() + 10
        while own.most_busy < own.meet and time.monotonic() < deadline:
            time.sleep(0.001)
        with own.lock:  # before the reply, after which the next request may come
            own.busy -= 1
        if dead:
            self._send(503, {"error": "out of breath"})
        elif fault == "reset":
            self.connection.close()
            self.close_connection = True
        elif fault is not None:
            self._send(*fault)
        else:
            self._send(200, own.change(body, reply_to(self.path, body)))

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
