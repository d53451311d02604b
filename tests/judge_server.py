"""A judge on the loopback interface that answers as an OpenAI-compatible server does.

It scores a response by a rule that can be computed by eye: 1 + the number of `!` in it, 5 at most.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def rule(question: dict[str, Any]) -> str:
    """The judge's reply to the JSON of a user's message."""
    scores = {name: min(5, 1 + text.count("!")) for name, text in question["responses"].items()}
    ranking = sorted(scores, key=lambda name: -scores[name])
    answer = json.dumps({"scores": scores, "best-to-worst": ranking})
    return f"<think>{ranking[0]} is the loudest</think>\n{answer}"


class JudgeServer:
    """The server and what it was sent.

    Attributes:
        url: Its address, without a path.
        bodies: Body of every request.
        keys: Authorization header of every request, or None.
        faults: What the next requests meet, in turn, in place of an answer: (status, body) or
            (status, body, headers), "reset" or "stall".
        reply: A user's question to the text of the answer.
        message: Further fields of the answer's message.
        finish_reason: Of every answer.
        named: The model that every answer names, if any.
        models: Rows of `/v1/models`; None: there is no such list.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[Any] = []
        self.reply: Callable[[dict[str, Any]], str | None] = rule
        self.message: dict[str, Any] = {}
        self.finish_reason = "stop"
        self.named: str | None = None
        self.models: list[dict[str, Any]] | None = None
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"own": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    own: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.own.models is None:
            self._send(404, {"error": {"message": f"no {self.path}"}})
        else:
            self._send(200, {"data": self.own.models})

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        sent = self.rfile.read(size)
        if len(sent) < size:  # the client has gone away
            self.close_connection = True
            return
        body = json.loads(sent)
        with self.own.lock:
            self.own.bodies.append(body)
            self.own.keys.append(self.headers.get("Authorization"))
            fault = self.own.faults.pop(0) if self.own.faults else None
            self.own.busy += 1
            self.own.most_busy = max(self.own.most_busy, self.own.busy)
        try:
            self._answer(body, fault)
        finally:
            with self.own.lock:
                self.own.busy -= 1

    def _answer(self, body: dict[str, Any], fault: Any) -> None:
        if fault == "reset":
            self.connection.close()
            self.close_connection = True
        elif fault == "stall":
            time.sleep(3)
        elif fault is not None:
            self._send(*fault)
        elif self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"no {self.path}"}})
        else:
            text = self.own.reply(json.loads(body["messages"][-1]["content"]))
            message = {"role": "assistant", "content": text, **self.own.message}
            choice = {"index": 0, "message": message, "finish_reason": self.own.finish_reason}
            named = {"model": self.own.named} if self.own.named else {}
            self._send(200, {"object": "chat.completion", "choices": [choice], **named})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
