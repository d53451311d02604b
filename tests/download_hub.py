"""A Hub on the loopback interface from which one model can be downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[str]:
    """The address of a Hub that has the files of `folder` as the model `name`."""
    handler = type("Handler", (_Handler,), {"name": name, "folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    name: str
    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file for file in self.folder.iterdir() if file.is_file()}
        siblings = [{"rfilename": file} for file in sorted(files)]
        tree = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
            for name, file in sorted(files.items())
        ]
        model = {"id": self.name, "sha": COMMIT, "siblings": siblings, "tags": []}
        place, _, asked = path.rpartition("/")
        if path.startswith(f"/api/models/{self.name}/tree/"):
            self._send(json.dumps(tree).encode())
        elif path.startswith(f"/api/models/{self.name}"):
            self._send(json.dumps(model).encode())
        elif place in (f"/{self.name}/resolve/main", f"/{self.name}/resolve/{COMMIT}"):
            self._send(files[asked].read_bytes(), ETag=f'"{_etag(files[asked])}"')
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _send(self, data: bytes, **headers: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
