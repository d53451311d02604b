"""The judge's server: faults that pass are met with patience, others at once; the key stays in."""

import time

import pytest
from judge_server import JudgeServer

from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.judging.chat import ChatServer
from polarctl.judging.parsing import Failure, Reply
from polarctl.judging.prompting import question

KEY = "sk-" + "S3ntinel" * 3
GOOD = {"message": {"content": "not this one"}, "finish_reason": "stop"}
ANSWER = '{"scores": {"model-1": 3}, "best-to-worst": ["model-1"]}'


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("POLARCTL_SERVER_KEY", raising=False)


def chat(server, **options):
    options = {"pause_s": 0.01, "deadline_s": 5, "timeout_s": 5} | options
    return ChatServer(server.url, "judge", **options)


def ask(asker, *texts):
    questions = [question("p", "q", [text], ["model-1"]) for text in texts or ["a!!"]]
    return asker.ask(questions, list(range(len(questions))))


def test_many_questions_are_under_way_at_once_and_answered_in_order(server):
    def slow(asked):
        time.sleep(0.02)
        return asked["responses"]["model-1"]

    server.reply = slow
    texts = [f"text {i}" for i in range(24)]
    assert ask(chat(server, concurrency=4), *texts) == [Reply(text) for text in texts]
    assert server.most_busy == 4


def test_the_request_is_what_openai_servers_take(server):
    ask(chat(server, temperature=0.5, max_new_tokens=77))
    (body,) = server.bodies
    assert body["model"] == "judge" and body["max_tokens"] == 77 and body["temperature"] == 0.5
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert server.keys == [None]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_address_is_taken_with_or_without_its_path(server, path):
    asker = ChatServer(server.url + path, "judge")
    assert asker.url == f"{server.url}/v1/chat/completions"


@pytest.mark.parametrize("url", ["", "host:80", "ftp://host", "http://", "http://me:word@host/v1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError, match="--server") as caught:
        ChatServer(url, "judge")
    assert "word" not in str(caught.value).replace("password", "")


def test_thinking_and_cut_answers_are_told_apart(server):
    server.message = {"reasoning_content": "so"}
    server.finish_reason = "length"
    server.reply = lambda asked: ANSWER
    assert ask(chat(server)) == [Reply(ANSWER, "so", finished=False)]
    server.reply = lambda asked: None  # all tokens went into the thinking
    assert ask(chat(server)) == [Reply("", "so", finished=False)]
    server.finish_reason = "stop"
    assert ask(chat(server)) == [Failure("the judge's answer has no text")]


@pytest.mark.parametrize(
    "fault",
    [
        "reset",
        (500, {"error": "busy"}),
        (503, b"<html>"),
        (408, b""),
        (429, b"", {"Retry-After": "0"}),
        (200, b'{"choices": ['),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": 3}}]}),
        (200, [1]),
        (200, b"[" * 100_000),
        (200, {"error": {"message": "no memory"}, "choices": [GOOD]}),
        (200, {"choices": [GOOD, GOOD]}),
        (200, {"choices": [{**GOOD, "finish_reason": "abort"}]}),
        (200, {"choices": [{**GOOD, "finish_reason": 1}]}),
        (200, {"choices": [GOOD], "model": 7}),
        (200, b'{"choices": [{"message": {"content": "x"}, "logprobs": NaN}]}'),
        (200, b'{"choices": [{"message": {"content": "x"}}], "n": ' + b"9" * 5000 + b"}"),
        (200, b"{}", {"Content-Encoding": "gzip"}),
    ],
    ids=str,
)
def test_a_fault_that_passes_costs_a_second_request(server, fault):
    server.faults = [fault]
    (reply,) = ask(chat(server))
    assert isinstance(reply, Reply) and '"model-1": 3' in reply.text
    assert len(server.bodies) == 2


def test_a_stalled_answer_is_asked_for_again(server):
    server.faults = ["stall"]
    (reply,) = ask(chat(server, timeout_s=0.2))
    assert isinstance(reply, Reply) and len(server.bodies) == 2


def test_retry_after_is_kept(server):
    server.faults = [(429, b"", {"Retry-After": "1"})]
    started = time.monotonic()
    ask(chat(server))
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, PolarctlError, "answers 400 no such field"),
        (301, PolarctlError, "answers 301"),
        (401, MissingError, "refuses the key: 401 no such field"),
        (404, MissingError, "no model `judge`"),
    ],
)
def test_another_refusal_ends_the_run_at_once(server, status, error, message):
    server.faults = [(status, {"error": {"message": "no such\nfield"}})] * 5
    with pytest.raises(error, match=message):
        ask(chat(server, concurrency=1), "a", "b", "c")
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "refusal",
    [(413, b"too large"), (400, {"error": {"message": "maximum context length is 8"}})],
    ids=str,
)
def test_a_question_that_is_too_long_is_its_records_error(server, refusal):
    server.faults = [refusal]
    first, second = ask(chat(server, concurrency=1), "a", "b")
    assert isinstance(first, Failure) and "cannot take the question" in first.reason
    assert isinstance(second, Reply)


def test_a_dead_server_ends_the_run_at_the_deadline():
    with JudgeServer() as gone:
        pass
    started = time.monotonic()
    with pytest.raises(MissingError, match="no server answers") as caught:
        ask(chat(gone, deadline_s=0.3))
    assert caught.value.exit_status == 4 and time.monotonic() - started < 5


def test_the_key_is_sent_and_never_said(server, monkeypatch, capsys):
    monkeypatch.setenv("POLARCTL_SERVER_KEY", f" {KEY}\n")
    asker = chat(server)
    server.faults = [(500, {"error": {"message": f"bad {KEY}"}})]
    ask(asker)
    assert set(server.keys) == {f"Bearer {KEY}"}
    server.faults = [(403, {"error": {"message": f"key {KEY} has expired"}})]
    with pytest.raises(MissingError, match=r"key \*\*\* has expired") as caught:
        ask(asker)
    said = capsys.readouterr()
    assert KEY not in said.out + said.err + str(caught.value) + str(caught.value.hint)
    assert all(KEY not in str(body) for body in server.bodies)


def test_a_key_that_cannot_be_a_header_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("POLARCTL_SERVER_KEY", "sk-a\nb")
    with pytest.raises(UsageError) as caught:
        ChatServer("http://host", "judge")
    assert "sk-a" not in str(caught.value)


def test_an_answer_by_another_model_ends_the_run(server):
    server.named = "judge-2025"  # not the name that was asked for: an alias
    asker = chat(server, concurrency=1)
    assert asker.served()["served_as"] == "judge-2025"
    assert isinstance(ask(asker)[0], Reply)
    server.named = "judge-2026"
    with pytest.raises(PolarctlError, match="by the model `judge-2026`") as caught:
        ask(asker)
    assert caught.value.exit_status == 1


def test_a_judge_started_anew_as_another_ends_the_run(server):
    server.models = [{"id": "judge", "root": "/models/a", "owned_by": "vllm"}]
    asker = chat(server)
    assert asker.served()["served_root"] == "/models/a"
    server.faults = [(503, b"")]
    assert isinstance(ask(asker)[0], Reply)  # the same one is back
    server.faults = [(503, b"")]
    server.models = [{"id": "judge", "root": "/models/b", "owned_by": "vllm"}]
    with pytest.raises(PolarctlError, match="another model than at the start: `served_root`"):
        ask(asker)


def test_words_of_a_server_are_bounded_and_cannot_write_to_the_terminal(server, capfd):
    server.faults = [(400, {"error": {"message": "\x1b]0;x\x07\u202e" + "long " * 1000}})]
    with pytest.raises(PolarctlError) as caught:
        ask(chat(server))
    said = str(caught.value)
    assert said.isprintable() and r"\x1b]0;x\x07\u202elong" in said and len(said) < 500
