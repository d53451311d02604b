"""A Hub on the loopback interface: as much of its API as `huggingface_hub` needs to publish files.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"] = hub.url
        ...
        assert hub.repos["me/rm"].files()["config.json"] == b"{}"

It keeps what it is sent and every request, and can be told to fail (`hub.fail`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "S3ntinel" * 4
LARGE = (".safetensors", ".gz", ".zst")


@dataclass
class Repo:
    """A repository: visibility, and the files of every branch."""

    kind: str
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch]

    @property
    def head(self) -> str:
        return self.commits[-1]["oid"] if self.commits else "0" * 40


class HubServer:
    """The server and its state.

    Attributes:
        url: For `HF_ENDPOINT`.
        repos: `owner/name` to Repo.
        requests: (method, path) of every request.
        large: Contents of large files by SHA-256.
        fail: Pattern of `METHOD path` to (status, message): such requests fail.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}
        self.fail: dict[str, tuple[int, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def commits(self) -> int:
        return sum(len(repo.commits) for repo in self.repos.values())


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        self.hub.requests.append((self.command, path))
        for pattern, (status, message) in self.hub.fail.items():
            if re.fullmatch(pattern, f"{self.command} {path}"):
                return self._send(status, {"error": message})
        if not path.startswith("/lfs/put/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                fields = {key: unquote(value) for key, value in match.groupdict("").items()}
                return self._send(*answer(self.hub, body, **fields))
        self._send(404, {"error": f"no such route: {path}"})


def _create(hub: HubServer, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    name = f"{asked['organization'] or 'me'}/{asked['name']}"
    kind = asked.get("type") or "model"
    reply = {"url": f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
    if name in hub.repos:
        return 409, {**reply, "error": "You already created this repo"}
    hub.repos[name] = Repo(kind, private=asked.get("visibility") == "private")
    return 200, reply


def _info(hub: HubServer, body: bytes, id: str, rev: str = "main") -> tuple[int, Any]:
    if id not in hub.repos:
        return 404, {"error": "Repository not found"}
    repo = hub.repos[id]
    return 200, {"id": id, "sha": repo.head, "private": repo.private, "siblings": [], "tags": []}


def _branch(hub: HubServer, body: bytes, id: str, rev: str) -> tuple[int, Any]:
    if rev in hub.repos[id].branches:
        return 409, {"error": "Reference already exists"}
    hub.repos[id].branches[rev] = dict(hub.repos[id].files())
    return 200, {}


def _preupload(hub: HubServer, body: bytes, id: str, rev: str) -> tuple[int, Any]:
    repo = hub.repos[id]
    files = []
    for asked in json.loads(body)["files"]:
        path = asked["path"]
        large = path.endswith(LARGE)
        there = repo.files(rev).get(path)
        oid = None if there is None else _oid(there, large)
        mode = "lfs" if large else "regular"
        ignore = path in repo.ignored
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
    return 200, {"files": files}


def _batch(hub: HubServer, body: bytes, id: str) -> tuple[int, Any]:
    objects = []
    for asked in json.loads(body)["objects"]:
        actions = {
            "upload": {"href": f"{hub.url}/lfs/put/{asked['oid']}"},
            "verify": {"href": f"{hub.url}/lfs/verify"},
        }
        objects.append({**asked, **({} if asked["oid"] in hub.large else {"actions": actions})})
    return 200, {"transfer": "basic", "objects": objects}


def _put(hub: HubServer, body: bytes, oid: str) -> tuple[int, Any]:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "hash mismatch"}
    hub.large[oid] = body
    return 200, {}


def _lfs_verify(hub: HubServer, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    whole = len(hub.large.get(asked["oid"], b"")) == asked["size"]
    return (200, {}) if whole else (404, {"error": "object not found"})


def _commit(hub: HubServer, body: bytes, id: str, rev: str) -> tuple[int, Any]:
    repo = hub.repos[id]
    lines = [json.loads(line) for line in body.splitlines()]
    for line in lines[1:]:
        value = line["value"]
        data = (
            hub.large[value["oid"]]
            if line["key"] == "lfsFile"
            else base64.b64decode(value["content"])
        )
        repo.files(rev)[value["path"]] = data
    oid = hashlib.sha1(body).hexdigest()
    repo.commits.append({"oid": oid, "summary": lines[0]["value"]["summary"], "branch": rev})
    prefix = "datasets/" if repo.kind == "dataset" else ""
    return 200, {"commitUrl": f"{hub.url}/{prefix}{id}/commit/{oid}", "commitOid": oid}


def _paths_info(hub: HubServer, body: bytes, id: str, rev: str) -> tuple[int, Any]:
    repo = hub.repos[id]
    branch = next((c["branch"] for c in repo.commits if c["oid"] == rev), rev)
    entries = []
    for path in parse_qs(body.decode())["paths"]:
        if (data := repo.files(branch).get(path)) is None:
            continue
        entry = {"type": "file", "path": path, "size": len(data), "oid": _oid(data, False)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": _oid(data, True), "size": len(data), "pointerSize": 130}
        entries.append(entry)
    return 200, entries


def _resolve(hub: HubServer, body: bytes, id: str, rev: str, file: str) -> tuple[int, Any]:
    data = hub.repos[id].files(rev).get(file)
    return (404, {"error": "Entry not found"}) if data is None else (200, data)


def _oid(data: bytes, large: bool) -> str:
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/(?:models|datasets)/{_REPO}"
_ROUTES = [
    (r"POST /api/repos/create", _create),
    (r"GET /api/whoami-v2", lambda hub, body: (200, {"type": "user", "name": "me"})),
    (r"POST /api/validate-yaml", lambda hub, body: (200, {"errors": [], "warnings": []})),
    (rf"GET {_API}(?:/revision/(?P<rev>[^/]+))?", lambda hub, body, id, **_: _info(hub, body, id)),
    (rf"POST {_API}/branch/(?P<rev>[^/]+)", _branch),
    (rf"POST {_API}/preupload/(?P<rev>[^/]+)", _preupload),
    (rf"POST {_API}/commit/(?P<rev>[^/]+)", _commit),
    (rf"POST {_API}/paths-info/(?P<rev>[^/]+)", _paths_info),
    (rf"POST (?:/datasets)?/{_REPO}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /lfs/put/(?P<oid>[0-9a-f]{64})", _put),
    (r"POST /lfs/verify", _lfs_verify),
    (rf"GET (?:/datasets)?/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", _resolve),
]
