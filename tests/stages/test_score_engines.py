"""`polarctl score` with other engines and other inputs: judges, chat models, several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from judge_server import JudgeServer

from polarctl.cli import run
from tests.tiny import build_lm, build_tokenizer

REFERENCES = {
    "prompt": "q",
    "references": ["yes", "it is so"],
    "candidates": [{"output": text} for text in ("yes", "no", "so it is")],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(rows, model, tmp_path, *options):
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["score", str(source), "-m", str(model), "-o", str(out), "--force"]
    assert run([*arguments, *options]) == 0
    return read(out)


# -- several references ---------------------------------------------------------------------------


def test_several_references_give_the_mean_or_the_largest_reward(tiny_rm, tmp_path):
    alone = [
        scored([{**REFERENCES, "references": [text]}], tiny_rm, tmp_path)[0]["rewards"]
        for text in REFERENCES["references"]
    ]
    (mean,) = scored([REFERENCES], tiny_rm, tmp_path, "--details")
    assert mean["rewards"] == pytest.approx(
        [(a + b) / 2 for a, b in zip(*alone, strict=True)], abs=1e-5
    )
    assert mean["reference_rewards"] == [pytest.approx(row, abs=1e-5) for row in alone]
    (again,) = scored([{**mean, "references": ["yes"]}], tiny_rm, tmp_path)
    assert "reference_rewards" not in again  # of an earlier run
    (largest,) = scored([REFERENCES], tiny_rm, tmp_path, "--reference-pooling", "max")
    assert largest["rewards"] == pytest.approx(list(map(max, *alone)), abs=1e-5)
    one = {"prompt": "q", "reference": "yes", "output": "no"}
    both = {"prompt": "q", "references": ["yes", "yes"], "output": "no"}
    rows = scored([one, both], tiny_rm, tmp_path, "--details")
    assert rows[0]["reward"] == pytest.approx(rows[1]["reward"], abs=1e-5)
    assert 2 * rows[0]["tokens"] == rows[1]["tokens"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": "yes"}, "has both `reference` and `references`"),
        ({"references": []}, "missing field `reference`"),
        ({"references": "yes"}, "field `references`"),
    ],
)
def test_references_that_cannot_be_used_are_refused(change, said, tiny_rm, tmp_path, capfd):
    source = write(tmp_path / "in.jsonl", [{**REFERENCES, **change}])
    assert run(["score", str(source), "-m", str(tiny_rm)]) == 3
    assert f"{source}:1: {said}" in capfd.readouterr().err
    assert run(["score", str(source), "-m", str(tiny_rm), "--reference-pooling", "min"]) == 2


# -- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    rows = [
        {"prompt": f"q{i}", "reference": "a b c", "output": "a b " * (i % 4)}
        if i != 700
        else {"prompt": "no reference here", "output": "a"}
        for i in range(2100)  # five windows
    ]
    return write(tmp_path_factory.mktemp("many") / "in.jsonl", rows)


@pytest.fixture(scope="module")
def by_one(many, tiny_rm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert run(command(many, tiny_rm, folder)) == 0
    return folder


def command(many, tiny_rm, folder, *options):
    paths = ["-o", str(folder / "out.jsonl"), "--rejects", str(folder / "rejects.jsonl")]
    return ["score", str(many), "-m", str(tiny_rm), *paths, "--device", "cpu", *options]


def same(one, other):
    for name in ("out.jsonl", "rejects.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    made = [json.loads((f / "out.jsonl.manifest.json").read_text()) for f in (one, other)]
    assert made[0]["counts"] == made[1]["counts"] and made[0]["counts"]["records"] == 2099
    assert made[0]["choices"]["dtype"] == made[1]["choices"]["dtype"]


def test_two_processes_write_the_bytes_of_one(many, tiny_rm, by_one, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(command(many, tiny_rm, tmp_path, "--gpus", "2")) == 0
    same(by_one, tmp_path)
    said = capfd.readouterr().err
    assert said.count("dtype: float32") == 1  # the second process keeps quiet
    assert "rewards: 2,099, mean " in said and "speed: 2,099 records in " in said


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_with_one(many, tiny_rm, by_one, tmp_path):
    arguments = [sys.executable, "-m", "polarctl", *command(many, tiny_rm, tmp_path, "--gpus", "2")]
    child = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    out = tmp_path / "out.jsonl"
    while child.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (by_one / "out.jsonl").read_bytes().startswith(out.read_bytes())
    assert run(command(many, tiny_rm, tmp_path)) == 0
    same(by_one, tmp_path)


def test_more_processes_than_gpus_are_refused(many, tiny_rm, tmp_path, capfd):
    few = torch.cuda.device_count() + 2
    arguments = ["score", str(many), "-m", str(tiny_rm), "-o", str(tmp_path / "out.jsonl")]
    assert run([*arguments, "--gpus", str(few)]) == 4
    assert "GPUs found" in capfd.readouterr().err
    assert run([*arguments, "--gpus", "2", "--device", "cuda:1"]) == 2
    assert run([*arguments, "--gpus", "2", "--server", "http://127.0.0.1:1"]) == 2


# -- other reward models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_rm(tmp_path_factory):
    """A random Bradley-Terry model with a chat template, as baselines are published."""
    from transformers import AutoModelForSequenceClassification

    folder = build_lm(tmp_path_factory.mktemp("models") / "chat-rm", chat=True, seed=5)
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    return folder


def test_a_reward_model_with_a_chat_template_reads_conversations(chat_rm, tmp_path, capfd):
    from transformers import AutoModelForSequenceClassification

    rows = [{"prompt": "q", "output": "yes", "reference": "a"}, {"prompt": "q", "output": "no"}]
    found = scored(rows, chat_rm, tmp_path)
    assert "input: chat template" in capfd.readouterr().err
    plain = AutoModelForSequenceClassification.from_pretrained(chat_rm).eval()
    for row in found:
        text = f"<|user|>q<|end|><|assistant|>{row['output']}<|end|>"
        ids = build_tokenizer(chat=True)(text, return_tensors="pt")
        with torch.no_grad():  # by hand: `<|end|>` pads here too, and is no padding at the end
            last = plain.model(**ids).last_hidden_state[0, -1]
            assert row["reward"] == pytest.approx(plain.score(last).item(), abs=1e-5)
    shown = scored(rows[:1], chat_rm, tmp_path, "--reference-in-prompt", "--prompt-style", "chat")
    assert shown[0]["reward"] != pytest.approx(found[0]["reward"], abs=1e-4)


def test_a_conversation_that_cannot_be_written_is_named_or_set_aside(chat_rm, tmp_path, capfd):
    system = {"role": "system", "content": "word " * 300}  # longer than the model: is never cut
    bad = {"prompt": [system, {"role": "user", "content": "q"}], "output": "yes"}
    good = {"prompt": "q", "output": "yes"}
    source = write(tmp_path / "in.jsonl", [good, bad, good])
    arguments = ["score", str(source), "-m", str(chat_rm), "-o", str(tmp_path / "out.jsonl")]
    assert run(arguments) == 3
    assert f"{source}:2: the chat template and the system message" in capfd.readouterr().err
    assert run([*arguments, "--rejects", str(tmp_path / "rejects.jsonl"), "--force"]) == 0
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 2 and rows[0] == rows[1]
    assert read(tmp_path / "rejects.jsonl")[0]["where"] == f"{source}:2"


def test_a_polar_model_is_not_shown_a_chat(tiny_rm, chat_rm, tmp_path, capfd):
    source = write(tmp_path / "in.jsonl", [REFERENCES])
    assert run(["score", str(source), "-m", str(tiny_rm), "--reference-in-prompt"]) == 2
    assert "reads POLAR's template" in capfd.readouterr().err
    assert run(["score", str(source), "-m", str(chat_rm), "--prompt-style", "polar"]) == 2
    assert "its template does not work" in capfd.readouterr().err
    assert run(["score", str(source), "-m", str(chat_rm), "--prompt-style", "chatty"]) == 2


def test_a_condition_is_put_before_the_models_input_only(tiny_rm, tmp_path, capfd):
    (tmp_path / "conditions.yaml").write_text("math: Judge every step.\nchat: ''\n")
    rows = [
        {"prompt": "q", "reference": "yes", "output": "no", "category": name}
        for name in ("math", "chat")
    ]
    rows.append({**rows[0], "prompt": "Judge every step.\nq"})
    options = ["--condition-field", "category", "--conditions", str(tmp_path / "conditions.yaml")]
    told = scored(rows[:2], tiny_rm, tmp_path, *options)
    plain = scored(rows, tiny_rm, tmp_path)
    assert [row["prompt"] for row in told] == ["q", "q"]
    assert told[0]["reward"] == pytest.approx(plain[2]["reward"], abs=1e-5)
    assert told[1]["reward"] == pytest.approx(plain[1]["reward"], abs=1e-5)
    assert plain[0]["reward"] != pytest.approx(plain[2]["reward"], abs=1e-3)
    capfd.readouterr()
    source = write(tmp_path / "bad.jsonl", [{**rows[0], "category": "code"}])
    assert run(["score", str(source), "-m", str(tiny_rm), *options]) == 3
    assert f"{source}:1: field `category`: no condition for 'code'" in capfd.readouterr().err
    assert run(["score", str(source), "-m", str(tiny_rm), *options[:2]]) == 2


def test_other_conditions_are_another_run(tiny_rm, tmp_path, capfd):
    conditions = tmp_path / "conditions.yaml"
    conditions.write_text("math: Judge every step.\n")
    row = {"prompt": "q", "reference": "yes", "output": "no", "category": "math"}
    source, out = write(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl"
    arguments = ["score", str(source), "-m", str(tiny_rm), "-o", str(out)]
    arguments += ["--condition-field", "category", "--conditions", str(conditions)]
    assert run(arguments) == 0
    conditions.write_text("math: Judge the answer.\n")
    assert run(arguments) == 2
    assert "conditions_identity" in capfd.readouterr().err


# -- judges ---------------------------------------------------------------------------------------

LOUD = {
    "prompt": "Say hi",
    "principle": "Be loud",
    "candidates": [{"output": "hi"}, {"output": "hi!!"}, {"output": "hi!"}],
}


def test_a_judge_behind_a_server_scores_by_the_principle(tmp_path):
    with JudgeServer() as server:
        options = ["--backend", "principle", "--server", server.url, "--best-of-n"]
        single = {"prompt": "Say hi", "principle": "Be loud", "output": "hi!!!"}
        rows = scored([LOUD, single], "the-judge", tmp_path, *options, "--normalize", "none")
        assert {body["model"] for body in server.bodies} == {"the-judge"}
    assert rows[0]["rewards"] == [1, 3, 2] and rows[0]["best"] == 1
    assert rows[0]["ranking"] == ["candidate-1", "candidate-2", "candidate-0"]
    assert rows[0]["parse_status"] == "ok" and "candidate-1 is the loudest" in rows[0]["reasoning"]
    assert rows[1]["reward"] == 4
    assert run(["validate", str(tmp_path / "out.jsonl")]) == 0


def test_a_judges_run_goes_on_with_the_same_judge_alone(tmp_path, capfd):
    rows = [{**LOUD, "prompt": f"Say {i}"} for i in range(150)]  # three windows
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with JudgeServer() as server:
        good = server.reply
        server.models = [{"id": "judge", "root": "/models/a"}]
        arguments = ["score", str(source), "-m", "judge", "--backend", "principle"]
        arguments += ["-o", str(out), "--server", server.url]
        server.reply = lambda asked: "?" if asked["prompt"] == "Say 140" else good(asked)
        assert run(arguments) == 3  # after two windows
        done = out.read_bytes()
        assert done.count(b"\n") == 128
        server.reply, server.models = good, [{"id": "judge", "root": "/models/b"}]
        assert run(arguments) == 2
        assert "`served_root` was '/models/a' and is now '/models/b'" in capfd.readouterr().err
        assert out.read_bytes() == done
        server.models = [{"id": "judge", "root": "/models/a"}]
        assert run(arguments) == 0
    assert [row["prompt"] for row in read(out)] == [row["prompt"] for row in rows]


def test_a_reply_that_cannot_be_read_is_no_score(tmp_path, capfd):
    source = write(tmp_path / "in.jsonl", [LOUD, {**LOUD, "prompt": "Say ho"}, LOUD])
    arguments = ["score", str(source), "-m", "judge", "--backend", "principle"]
    arguments += ["-o", str(tmp_path / "out.jsonl")]
    with JudgeServer() as server:
        good = server.reply
        server.reply = lambda asked: "4 of 5" if asked["prompt"] == "Say ho" else good(asked)
        assert run([*arguments, "--server", server.url]) == 3
        assert f"{source}:2: the judge's reply cannot be used" in capfd.readouterr().err
        rejects = tmp_path / "rejects.jsonl"
        arguments += ["--server", server.url, "--rejects", str(rejects), "--force"]
        assert run(arguments) == 0
    assert [row["rewards"] for row in read(tmp_path / "out.jsonl")] == [[1, 3, 2]] * 2
    assert [row["where"] for row in read(rejects)] == [f"{source}:2"]


def test_a_local_judge_that_writes_nonsense_scores_nothing(tiny_chat_lm, tmp_path, capfd):
    source = write(tmp_path / "in.jsonl", [LOUD])
    arguments = ["score", str(source), "-m", str(tiny_chat_lm), "--backend", "principle"]
    arguments += ["-o", str(tmp_path / "out.jsonl"), "--max-new-tokens", "8"]
    assert run(arguments) == 3
    assert f"{source}:1: " in capfd.readouterr().err
    assert not (tmp_path / "out.jsonl.manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--details"], "a judge's scores"),
        (["--normalize", "polar-7b"], "a judge's scores"),
        (["--strip-thinking"], "are for reward models"),
        (["--prompt-style", "chat"], "it is for --backend hf"),
    ],
)
def test_what_a_judge_cannot_do_is_refused(options, said, tiny_chat_lm, tmp_path, capfd):
    source = write(tmp_path / "in.jsonl", [LOUD])
    arguments = ["score", str(source), "-m", str(tiny_chat_lm), "--backend", "principle"]
    assert run([*arguments, *options]) == 2
    assert said in capfd.readouterr().err


def test_a_token_among_the_options_of_an_engine_is_refused_unseen(many, tiny_rm, tmp_path, capfd):
    arguments = ["score", str(many), "-m", str(tiny_rm), "-o", str(tmp_path / "out.jsonl")]
    options = ["--backend", "vllm", "--engine-option", "hf_token=hf_S3ntinel"]
    assert run([*arguments, *options]) == 2
    said = capfd.readouterr().err
    assert "`--engine-option hf_token`: a secret" in said and "S3ntinel" not in said
    assert list(tmp_path.iterdir()) == []
