"""`rft --reward principle:MODEL`, by the command, with a judge on a real local server."""

import json

import orjson
import pytest
from judge_server import JudgeServer

from polarctl import cli

GROUP = 4
PRINCIPLE = "Write many vowels."


def vowels(question):
    """The judge's reply: 1 + the vowels of a response, 5 at most."""
    scores = {
        name: min(5, 1 + sum(letter in "aeiou" for letter in text))
        for name, text in question["responses"].items()
    }
    ranking = sorted(scores, key=lambda name: -scores[name])
    return json.dumps({"scores": scores, "best-to-worst": ranking})


@pytest.fixture
def server():
    with JudgeServer() as made:
        made.reply = vowels
        yield made


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"The sum {i} is", "principle": PRINCIPLE} for i in range(4)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def run(prompts, policy, folder, server, *more):
    options = f"--reward principle:judge --judge-server {server} --max-steps 2 --batch-size 8 "
    options += f"--num-generations {GROUP} --lr 1e-3 --max-new-tokens 6 --device cpu -q"
    words = ["rft", str(prompts), "-m", str(policy), "-o", str(folder), *options.split()]
    return cli.run([*words, *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_judge_scores_all_rollouts_of_a_prompt_by_its_principle(
    server, tiny_lm, prompts, tmp_path
):
    assert run(prompts, tiny_lm, tmp_path / "plain", server.url) == 0
    rollouts = lines(tmp_path / "plain" / "rollouts.jsonl")
    for row in rollouts:
        wanted = min(5, 1 + sum(letter in "aeiou" for letter in row["output"]))
        assert row["components"] == {"principle:judge": wanted}
        assert row["reward"] == row["reward_normalized"] == wanted
    assert len({row["reward"] for row in rollouts}) > 2
    asked = [json.loads(body["messages"][-1]["content"]) for body in server.bodies]
    groups = [question for question in asked if len(question["responses"]) == GROUP]
    assert len(groups) == len(rollouts) / GROUP
    assert {question["principle"] for question in groups} == {PRINCIPLE}
    outputs = [sorted(row["output"] for row in rollouts[i : i + 4]) for i in range(0, 16, 4)]
    assert sorted(sorted(question["responses"].values()) for question in groups) == sorted(outputs)

    # Replies that cannot be read are asked for again, in another order of the rollouts.
    seen = []

    def unsure(question):
        first = {q["prompt"] for q in seen}
        seen.append(question)
        known = question["prompt"] in first or not question["prompt"].startswith("The sum")
        return vowels(question) if known else "I would rather not say."

    server.reply = unsure
    assert run(prompts, tiny_lm, tmp_path / "again", server.url) == 0
    assert (tmp_path / "again" / "rollouts.jsonl").read_bytes() == (
        tmp_path / "plain" / "rollouts.jsonl"
    ).read_bytes()
    twice = [q["responses"] for q in seen if q["prompt"] == "The sum 0 is"]
    assert sorted(twice[0].values()) == sorted(twice[1].values()) and twice[0] != twice[1]


def test_a_rollout_without_an_answer_gets_the_floor_and_the_judge_is_not_shown_it(
    server, tiny_chat_lm, prompts, tmp_path
):
    assert run(prompts, tiny_chat_lm, tmp_path / "out", server.url, "--reward-floor", "-3") == 0
    rollouts = lines(tmp_path / "out" / "rollouts.jsonl")
    cut = [row for row in rollouts if row["finish_reason"] == "length"]
    assert cut and all(row["reward"] == -3 and row["floored"] == "cut_off" for row in cut)
    shown = [json.loads(body["messages"][-1]["content"])["responses"] for body in server.bodies[1:]]
    left = [row["output"] for row in rollouts if row not in cut and row["output"].strip()]
    assert sorted(text for group in shown for text in group.values()) == sorted(left)


def test_a_judge_that_never_answers_as_asked_stops_the_run(
    server, tiny_lm, prompts, tmp_path, capsys
):
    server.reply = lambda question: "They are all fine."
    assert run(prompts, tiny_lm, tmp_path / "out", server.url) == 1
    said = capsys.readouterr().err
    assert f"polarctl: {prompts}:" in said and "asked 3 times" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert lines(tmp_path / "out" / "rollouts.jsonl") == []
    # The same command goes on once the judge does.
    server.reply = vowels
    assert run(prompts, tiny_lm, tmp_path / "out", server.url) == 0
    assert len(lines(tmp_path / "out" / "rollouts.jsonl")) == 16


def test_what_a_judge_needs_is_said_at_the_start(server, tiny_lm, prompts, tmp_path, capsys):
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "Hi", "reference": "Ho"}\n')
    assert run(plain, tiny_lm, tmp_path / "out", server.url) == 3
    assert "plain.jsonl:1: missing field `principle`" in capsys.readouterr().err
    assert run(prompts, tiny_lm, tmp_path / "out", "http://127.0.0.1:9", "--server-deadline=0") == 4
    two = ("--reward", "principle:other")
    assert run(prompts, tiny_lm, tmp_path / "out", server.url, *two) == 2
    assert "is for one `--reward principle:MODEL`" in capsys.readouterr().err
