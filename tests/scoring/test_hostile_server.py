"""Replies that are no rewards never become one, and no run mixes two models."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from scoring.faulty_server import serving

from polarctl import verl_reward
from polarctl.cli import run
from polarctl.errors import PolarctlError, UsageError
from polarctl.model import reward_model
from polarctl.scoring.server import ServerScorer

KEY = "sk-" + "S3ntinel" * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "groups.jsonl"
    with open(path, "w") as stream:
        for i in range(12):
            outputs = [{"output": f"{i} {k}"} for k in range(1 + i % 5)]
            row = {"prompt": f"question {i}", "reference": "yes", "candidates": outputs}
            stream.write(json.dumps(row) + "\n")
    return path


def arguments(data, tiny_rm, out, url, *options):
    return ["score", str(data), "-m", str(tiny_rm), "-o", str(out), "--server", url, *options]


@pytest.fixture(scope="module", params=["vllm", "sglang", "lmdeploy"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def healthy(kind, data, tiny_rm, tmp_path_factory):
    out = tmp_path_factory.mktemp("healthy") / "scores.jsonl"
    with serving(kind) as server:
        assert run(arguments(data, tiny_rm, out, server.url, "-q")) == 0
    return out.read_bytes()


# -- replies --------------------------------------------------------------------------------------


def rows(kind, rewards, first):
    """A good reply, but for what stands where the first reward belongs (as JSON text)."""
    values = [first, *map(str, rewards[1:])]
    if kind == "sglang":
        return "[" + ", ".join(f'{{"embedding": {value}}}' for value in values) + "]"
    name = {"vllm": "probs", "lmdeploy": "data"}[kind]
    found = [f'{{"index": {i}, "{name}": {value}}}' for i, value in enumerate(values)]
    return '{"data": [' + ", ".join(found) + "]}"


BAD_REWARDS = {
    "false": "[false]",
    "true": "[true]",
    "text": '["1.5"]',
    "bare text": '"1.5"',
    "two classes": "[0.25, 0.75]",
    "no class": "[]",
    "null": "[null]",
    "a list in it": "[[1.0]]",
    "an object": '{"score": 1}',
    "1e400": "[1e400]",
    "400 digits": "[" + "9" * 400 + "]",
    "5000 digits": "[" + "9" * 5000 + "]",
    "NaN": "[NaN]",
    "Infinity": "[-Infinity]",
    "deep": "[" * 50_000 + "]" * 50_000,
    "twice": '[1.0], "probs": [2.0], "data": [2.0], "embedding": [2.0]',
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_what_is_no_reward_is_asked_for_again(name, kind, data, tiny_rm, healthy, tmp_path):
    def answer(handler, rewards):
        handler.reply(200, rows(kind, rewards, BAD_REWARDS[name]).encode())

    out = tmp_path / "scores.jsonl"
    with serving(kind, hostile=answer) as server:
        assert run(arguments(data, tiny_rm, out, server.url)) == 0
    assert out.read_bytes() == healthy


def indexed(rewards, index, **more):
    found = [{"index": index(i), "probs": [r]} for i, r in enumerate(rewards)]
    return {"data": found, **more}


BAD_REPLIES = {
    "index as text": lambda r: indexed(r, str),
    "repeated index": lambda r: indexed(r, lambda i: max(i, 1)),
    "index as a boolean": lambda r: indexed(r, lambda i: i if i > 1 else bool(i)),
    "index as a fraction": lambda r: indexed(r, float),
    "index from one": lambda r: indexed(r, lambda i: i + 1),
    "negative index": lambda r: indexed(r, lambda i: -1 - i),
    "error beside zeros": lambda r: indexed([0.0] * len(r), int, error={"message": "no memory"}),
    "detail beside zeros": lambda r: indexed([0.0] * len(r), int, detail="not ready"),
    "an error object": lambda r: indexed(r, int, object="error"),
    "error in a row": lambda r: {
        "data": [{**row, "error": "x"} for row in indexed(r, int)["data"]]
    },
    "no index": lambda r: {"data": [{"probs": [one]} for one in r]},
    "rows that are numbers": lambda r: {"data": r},
    "no rows": lambda r: {"data": None},
    "a list": lambda r: indexed(r, int)["data"],
    "a number": lambda r: 1.5,
    "a model that is no name": lambda r: indexed(r, int, model=7),
}


@pytest.fixture(scope="module")
def plain(data, tiny_rm, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "scores.jsonl"
    with serving() as server:
        assert run(arguments(data, tiny_rm, out, server.url, "-q")) == 0
    return out.read_bytes()


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_is_asked_for_again(name, data, tiny_rm, plain, tmp_path):
    def answer(handler, rewards):
        handler.reply(200, BAD_REPLIES[name]([r + 1 for r in rewards]))  # wrong if it is taken

    out = tmp_path / "scores.jsonl"
    with serving(hostile=answer) as server:
        assert run(arguments(data, tiny_rm, out, server.url)) == 0
    assert out.read_bytes() == plain


def bomb(handler, rewards):
    handler.reply(200, gzip.compress(b"[" * (64 << 20)), Content_Encoding="gzip")


def endless(handler, rewards):
    handler.reply(200, b" " * (17 << 20))


def drip(handler, rewards):
    """A byte at a time, for 20 s."""
    handler.send_response(200)
    handler.send_header("Content-Length", "200")
    handler.end_headers()
    handler.close_connection = True
    for _ in range(200):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return
        time.sleep(0.1)


@pytest.mark.parametrize("answer", [bomb, endless, drip], ids=lambda one: one.__name__)
def test_size_and_time_of_a_reply_are_bounded(answer, data, tiny_rm, plain, tmp_path):
    out = tmp_path / "scores.jsonl"
    start = time.monotonic()
    with serving(hostile=answer) as server:
        assert run(arguments(data, tiny_rm, out, server.url, "--server-deadline", "4.5")) == 0
    assert time.monotonic() - start < 15
    assert out.read_bytes() == plain


def test_a_server_that_gives_no_rewards_at_all_ends_the_run(data, tiny_rm, tmp_path, capfd):
    def answer(handler, rewards):
        handler.reply(200, indexed([False] * len(rewards), int))

    out = tmp_path / "scores.jsonl"
    with serving(hostile=answer, always=True) as server:
        options = ["--server-deadline", "0.5"]
        assert run(arguments(data, tiny_rm, out, server.url, *options)) == 4
    assert "no good reply for 0.5 s (a reward that is no number)" in capfd.readouterr().err
    assert not out.exists()


# -- one model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "in.jsonl"
    row = {"reference": "yes", "output": "no"}
    with open(path, "w") as stream:  # 4 windows
        stream.writelines(json.dumps({"prompt": f"q{i}", **row}) + "\n" for i in range(2048))
    return path


@pytest.fixture(scope="module")
def whole(many, tiny_rm, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "scores.jsonl"
    with serving() as server:
        assert run(arguments(many, tiny_rm, out, server.url, "-q")) == 0
    return out.read_bytes()


def killed(server, many, tiny_rm, out):
    """Start the run against a server, and kill it after the first windows."""
    server.seconds = 0.1
    child = subprocess.Popen(
        [sys.executable, "-m", "polarctl", *arguments(many, tiny_rm, out, server.url)],
        stderr=subprocess.PIPE,
    )
    journal = out.with_name(out.name + ".journal")
    while child.poll() is None:
        if out.exists() and journal.read_bytes().count(b"\n") > 1:
            break
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    _, said = child.communicate()
    assert child.returncode == -signal.SIGKILL, said
    while server.open:  # the last requests of the dead are none of the next run
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"model": "rm-2"}, "served_model"),
        ({"root": "/models/rm-2"}, "served_root"),
        ({"shift": 0.5}, "served_probe"),
        ({"kind": "polarctl"}, "served_by"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else one,
)
def test_a_resume_with_another_model_behind_the_address_is_refused(
    other, field, many, tiny_rm, whole, tmp_path, capfd
):
    out = tmp_path / "scores.jsonl"
    with serving() as server:
        killed(server, many, tiny_rm, out)
        port = server.server_address[1]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert whole.startswith(before["scores.jsonl"]) and before["scores.jsonl"]
    with serving(port=port, **other) as server:
        assert run(arguments(many, tiny_rm, out, server.url)) == 2
    said = capfd.readouterr().err
    assert f"cannot resume {out}: `{field}` was " in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # The same model elsewhere, whose batches change the last digits: the run goes on.
    with serving(shift=0.001) as server:
        assert run(arguments(many, tiny_rm, out, server.url, "-q")) == 0
    found = [json.loads(line)["reward"] for line in out.read_bytes().splitlines()]
    wanted = [json.loads(line)["reward"] for line in whole.splitlines()]
    assert found == pytest.approx(wanted, abs=0.002)


def test_a_complete_output_needs_no_server(many, tiny_rm, tmp_path, capfd):
    out = tmp_path / "scores.jsonl"
    with serving() as server:
        assert run(arguments(many, tiny_rm, out, server.url, "-q")) == 0
        address = server.url
    assert run(arguments(many, tiny_rm, out, address)) == 0
    assert "complete already" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "scores.jsonl.manifest.json").read_text())
    assert manifest["fingerprint"]["served_root"] == "/models/rm"


def test_a_reply_by_another_model_ends_the_run(many, tiny_rm, whole, tmp_path, capfd):
    def renamed(handler, rewards):
        """The last of four windows is answered by another."""
        name = "rm" if server.seen["hostile"] < 56 else "rm-2"
        if name == "rm-2":
            refused.append(tuple(rewards))
        handler.reply(200, indexed(rewards, int, model=name))

    out, refused = tmp_path / "scores.jsonl", []
    with serving(hostile=renamed, always=True) as server:
        assert run(arguments(many, tiny_rm, out, server.url)) == 1
    assert 0 < len(set(refused)) == len(refused) <= 16  # no second try, no other window
    assert "a reply is by the model `rm-2`, the ones before by `rm`" in capfd.readouterr().err
    assert whole.startswith(out.read_bytes())


def test_a_server_started_anew_with_other_weights_ends_the_run(
    many, tiny_rm, whole, tmp_path, capfd
):
    def gone(handler, rewards):
        """The first of a window's requests finds nobody; who comes back is another."""
        if len(rewards) == 8:
            probes.append(rewards)
        if len(rewards) == 8 or not probes:  # the probe, and what was asked before it
            handler.reply(200, indexed(rewards, int))
            return
        server.hostile, server.shift = None, 3.0
        handler.close_connection = True
        handler.connection.shutdown(2)

    out, probes = tmp_path / "scores.jsonl", []
    with serving() as server:
        killed(server, many, tiny_rm, out)
        done = out.read_bytes()
        server.seen["hostile"] = 1  # `gone` is to see the probe too
        server.hostile, server.always, server.seconds = gone, True, 0.0
        assert run(arguments(many, tiny_rm, out, server.url)) == 1
    said = capfd.readouterr().err
    assert "serves another model than at the start: `served_probe` was" in said
    assert out.read_bytes() == done and whole.startswith(done)


# -- a failure is not for ever --------------------------------------------------------------------


def test_after_a_refusal_the_scorer_is_as_patient_as_before(tiny_rm):
    encoder = reward_model.load_encoder(str(tiny_rm))
    ids = [[encoder.encode("Why?", "So.", "No.")]]
    with serving() as server:
        scorer = ServerScorer(server.url, encoder, deadline_s=20)
        wanted = scorer.rewards_of(ids)
        server.refuse = True
        with pytest.raises(PolarctlError, match="status 400"):
            scorer.rewards_of(ids)
        server.refuse, server.share = False, 0.7
        for _ in range(5):
            assert scorer.rewards_of(ids) == wanted
        scorer.close()
        assert scorer.remote.again > 3


def test_the_reward_of_verl_outlives_a_refusal(tiny_rm):
    given = {"data_source": "x", "solution_str": "So.", "ground_truth": "Because."}
    given |= {"extra_info": {"prompt": "Why?"}, "model": str(tiny_rm), "server_deadline": 20}
    with serving() as server:
        wanted = verl_reward.compute_score(url=server.url, **given)
        server.refuse = True
        with pytest.raises(PolarctlError, match="status 400"):
            verl_reward.compute_score(url=server.url, **given)
        server.refuse, server.share = False, 0.7
        for _ in range(5):
            assert verl_reward.compute_score(url=server.url, **given) == wanted


# -- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["plain", "json"])
def test_a_refusal_that_echoes_the_key_is_cleaned(
    options, data, tiny_rm, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("POLARCTL_SERVER_KEY", KEY)
    with serving(refuse=True) as server:
        out = tmp_path / "scores.jsonl"
        assert run(arguments(data, tiny_rm, out, server.url, *options)) == 1
        assert server.keys == {f"Bearer {KEY}"}
    said = capfd.readouterr().err
    assert "no such input" in said and "Bearer ***" in said
    assert KEY not in said and "\x1b" not in said and "\x07" not in said and "\u202e" not in said


@pytest.mark.parametrize("backend", ["hf", "principle"])
@pytest.mark.parametrize(
    "url", ["http://me:PaSsW0rd@{}", "http://PaSsW0rd@{}", "http://a:b/PaSsW0rd@{}"]
)
def test_an_address_with_a_password_is_refused_unseen(
    backend, url, data, tiny_rm, tmp_path, capfd, monkeypatch
):
    out = tmp_path / "scores.jsonl"
    with serving() as server:
        url = url.format(server.url.removeprefix("http://"))
        options = ["--backend", backend, "--dry-run"]
        for more in (options, options[:2]):
            assert run(arguments(data, tiny_rm, out, url, *more)) == 2
        assert not server.seen
    said = capfd.readouterr().err
    assert "PaSsW0rd" not in said and "holds a user or a password" in said
    assert "goes into POLARCTL_SERVER_KEY" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["", "here", "ftp://here", "http://", "http://a:b", "http://a?k=v"])
def test_what_is_no_address_is_refused(url, tiny_rm):
    with pytest.raises(UsageError, match="no address"):
        ServerScorer(url, reward_model.load_encoder(str(tiny_rm)))


def test_a_key_that_cannot_be_a_header_is_refused_unseen(tiny_rm, monkeypatch):
    monkeypatch.setenv("POLARCTL_SERVER_KEY", "sk-a\nb")
    with pytest.raises(UsageError) as caught:
        ServerScorer("http://127.0.0.1:1", reward_model.load_encoder(str(tiny_rm)))
    assert "sk-a" not in str(caught.value)


def test_a_model_that_the_server_does_not_list_is_refused(data, tiny_rm, tmp_path, capfd):
    with serving() as server:
        options = ["--server-model", "rm-2"]
        assert run(arguments(data, tiny_rm, tmp_path / "o.jsonl", server.url, *options)) == 2
    assert "no model `rm-2` there" in capfd.readouterr().err
