"""A model that is not here: asked for on the Hub, or refused within seconds."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

PROGRAM = """
import sys, time
from polarctl import cli
from polarctl.model import reward_model as model  # imports are not what is measured
start = time.monotonic()
status = cli.run(sys.argv[1:])
print(f"{time.monotonic() - start:.2f}", status)
"""


def score(folder, name, address, **more):
    """Seconds, exit status and stderr of `polarctl score -m NAME` with a Hub at an address."""
    (folder / "in.jsonl").write_text('{"prompt": "q", "reference": "a", "output": "b"}\n')
    environment = {
        **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
        **{"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")},
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "score", "in.jsonl", "-m", name, "-o", "out.jsonl"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    seconds, status = done.stdout.split()
    return float(seconds), int(status), done.stderr


@pytest.fixture
def silent():
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "unknown", "silent"])
def test_an_unknown_id_without_a_network_fails_within_seconds_in_one_line(kind, silent, tmp_path):
    address = {
        "refused": "http://127.0.0.1:9",
        "unknown": "http://no-such-host.invalid",
        "silent": silent,
    }[kind]
    seconds, status, said = score(tmp_path, "nobody/nothing", address)
    assert status == 4
    first, hint = said.splitlines()
    assert first.startswith(
        f"polarctl: nobody/nothing: no such folder, not in the cache, and the Hub cannot be "
        f"reached: {address}: "
    )
    assert hint.startswith("hint: ")
    assert seconds < 15  # 40 to 54 s before; five of patience, and other work on the machine


@pytest.mark.parametrize("name", ["./nope", "/nope/rm", "runs/tuned/rm", "../rm", "rm/"])
def test_a_path_is_no_hub_id(name, tmp_path):
    seconds, status, said = score(tmp_path, name, "http://127.0.0.1:9")
    assert status == 4 and said.splitlines()[0] == f"polarctl: {name}: no such folder"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a folder as `me/rm`; its first answer about a file is 503."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        path = self.server.folder / name
        fails = name == "config.json" and self.server.failures > 0
        if fails:
            self.server.failures -= 1
        there = not fails and "/resolve/" in self.path and path.is_file()
        data = path.read_bytes() if there else b"{}"
        status = 503 if fails else 200 if there or "/resolve/" not in self.path else 404
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{name}-1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.mark.slow
def test_a_hub_that_answers_is_asked_again_and_its_cache_serves_without_it(tiny_rm, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.folder, server.failures = tiny_rm, 1
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    start = time.monotonic()
    _, status, said = score(tmp_path, "me/rm", address)
    server.shutdown()
    server.server_close()
    assert status == 0, said
    assert server.failures == 0 and time.monotonic() - start > 1  # it waited and asked again
    rewards = json.loads((tmp_path / "out.jsonl").read_text())["reward"]
    (tmp_path / "out.jsonl").unlink()
    seconds, status, said = score(tmp_path, "me/rm", address)
    assert status == 0 and "Hub: the cache alone (" in said
    assert "Retry" not in said and seconds < 15
    shutil.rmtree(tmp_path / "cache")
    assert json.loads((tmp_path / "out.jsonl").read_text())["reward"] == rewards
