"""`polarctl serve` and clients that are slow, many, rude or gone: a real process, raw sockets."""

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from polarctl.model import reward_model

MIB = 1 << 20
HALF_HEAD = b"POST /score HTTP/1.1\r\nHost: h"
SMALL = {"prompt": "Why?", "reference": "So.", "output": "No."}
STARTS_S = 120  # of a process, on a machine that does much else


def post(body, length=None, route="/score", *headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {route} HTTP/1.1", "Host: here", *headers]
    lines.append(f"Content-Length: {len(data) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + data


def get(route, *headers):
    return "\r\n".join([f"GET {route} HTTP/1.1", "Host: here", *headers, "", ""]).encode()


UNTAKEN = get("/openapi.json") * 5000  # whose replies are more than the system's buffers hold
HALF_BODY = post(b'{"prompt": ', 1000)


class Served:
    """A server process, and what it has said."""

    def __init__(self, child, log):
        self.child, self.log = child, log
        until = time.monotonic() + STARTS_S
        while not (found := re.search(r"^serving .*:(\d+)$", self.said, re.MULTILINE)):
            assert child.poll() is None and time.monotonic() < until, self.said
            time.sleep(0.05)
        self.place = "127.0.0.1", int(found[1])

    @property
    def said(self):
        return self.log.read_text()

    def open(self, *parts, buffer=None):
        """A connection on which these have been sent; `buffer` is for what it receives."""
        made = socket.socket()
        made.settimeout(60)
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.connect(self.place)
        for part in parts:
            made.sendall(part)
        return made

    def ask(self, data):
        """Status, headers and body of the one reply to this."""
        with self.open(data) as made:
            return reply_of(made)

    def meters(self):
        _, _, text = self.ask(get("/metrics", "Connection: close"))
        lines = [line.rsplit(" ", 1) for line in text.decode().splitlines() if line[:1] != "#"]
        return {name: float(value) for name, value in lines}

    def mib(self):
        return psutil.Process(self.child.pid).memory_info().rss / MIB

    def stop(self):
        """Seconds from SIGTERM to its end."""
        start = time.monotonic()
        self.child.send_signal(signal.SIGTERM)
        assert self.child.wait(60) == 0
        return time.monotonic() - start


def everything(made):
    """All bytes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := made.recv(65536):
            data += part
    return data


def reply_of(made):
    data = b""
    while b"\r\n\r\n" not in data:
        part = made.recv(65536)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    while len(body) < int(headers["content-length"]):
        body += made.recv(65536)
    return int(head.split()[1]), headers, body


@contextlib.contextmanager
def serving(model, folder, *options, files=None):
    """A server; `files` is its limit of open files."""

    def limit():
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    log = folder / "said"
    with open(log, "w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "polarctl", "serve", "-m", model, "--port", "0"]
            + [str(option) for option in options],
            stdin=subprocess.DEVNULL,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=limit,
        )
    try:
        yield (served := Served(child, log))
    finally:
        child.kill()
        child.wait()
    assert "Traceback" not in served.said


def eventually(true, limit_s=60):
    until = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tiny_rm, tmp_path_factory):
    """One with short deadlines, few connections and small batches."""
    options = ["--request-timeout", "2", "--max-connections", "40", "--batch-tokens", "512"]
    with serving(tiny_rm, tmp_path_factory.mktemp("server"), *options) as served:
        yield served


# -- deadlines ------------------------------------------------------------------------------------


def dripping(made, data, stop):
    """Send a byte every 0.1 s."""
    with contextlib.suppress(OSError):
        for byte in data:
            made.sendall(bytes([byte]))
            if stop.wait(0.1):
                return


def test_what_does_not_arrive_is_ended(server):
    stop = threading.Event()
    chunked = get("/score", "Transfer-Encoding: chunked").replace(b"GET", b"POST")
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        stack.callback(stop.set)

        def opened(*parts, drip=b""):
            made = stack.enter_context(server.open(*parts))
            if drip:
                pool.submit(dripping, made, drip, stop)
            return made

        late = {
            "silent": opened(),
            "half head": opened(HALF_HEAD),
            "drip head": opened(HALF_HEAD, drip=b"a" * 600),
            "half body": opened(HALF_BODY),
            "drip body": opened(HALF_BODY, drip=b" " * 600),
            "chunks": opened(chunked, b"1\r\n{\r\n", drip=b"1\r\n \r\n" * 100),
            "after a good one": opened(post(SMALL)),
        }
        assert reply_of(late["after a good one"])[0] == 200
        late["after a good one"].sendall(HALF_HEAD)
        # The reply comes before the body, which never does.
        answered = opened(get("/health", "Content-Length: 9"), drip=b"a" * 8)
        slow = opened(post(SMALL)[:50])
        time.sleep(0.5)
        slow.sendall(post(SMALL)[50:])
        assert reply_of(slow)[0] == 200
        slow.close()
        for name, made in late.items():
            said = everything(made)
            assert said.startswith(b"HTTP/1.1 408 "), (name, said)
            assert b"connection: close" in said.lower() and b"within 2 s" in said
        assert everything(answered).startswith(b"HTTP/1.1 200 ")
        stop.set()
        eventually(lambda: open_at(server) == 0)


def open_at(server):
    """Its connections, without those that only the system still has, and its listening socket."""
    return len(psutil.Process(server.child.pid).net_connections("tcp")) - 1


@pytest.mark.slow
def test_a_reply_that_is_not_taken_is_dropped(server):
    with server.open(UNTAKEN, buffer=4096) as made:
        eventually(lambda: open_at(server) > 0)
        eventually(lambda: open_at(server) == 0)
        assert everything(made).count(b"HTTP/1.1 200") < 5000


def test_more_connections_are_refused(server):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(server.open(HALF_HEAD)) for _ in range(40)]
        for _ in range(60):
            with server.open() as refused:
                status, headers, body = reply_of(refused)
                assert refused.recv(1) == b""
            if not select.select(held, [], [], 0)[0]:  # none has been ended by its deadline yet
                assert status == 503 and headers["retry-after"] == "1"
                assert json.loads(body)["error"]["code"] == 503
    eventually(lambda: server.ask(get("/health"))[0] == 200)
    assert server.said.count("all 40 connections are in use") == 1


def test_a_body_of_very_many_values_is_not_built(server):
    unit, most = psutil.Process(server.child.pid), 0
    base = server.mib()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.ask, post(b"[" + b"[]," * (8 * MIB // 3) + b"[]]"))
        waits = []
        while not asked.done():
            start = time.monotonic()
            assert server.ask(get("/health"))[0] == 200
            waits.append(time.monotonic() - start)
            most = max(most, unit.memory_info().rss / MIB)
        status, _, body = asked.result()
    assert status == 413 and b"more than 2,097,152 JSON values" in body
    assert most - base < 60  # built, they take 200 MiB
    assert max(waits) < 5  # a machine with other work; to build them took longer on an idle one
    # Marks inside of texts are no values, whatever stands before them.
    text = json.dumps({**SMALL, "note": '\\"[,{' * 800_000})
    assert server.ask(post(text.encode()))[0] == 200


# -- work that nobody waits for, and that of others -----------------------------------------------


def test_nothing_more_is_done_for_a_client_that_has_left(server):
    before = server.meters()
    large = {**SMALL, "candidates": [{"output": f"{i} is so " * 9} for i in range(2000)]}
    del large["output"]
    done = "polarctl_tokens_total"
    with server.open(post(large)):
        eventually(lambda: server.meters()[done] > before[done])
    gone = 'polarctl_requests_total{route="/score",status="499"}'
    eventually(lambda: server.meters().get(gone, 0) == before.get(gone, 0) + 1)
    after = server.meters()
    assert after["polarctl_waiting_requests"] == 0
    assert after[done] - before[done] < 2000 * 20  # of about 2000 x 40
    time.sleep(0.2)
    assert server.meters()[done] <= after[done] + 512  # what was being computed
    assert server.ask(post(SMALL))[0] == 200


# -- its end --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_ends_it_whatever_clients_hold(tiny_rm, tmp_path):
    large = {**SMALL, "candidates": [{"output": f"{i} is so " * 60} for i in range(4096)]}
    del large["output"]
    options = ["--batch-tokens", "64"]
    with serving(tiny_rm, tmp_path, *options) as served, contextlib.ExitStack() as stack:
        working = [stack.enter_context(served.open(post(large))) for _ in range(6)]
        eventually(lambda: served.meters()["polarctl_waiting_requests"] > 0, 120)
        opened = [
            [stack.enter_context(served.open(data)) for _ in range(60)]
            for data in (b"", HALF_HEAD, HALF_BODY)
        ]
        stack.enter_context(served.open(UNTAKEN, buffer=4096))
        working.append(stack.enter_context(served.open(post(SMALL))))
        for _ in range(3):  # what was sent before has been read by then
            assert served.ask(get("/health"))[0] == 200
        took = served.stop()
        assert took < 5
        said = [[everything(made) for made in group] for group in opened]
        assert {*said[0], *said[1]} == {b""}
        for reply in said[2]:
            assert reply.startswith(b"HTTP/1.1 503 ") and b"the server is stopping" in reply
        for made in working[:-1]:
            status, headers, body = reply_of(made)
            assert status == 503 and b"the server is stopping" in body
            assert headers["retry-after"] == "1"
        assert reply_of(working[-1])[0] == 200
        with pytest.raises(ConnectionRefusedError):
            served.open()
    assert served.said.count("\n") <= 4
    print(f"SIGTERM: {took:.2f} s")


@pytest.mark.slow
@pytest.mark.parametrize("files", [64, 256])
def test_few_open_files_are_said_once(files, tiny_rm, tmp_path):
    with serving(tiny_rm, tmp_path, "--request-timeout", "3", files=files) as served:
        before = served.said.count("\n")
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(served.open())
            for _ in range(5):
                time.sleep(1)
                with contextlib.suppress(OSError):
                    stack.enter_context(served.open(HALF_HEAD))
        assert served.said.count("\n") - before <= 2
        assert re.search(r"\d connections in place of 1,024: `ulimit -n` is ", served.said)
        eventually(lambda: served.ask(post(SMALL))[0] == 200)
        assert served.stop() < 8


@pytest.mark.slow
def test_memory_of_large_requests_is_bounded(tiny_rm, tmp_path):
    large = json.dumps([{**SMALL, "note": "o" * 300_000}] * 100).encode()
    with serving(tiny_rm, tmp_path) as served:
        served.ask(post(SMALL))
        base, kept = served.mib(), []
        for _ in range(4):
            with contextlib.ExitStack() as stack:
                for _ in range(60):
                    half = stack.enter_context(served.open(post(b"[", 31 * MIB)))
                    half.settimeout(0.2)  # who is refused is not read further
                    with contextlib.suppress(OSError):
                        half.sendall(b" " * (30 * MIB))
                assert served.mib() - base < 400  # 1,800 MiB have been offered
            with ThreadPoolExecutor(6) as pool:
                statuses = {one[0] for one in pool.map(served.ask, [post(large)] * 12)}
            assert statuses <= {200, 503}
            time.sleep(3)
            kept.append(served.mib())
        assert max(kept) - base < 400 and kept[-1] - kept[0] < 100, kept
        print(f"MiB: {base:.0f}, then {kept}")


# -- many clients for long ------------------------------------------------------------------------

FAULTS_SERVE_SECONDS = float(os.environ.get("FAULTS_SERVE_SECONDS", "20"))
WORDS = "the sea was calm and nobody knew why it had been so loud before noon".split()


def offline(model, draw, count):
    """Records, and their rewards by transformers alone, each by itself."""
    import torch
    from transformers import AutoModelForSequenceClassification

    encoder = reward_model.load_encoder(str(model))
    scorer = AutoModelForSequenceClassification.from_pretrained(model)
    records, rewards = [], []
    for _ in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(3)]
        records.append(dict(zip(("prompt", "reference", "output"), texts, strict=True)))
        with torch.inference_mode():
            rewards.append(scorer(torch.tensor([encoder.encode(*texts)])).logits.item())
    return records, rewards


class Crowd:
    """Clients that ask until a time has come; one in twenty of their requests is given up."""

    def __init__(self, place, records, rewards, seed):
        self.place, self.records, self.rewards = place, records, rewards
        self.seed, self.waits, self.left, self.worst = seed, [], 0, 0.0

    async def run(self, clients, until):
        await asyncio.gather(*(self.client(number, until) for number in range(clients)))

    async def client(self, number, until):
        draw, streams = random.Random(f"{self.seed} {number}"), None
        while time.monotonic() < until:
            streams = streams or await asyncio.open_connection(*self.place)
            reader, writer = streams
            chosen = draw.sample(range(len(self.records)), draw.randint(1, 4))
            data = post([self.records[i] for i in chosen])
            gives_up = draw.random() < 0.05
            start = time.monotonic()
            writer.write(data[: draw.randint(1, len(data))] if gives_up else data)
            if gives_up:
                await asyncio.sleep(draw.random() / 2)
                writer.close()
                streams, self.left = None, self.left + 1
                continue
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            length = re.search(rb"content-length: (\d+)", head)
            found = json.loads(await reader.readexactly(int(length[1])))
            self.waits.append(time.monotonic() - start)
            for record, i in zip(found, chosen, strict=True):
                off = abs(record["reward"] - self.rewards[i])
                self.worst = max(self.worst, off)
                assert off < 1e-5
        if streams:
            streams[1].close()


@pytest.mark.slow
def test_500_clients_each_get_their_own_rewards(tiny_rm, tmp_path):
    seed = int(os.environ.get("FAULTS_SEED", "0"))
    print(f"FAULTS_SEED={seed} FAULTS_SERVE_SECONDS={FAULTS_SERVE_SECONDS:g}")
    records, rewards = offline(tiny_rm, random.Random(seed), 200)
    sizes = []
    with serving(tiny_rm, tmp_path) as served:
        crowd = Crowd(served.place, records, rewards, seed)
        start = time.monotonic()
        until = start + FAULTS_SERVE_SECONDS

        async def measured():
            while time.monotonic() < until:
                sizes.append(served.mib())
                await asyncio.sleep(1)

        async def both():
            await asyncio.gather(measured(), crowd.run(500, until))

        asyncio.run(both())
        took = served.stop()
        waits = sorted(crowd.waits)
        print(
            f"{len(waits):,} replies, {crowd.left:,} given up; rewards off by {crowd.worst:.1e}; "
            f"p50 {waits[len(waits) // 2]:.2f} s, p99 {waits[len(waits) * 99 // 100]:.2f} s; MiB "
            f"{sizes[0]:.0f} at the start, {sizes[len(sizes) // 4]:.0f} after a quarter, "
            f"{sizes[-1]:.0f} at the end, {max(sizes):.0f} at most; SIGTERM: {took:.2f} s"
        )
        assert len(waits) > 500 and crowd.left > 10
        assert sizes[-1] - sizes[len(sizes) // 4] < 64
        assert took < 5
        assert served.said.count("\n") <= 4, served.said
