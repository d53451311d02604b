"""`polarctl score --server` against servers that fail in every way we know."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest
from scoring.faulty_server import FAULTS, reward_of, serving

from polarctl.cli import run
from polarctl.model import reward_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "groups.jsonl"
    rows = [
        {
            "prompt": f"question {i}",
            "reference": "yes",
            "candidates": [{"output": f"{i} {k}"} for k in range(1 + i % 5)],
        }
        for i in range(700)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score(data, tiny_rm, out, server, *options):
    return run(
        [
            *["score", str(data), "-m", str(tiny_rm), "-o", str(out)],
            *["--server", server if isinstance(server, str) else server.url, *options],
        ]
    )


@pytest.fixture(scope="module")
def healthy(data, tiny_rm, tmp_path_factory):
    out = tmp_path_factory.mktemp("healthy") / "scores.jsonl"
    with serving() as server:
        assert score(data, tiny_rm, out, server, "-q") == 0
    return out.read_bytes()


def test_rewards_are_those_of_the_inputs_that_every_engine_gets(data, tiny_rm, healthy):
    encoder = reward_model.load_encoder(str(tiny_rm))
    for row in map(json.loads, healthy.splitlines()[:20]):
        for candidate, reward in zip(row["candidates"], row["rewards"], strict=True):
            ids = encoder.encode(row["prompt"], row["reference"], candidate["output"])
            assert reward == pytest.approx(reward_of(ids))


@pytest.mark.slow
def test_a_faulty_server_gives_the_same_bytes_as_a_healthy_one(
    data, tiny_rm, healthy, tmp_path, capfd
):
    out = tmp_path / "scores.jsonl"
    with serving(share=0.5) as server:
        assert score(data, tiny_rm, out, server) == 0
        assert set(FAULTS) <= set(server.seen)  # each kind of fault came
    assert out.read_bytes() == healthy
    assert "requests had to be sent again" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["sglang", "lmdeploy"])
def test_other_servers_get_the_glued_text(kind, data, tiny_rm, tmp_path, capfd):
    out = tmp_path / "scores.jsonl"
    with serving(kind, share=0.1) as server:
        assert score(data, tiny_rm, out, server, "--limit", "30") == 0
        assert f"server: {kind} ({server.url} says so)" in capfd.readouterr().err
    row = json.loads(out.read_text().splitlines()[7])
    encoder = reward_model.load_encoder(str(tiny_rm))
    for candidate, reward in zip(row["candidates"], row["rewards"], strict=True):
        text = encoder.text(row["prompt"], row["reference"], candidate["output"])
        assert reward == pytest.approx(reward_of(text))


def test_a_refusal_ends_the_run_after_one_try(data, tiny_rm, tmp_path, capfd):
    with serving(refuse=True) as server:
        assert score(data, tiny_rm, tmp_path / "o.jsonl", server) == 1
        assert server.seen["requests"] == 1
    assert "status 400" in capfd.readouterr().err


def test_a_dead_server_ends_the_run_within_the_deadline(data, tiny_rm, tmp_path, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    start = time.monotonic()
    options = ["--server-deadline", "1"]
    assert score(data, tiny_rm, tmp_path / "o.jsonl", url, *options) == 4
    assert time.monotonic() - start < 10
    assert "no server answers" in capfd.readouterr().err


def test_a_server_that_dies_half_way_keeps_what_was_paid_for(tiny_rm, tmp_path):
    out, data = tmp_path / "scores.jsonl", tmp_path / "many.jsonl"
    row = {"reference": "yes", "output": "no"}
    with open(data, "w") as stream:  # 16 windows; three are asked for at a time
        stream.writelines(json.dumps({"prompt": f"q{i}", **row}) + "\n" for i in range(8192))
    with serving() as server:
        assert score(data, tiny_rm, tmp_path / "whole.jsonl", server, "-q") == 0
        healthy = (tmp_path / "whole.jsonl").read_bytes()
        port = server.server_address[1]

        child = subprocess.Popen(
            [
                *[sys.executable, "-m", "polarctl", "score", data, "-m", tiny_rm, "-o", out],
                *["--server", server.url, "--server-deadline", "1.5"],
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        while child.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.002)
        server.share = 1.0  # the windows that are asked for later find it broken
        _, said = child.communicate(timeout=60)
    if child.returncode == 0:
        pytest.fail("the run was over before the server died")
    assert child.returncode == 4, said
    assert healthy.startswith(out.read_bytes()) and out.stat().st_size
    with serving(port=port, share=0.1) as server:
        assert score(data, tiny_rm, out, server, "-q") == 0
    assert out.read_bytes() == healthy


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_and_the_requests_under_way(
    number, status, data, tiny_rm, healthy, tmp_path
):
    out = tmp_path / "scores.jsonl"
    with serving(seconds=0.8) as server:  # 66 requests, 4 at a time: 13 s
        child = subprocess.Popen(
            [
                *[sys.executable, "-m", "polarctl", "score", data, "-m", tiny_rm, "-o", out],
                *["--server", server.url, "--concurrency", "4"],
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        while server.seen["requests"] < 6:
            time.sleep(0.01)
        start = time.monotonic()
        child.send_signal(number)
        said = next(line for line in child.stderr if "stopped by" in line)
        assert time.monotonic() - start < 6
        child.communicate(timeout=60)  # Python's own end, with torch loaded, takes its time
        assert child.returncode == status, said
    with serving() as server:
        assert score(data, tiny_rm, out, server, "-q") == 0
    assert out.read_bytes() == healthy


def test_a_request_that_hangs_while_nothing_else_is_under_way_is_asked_again(
    data, tiny_rm, healthy, tmp_path, capfd
):
    out = tmp_path / "scores.jsonl"
    options = ["--limit", "8", "--server-deadline", "6"]
    with serving(hangs=(2,), hang_s=9) as server:  # the first asks who is there
        assert score(data, tiny_rm, out, server, *options) == 0
        assert server.seen["requests"] == 4  # and once more: is it the same model after that?
    assert healthy.startswith(out.read_bytes()) and out.stat().st_size
    assert "1 requests had to be sent again" in capfd.readouterr().err


def test_a_sigmoid_is_refused_with_the_reason(data, tiny_rm, tmp_path, capfd):
    with serving(sigmoid=True) as server:
        assert score(data, tiny_rm, tmp_path / "o.jsonl", server) == 2
    said = capfd.readouterr().err
    assert "a sigmoid of the reward" in said and "regression" in said
    assert not (tmp_path / "o.jsonl").exists() or not (tmp_path / "o.jsonl").stat().st_size


def test_the_key_comes_from_the_environment_and_is_never_said(
    data, tiny_rm, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("POLARCTL_SERVER_KEY", "sentinel-secret")
    out = tmp_path / "scores.jsonl"
    with serving() as server:
        assert score(data, tiny_rm, out, server, "--limit", "5", "-v") == 0
        assert server.keys == {"Bearer sentinel-secret"}
    for path in tmp_path.iterdir():
        assert b"sentinel-secret" not in path.read_bytes()
    assert "sentinel-secret" not in capfd.readouterr().err


def test_an_unknown_kind_of_server_is_asked_about(data, tiny_rm, tmp_path, capfd):
    with serving("something") as server:
        assert score(data, tiny_rm, tmp_path / "o.jsonl", server) == 2
    assert "--server-type vllm, sglang, lmdeploy, polarctl" in capfd.readouterr().err
