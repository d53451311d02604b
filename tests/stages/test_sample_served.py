"""`polarctl sample` with policies behind an OpenAI-compatible server."""

import json
from collections import Counter
from pathlib import Path

import orjson
import pytest
from completion_server import CompletionServer, reply_to

from polarctl import cli, seeding
from polarctl.records import Trajectory, check, prompt_id
from polarctl.stages import sample

PROMPTS = [{"prompt": f"The number is {n}"} for n in range(10)]


def write_jsonl(path, records):
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return str(path)


def read_jsonl(path):
    return [orjson.loads(line) for line in Path(path).read_bytes().splitlines()]


@pytest.fixture
def server():
    with CompletionServer() as made:
        yield made


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(sample, "WINDOW_ROWS", 4)


def run(folder, url, *more, prompts=PROMPTS, lines=None, out="out.jsonl"):
    """Status of a run over prompts; `lines` are those of the pool, without the address."""
    rows = lines or [{"policy": "p", "model": "m", "kind": "base"}]
    pool = [{"backend": "openai", "url": url, **row} for row in rows]
    names = write_jsonl(folder / "prompts.jsonl", prompts), write_jsonl(folder / "pool.jsonl", pool)
    base = ["sample", names[0], "--pool", names[1], "-o", str(folder / out)]
    return cli.run([*base, "--max-new-tokens", "9", *more])


def test_base_policies_are_asked_for_completions_and_chat_policies_for_answers(tmp_path, server):
    asked = [
        {"prompt": "Once upon a time", "mine": 1},
        {"prompt": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why"}]},
    ]
    lines = [
        {"policy": "b", "model": "m", "kind": "base", "top_k": 0, "group": "old"},
        {"policy": "c", "model": "m", "kind": "chat", "engine": {"user": "me", "top_p": None}},
    ]
    assert run(tmp_path, server.url, "--no-clean", prompts=asked, lines=lines) == 0
    seed = seeding.derive(0, "sample", "b", prompt_id(asked[0]), 1) % 2**31
    common = {"model": "m", "max_tokens": 9, "temperature": 1.0}
    base = {**common, "prompt": "Once upon a time", "top_p": 0.9, "seed": seed}
    sent = list(zip(server.paths, server.bodies, strict=True))
    assert ("/v1/completions", base) in sent
    chats = [body for path, body in sent if path == "/v1/chat/completions"]
    messages = [body["messages"] for body in chats]
    assert messages.count([{"role": "user", "content": "Once upon a time"}]) == 2
    assert messages.count(asked[1]["prompt"]) == 2
    assert {**chats[0], "seed": 0, "messages": 0} == {
        **common, "top_k": 50, "user": "me", "seed": 0, "messages": 0,
    }  # fmt: skip
    assert len({body["seed"] for body in server.bodies}) == 8
    made = read_jsonl(tmp_path / "out.jsonl")
    for record in made:
        check(record, Trajectory)
    found = next(r for r in made if r["output"] == f" time {seed}")
    assert found["finish_reason"] == ("length" if seed % 2 else "stop")
    assert (found["sample"], found["num_tokens"], found["mine"]) == (1, 2, 1)
    assert Counter((r["policy"], r.get("policy_group")) for r in made) == {
        ("b", "old"): 4,
        ("c", None): 4,
    }
    counts = json.loads((tmp_path / "out.jsonl.manifest.json").read_bytes())["counts"]
    # "Once upon a time" has 4 words, "Be brief\nWhy" 3; two samples each, two words in each answer.
    assert counts["policies"]["b"]["prompt_tokens"] == 2 * 4 + 2 * 3
    assert counts["policies"]["b"]["completion_tokens"] == 8
    assert counts["writers"]["c"]["url"] == server.url + "/v1"
    assert counts["writers"]["c"]["engine"] == {"user": "me", "top_p": None}


def test_a_server_of_vllm_counts_the_end_and_has_defaults_of_its_own(tmp_path, server):
    server.models = [{"id": "m", "owned_by": "vllm", "max_model_len": 7, "root": "x"}]
    lines = [{"policy": "p", "model": "m", "kind": "base", "top_k": 0}]
    assert run(tmp_path, server.url, "--no-clean", lines=lines) == 0
    body = server.bodies[0]
    assert (body["max_tokens"], body["top_k"], body["repetition_penalty"]) == (7, 0, 1.0)
    ends = {(r["finish_reason"], r["num_tokens"]) for r in read_jsonl(tmp_path / "out.jsonl")}
    assert ends == {("length", 2), ("stop", 1)}


def without(name, where=lambda reply: reply):
    """A good reply that lacks a field."""

    def fault(body):
        reply = reply_to("/v1/completions", body)
        del where(reply)[name]
        return reply

    return fault


def test_faults_that_pass_leave_no_trace_in_the_records(tmp_path, server, capfd):
    assert run(tmp_path, server.url, out="good.jsonl") == 0
    bad = [
        without("usage"),
        without("finish_reason", lambda reply: reply["choices"][0]),
        without("text", lambda reply: reply["choices"][0]),
        without("choices"),
        lambda body: b"<html>",
        lambda body: {**reply_to("/v1/completions", body), "usage": {"completion_tokens": "2"}},
        lambda body: {**reply_to("/v1/completions", body), "error": {"message": "no"}},
    ]
    server.change = lambda body, reply: bad.pop()(body) if bad else reply
    server.faults = [(429, {}, {"Retry-After": "0.01"}), (500, b"x"), (503, b""), "reset"]
    assert run(tmp_path, server.url) == 0
    assert not bad and not server.faults
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "good.jsonl").read_bytes()
    assert "11 requests had to be sent again" in capfd.readouterr().err


def test_no_more_requests_than_asked_for_are_under_way(tmp_path, server):
    server.meet = 2
    assert run(tmp_path, server.url, "--concurrency", "2", "--samples", "4") == 0
    assert server.most_busy == 2


def test_a_dead_server_stops_the_run_and_the_same_command_goes_on(tmp_path, server, capfd):
    assert run(tmp_path, server.url, out="good.jsonl") == 0
    server.dies_after = len(server.bodies) + 13  # of 20: the first window of 4 x 2 is whole
    assert run(tmp_path, server.url, "--server-deadline", "0.2", "--concurrency", "1") == 4
    said = capfd.readouterr().err
    assert "no good reply for 0.2 s (status 503 out of breath)" in said
    assert "the same command goes on from here" in said and "Traceback" not in said
    half = (tmp_path / "out.jsonl").read_bytes()
    assert half.count(b"\n") == 8
    server.settle()
    server.dies_after = None
    server.bodies.clear()
    assert run(tmp_path, server.url) == 0
    assert len(server.bodies) == 12  # none is paid for twice
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "good.jsonl").read_bytes()
    counts = [
        json.loads((tmp_path / f"{name}.jsonl.manifest.json").read_bytes())["counts"]
        for name in ("good", "out")
    ]
    assert counts[0] == counts[1]


def test_another_model_after_an_interruption_is_refused(tmp_path, server, capfd):
    server.models = [{"id": "m", "root": "models/a"}]
    server.dies_after = 13
    assert run(tmp_path, server.url, "--server-deadline", "0.1", "--concurrency", "1") == 4
    server.dies_after = None
    server.models = [{"id": "m", "root": "models/b"}]
    assert run(tmp_path, server.url) == 2
    said = capfd.readouterr().err
    assert "`served_root` was 'models/a' and is now 'models/b'" in said


def test_the_key_comes_from_the_environment_and_is_never_said(tmp_path, server, capfd, monkeypatch):
    monkeypatch.setenv("POLARCTL_SERVER_KEY", "sk-0123456789abcdef")
    assert run(tmp_path, server.url) == 0
    assert set(server.keys) == {"Bearer sk-0123456789abcdef"}
    server.faults = [(401, {"error": {"message": "bad key sk-0123456789abcdef"}})] * 20
    assert run(tmp_path, server.url, out="other.jsonl") == 4
    said = capfd.readouterr().err
    assert "refuses the key" in said and "set POLARCTL_SERVER_KEY" in said
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert not any(b"0123456789" in text for text in (*files, said.encode()))


TOO_LONG = {"error": {"message": "This model's maximum context length is 5 tokens"}}


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (
            (400, TOO_LONG),
            3,
            "prompts.jsonl:1: policy `p` cannot take the prompt: 400 This model's",
        ),
        (
            (400, {"error": {"message": "unknown field top_k"}}),
            1,
            "answers 400 unknown field top_k",
        ),
        ((404, {"error": {"message": "no such model"}}), 4, "or no such API: 404 no such model"),
    ],
)
def test_a_refusal_ends_the_run_with_its_cause(tmp_path, server, capfd, fault, status, said):
    server.faults = [fault] * 20
    assert run(tmp_path, server.url, "--concurrency", "1") == status
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error
    assert len(server.bodies) < 20
    assert not (tmp_path / "out.jsonl").exists()


def test_what_a_policy_cannot_take_or_withholds_is_set_aside_once(tmp_path, server):
    def change(body, reply):
        if body["prompt"].endswith("3"):
            reply["choices"][0]["finish_reason"] = "content_filter"
        return reply

    server.change = change
    assert run(tmp_path, server.url, "--rejects", str(tmp_path / "bad.jsonl")) == 0
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 18
    (bad,) = read_jsonl(tmp_path / "bad.jsonl")
    assert bad["where"].endswith("prompts.jsonl:4") and "filtered" in bad["reason"]


def test_a_reply_by_another_model_ends_the_run(tmp_path, server, capfd):
    names = iter("mmmmx")
    server.change = lambda body, reply: {**reply, "model": next(names, "m")}
    assert run(tmp_path, server.url, "--concurrency", "1") == 1
    assert "a reply is by the model `x`, the ones before by `m`" in capfd.readouterr().err


def test_thinking_that_comes_apart_is_left_out_and_said(tmp_path, server, capfd):
    def change(body, reply):
        reply["choices"][0]["message"] |= {"reasoning_content": "Hm.", "content": "Yes."}
        return reply

    server.change = change
    assert run(tmp_path, server.url, lines=[{"policy": "c", "model": "m", "kind": "chat"}]) == 0
    assert {r["output"] for r in read_jsonl(tmp_path / "out.jsonl")} == {"Yes."}
    assert "its thinking comes apart" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "more", "status", "said"),
    [
        ({"model": "x"}, [], 4, "pool.jsonl:1: no model `x` at http"),
        ({"url": "ftp://x"}, [], 2, "pool.jsonl:1: `url`: `ftp://x` is no address"),
        ({"url": "http://me:pw@x"}, [], 2, "holds a user or a password"),
        ({"engine": {"seed": 1}}, [], 2, "pool.jsonl:1: `engine`: `seed` is set by the stage"),
        ({"engine": {"api_key": 1}}, [], 2, "a secret would be in the manifest"),
        ({}, ["--prefix-tokens", "4"], 2, "a server's policy has no tokenizer here"),
    ],
)
def test_a_bad_line_of_a_server_is_refused(tmp_path, server, capfd, line, more, status, said):
    lines = [{"policy": "p", "model": "m", "kind": "base", **line}]
    assert run(tmp_path, server.url, *more, lines=lines) == status
    error = capfd.readouterr().err
    assert said in error and "pw" not in error and "Traceback" not in error
    assert not server.bodies


def test_a_dry_run_asks_for_the_list_alone_and_counts(tmp_path, server, capfd):
    server.models = [{"id": "m", "max_model_len": 5}]
    asked = [*PROMPTS, {"prompt": "Hi", "wrapper": "sft"}]
    assert run(tmp_path, server.url, "--dry-run", "--samples", "3", prompts=asked) == 0
    said = capfd.readouterr().err
    assert "context 5; 10 prompts x 3" in said
    # 30 samples of 9 tokens at most, in a context of 5.
    assert "1 passes, 30 samples, 150 new tokens at most" in said
    assert not server.bodies and not (tmp_path / "out.jsonl").exists()
    assert run(tmp_path, "http://127.0.0.1:9", "--dry-run", "--server-deadline", "0") == 4
    assert "pool.jsonl:1: http://127.0.0.1:9/v1: no server answers" in capfd.readouterr().err


def test_prompts_may_be_piped_to_several_policies(tmp_path, server, monkeypatch):
    import io
    import sys

    lines = [{"policy": name, "model": "m", "kind": "base"} for name in "ab"]
    assert run(tmp_path, server.url, lines=lines) == 0
    data = (tmp_path / "prompts.jsonl").read_bytes()

    class Stdin(io.TextIOWrapper):
        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdin", Stdin(io.BufferedReader(io.BytesIO(data))))
    piped = ["sample", "-", "--pool", str(tmp_path / "pool.jsonl"), "--max-new-tokens", "9"]
    assert cli.run([*piped, "-o", str(tmp_path / "piped.jsonl")]) == 0
    assert (tmp_path / "piped.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
