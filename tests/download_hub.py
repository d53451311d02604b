"""A Hub on the loopback interface from which one model, or one data set, can be downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

COMMIT = "c" * 40


@contextlib.contextmanager
def serving(name: str, folder: Path, kind: str = "models") -> Iterator[str]:
    """The address of a Hub that has the files of `folder` as the model or data set `name`."""
    page = name if kind == "models" else f"{kind}/{name}"
    own = {"name": name, "folder": folder, "api": f"/api/{kind}/{name}", "page": f"/{page}"}
    handler = type("Handler", (_Handler,), own)
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
    api: str
    page: str
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
        if path.startswith(f"{self.api}/tree/") and place == f"{self.api}/tree":
            self._send(json.dumps(tree).encode())
        elif path == self.api or path.startswith(f"{self.api}/revision/"):
            self._send(json.dumps(model).encode())
        elif path.startswith(f"{self.api}/paths-info/"):
            size = int(self.headers.get("Content-Length") or 0)
            wanted = parse_qs(self.rfile.read(size).decode()).get("paths", [])
            self._send(json.dumps([e for e in tree if e["path"] in wanted]).encode())
        elif place in (f"{self.page}/resolve/main", f"{self.page}/resolve/{COMMIT}"):
            if asked in files:
                self._send_file(files[asked])
            else:
                self._send(b"", 404, **{"X-Error-Code": "EntryNotFound"})
        else:
            code = "EntryNotFound" if path.startswith(f"{self.api}/") else "RepoNotFound"
            self._send(b"", 404, **{"X-Error-Code": code})

    do_HEAD = do_POST = do_GET

    def _send_file(self, file: Path) -> None:
        data, part = file.read_bytes(), self.headers.get("Range")
        tag = f'"{_etag(file)}"'
        if part is None:
            self._send(data, ETag=tag)
            return
        first, _, last = part.removeprefix("bytes=").partition("-")
        end = int(last) + 1 if last else len(data)
        said = f"bytes {first}-{min(end, len(data)) - 1}/{len(data)}"
        self._send(data[int(first) : end], 206, **{"ETag": tag, "Content-Range": said})

    def _send(self, data: bytes, status: int = 200, **headers: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
