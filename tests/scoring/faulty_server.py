"""A scoring server that speaks like vLLM, SGLang or lmdeploy, with faults by a seed."""

import contextlib
import hashlib
import json
import math
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATUS = {"status 500": 500, "busy": 429, "overloaded": 503}
FAULTS = (*STATUS, "reset", "stall", "torn", "short", "long", "nan", "nonsense")


def reward_of(given) -> float:
    """A number between -10 and 10 that follows from the input."""
    digest = hashlib.sha256(json.dumps(given).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 * 20 - 10


class Handler(BaseHTTPRequestHandler):
    """Answers one request, or fails at it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(ConnectionError):  # the client may have gone away
            self.end_headers()
            self.wfile.write(data)

    def do_GET(self):
        row = {"id": self.server.model, "owned_by": self.server.kind}
        self.reply(200, {"data": [{**row, "root": self.server.root}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:  # counts are compared exactly
            server.seen["requests"] += 1
            hangs = server.seen["requests"] in server.hangs
        time.sleep(server.seconds)
        if hangs:
            time.sleep(server.hang_s)
            self.close_connection = True
            return
        server.keys.add(self.headers.get("Authorization"))
        if server.refuse:
            told = f"\x1b]0;pwned\x07\u202e{self.headers.get('Authorization')}"
            self.reply(400, {"error": f"the model takes no such input {told}"})
            return
        with server.lock:
            fails = server.draw.random() < server.share
            fault = server.draw.choice(FAULTS) if fails else None
        given = body["text"] if server.kind == "sglang" else body["input"]
        rewards = [reward_of(one) + server.shift for one in given]
        if server.sigmoid:
            rewards = [1 / (1 + math.exp(-r)) for r in rewards]
        with server.lock:
            server.seen[fault or "good"] += 1
        if fault in STATUS:
            later = {} if fault == "status 500" else {"Retry_After": "0.02"}
            self.reply(STATUS[fault], b"oops", **later)
            return
        if fault in ("reset", "stall"):
            time.sleep(0.02 if fault == "stall" else 0)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            return
        if fault == "short":
            rewards = rewards[:-1]
        if fault == "long":
            rewards = [*rewards, 0.0]
        if fault == "nan":
            rewards[0] = math.nan
        if server.kind == "sglang":
            reply = [{"embedding": [r]} for r in rewards]
        else:
            field = "data" if server.kind == "lmdeploy" else "probs"
            value = (lambda r: r) if server.kind == "lmdeploy" else (lambda r: [r])
            rows = [{"index": i, field: value(r)} for i, r in enumerate(rewards)]
            random.Random(len(rows)).shuffle(rows)  # the index says which is which
            reply = {"data": rows, "model": server.said or body["model"]}
        if server.hostile is not None:
            with server.lock:
                # The first is the probe; then every request meets it once, or always.
                server.seen["hostile"] += 1
                meets = server.seen["hostile"] > 1 and (
                    server.always or json.dumps(given) not in server.met
                )
                server.met.add(json.dumps(given))
            if meets:
                server.hostile(self, rewards)
                return
        data = json.dumps({"hello": 1} if fault == "nonsense" else reply).encode()
        self.reply(200, data[: len(data) // 2] if fault == "torn" else data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # five would refuse some of sixteen that come at once
    open = 0  # connections

    def process_request_thread(self, *connection):
        with self.lock:
            self.open += 1
        try:
            super().process_request_thread(*connection)
        finally:
            with self.lock:
                self.open -= 1


@contextlib.contextmanager
def serving(
    kind="vllm",
    *,
    share=0.0,
    sigmoid=False,
    refuse=False,
    port=0,
    seconds=0.0,
    hangs=(),
    hang_s=0.0,
    model="rm",
    root="/models/rm",
    shift=0.0,
    hostile=None,
    always=False,
):
    """A server; `share` of the requests fail, each takes `seconds`, those of `hangs` for ever.

    `hostile(handler, rewards)` answers each request once, or `always`, in place of a good reply.
    `model`, `root`, `said` (the name in replies) and `shift` (another model's rewards) may change.
    """
    server = Server(("127.0.0.1", port), Handler)
    server.kind, server.share, server.sigmoid, server.refuse = kind, share, sigmoid, refuse
    server.seconds, server.hangs, server.hang_s = seconds, frozenset(hangs), hang_s
    server.model, server.root, server.said, server.shift = model, root, None, shift
    server.hostile, server.always, server.met = hostile, always, set()
    server.draw, server.lock = random.Random(1), threading.Lock()
    server.seen, server.keys = Counter(), set()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
