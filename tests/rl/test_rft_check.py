"""The held-out check of `rft`, by the command: what is kept, when it stops, resumes, the alarm."""

import hashlib
import json
import math
import shlex
import sys

import orjson
import pytest
from tiny import with_options

from polarctl import cli
from polarctl.rl.check import alarms, set_aside
from polarctl.verifiers.named import open_verifier

STEPS, GROUP, BATCH = 7, 4, 8
REWARD, CHECK = "regex:[a-d]", "regex:e"


def write(path, rows):
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "prompts.jsonl", [{"prompt": f"The sum {i} is"} for i in range(6)])


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "held.jsonl", [{"prompt": f"The sea {i} lay"} for i in range(12)])


def run(prompts, policy, folder, *more):
    options = f"--max-steps {STEPS} --batch-size {BATCH} --num-generations {GROUP} --lr 1e-2"
    options += f" --max-new-tokens 5 --save-steps 3 --device cpu -q --reward {REWARD}"
    words = ["rft", str(prompts), "-m", str(policy), "-o", str(folder), *options.split()]
    return cli.run(with_options(words, list(map(str, more))))


def checked(prompts, policy, folder, held, *more):
    options = ["--check", CHECK, "--check-prompts", str(held), "--check-steps", "1"]
    return run(prompts, policy, folder, *with_options(options, list(map(str, more))))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tiny_lm, prompts, held, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert checked(prompts, tiny_lm, folder, held) == 0
    return folder


def values(folder):
    entries = lines(folder / "metrics.jsonl")
    return {0: entries[0]["check_start"]} | {e["step"]: e["check"] for e in entries if "check" in e}


def simulated(found, patience):
    """(best step, step of the stop) by the rule as it is written down."""
    best, since = 0, 0
    for step in sorted(found)[1:]:
        best, since = (step, 0) if found[step] > found[best] else (best, since + 1)
        if since == patience:
            return best, step
    return best, max(found)


def test_a_check_is_the_mean_of_the_verifier_over_the_prompts(finished, held):
    found = values(finished)
    assert set(found) == set(range(STEPS + 1)) and len(set(found.values())) > 1
    assert all(12 * value == pytest.approx(round(12 * value)) for value in found.values())
    assert lines(finished / "held_out.jsonl") == lines(held)
    rollouts = lines(finished / "rollouts.jsonl")
    assert all(r["check"] == ("e" in r["output"]) for r in rollouts)
    for entry in lines(finished / "metrics.jsonl"):
        mine = [r["check"] for r in rollouts if r["step"] == entry["step"]]
        assert entry["accuracy"] == pytest.approx(sum(mine) / len(mine))


def test_looking_changes_nothing_of_the_training(finished, tiny_lm, prompts, held, tmp_path):
    plain, seldom = tmp_path / "plain", tmp_path / "seldom"
    assert run(prompts, tiny_lm, plain) == 0
    seen = [
        {k: v for k, v in r.items() if k != "check"} for r in lines(finished / "rollouts.jsonl")
    ]
    assert seen == lines(plain / "rollouts.jsonl")
    assert checked(prompts, tiny_lm, seldom, held, "--check-steps", "3") == 0
    found = values(finished)
    assert values(seldom) == {step: found[step] for step in (0, 3, 6, STEPS)}


def test_the_best_policy_is_the_one_that_is_written(finished, tiny_lm, prompts, tmp_path):
    import torch
    import transformers

    found = values(finished)
    best, _ = simulated(found, None)
    counts = json.loads((finished / "manifest.json").read_text())["counts"]
    assert counts["best_step"] == best and counts["best_check"] == found[best]
    assert counts["last_check"] == found[STEPS] and counts["check_prompts"] == 12
    policy = tiny_lm
    if best > 0:
        policy = tmp_path / "shorter"
        assert run(prompts, tiny_lm, policy, "--max-steps", best) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    pairs = zip(load(policy).parameters(), load(finished).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not (finished / "checkpoints").exists()


def test_patience_ends_the_run_and_keeps_the_best(
    finished, tiny_lm, prompts, held, tmp_path, capsys
):
    folder = tmp_path / "early"
    found = values(finished)
    best, last = simulated(found, 3)
    assert checked(prompts, tiny_lm, folder, held, "--patience", "3") == 0
    assert values(folder) == {step: v for step, v in found.items() if step <= last}
    assert len(lines(folder / "rollouts.jsonl")) == BATCH * last
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["best_step"] == best and counts["steps"] == last
    said = capsys.readouterr().err
    assert ("no step was better than the policy at the start" in said) == (best == 0)


class Killed(BaseException):
    """Ends a run as a crash does: nothing more is written."""


@pytest.mark.parametrize(("where", "step"), [("on_log", 2), ("look", 5), ("on_save", 6)])
def test_a_killed_run_ends_with_the_same_best_policy(
    where, step, finished, tiny_lm, prompts, held, tmp_path, monkeypatch
):
    from polarctl.rl.callback import Recorder
    from polarctl.rl.check import Check

    folder, owner = tmp_path / "killed", Check if where == "look" else Recorder
    real = getattr(owner, where)

    def call(self, *given, **more):
        real(self, *given, **more)
        now = given[1] if where == "look" else given[1].global_step
        if now == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, call)
        with pytest.raises(Killed):
            checked(prompts, tiny_lm, folder, held)
    kept = folder / "checkpoints" / "best"
    assert any(kept.glob("*.safetensors"))
    assert checked(prompts, tiny_lm, folder, held) == 0
    for name in ("model.safetensors", "metrics.jsonl", "rollouts.jsonl", "curves.png"):
        assert digest(folder / name) == digest(finished / name), name


def test_a_run_whose_best_policy_is_gone_does_not_go_on(
    tiny_lm, prompts, held, tmp_path, monkeypatch, capsys
):
    from polarctl.rl.callback import Recorder

    folder, real = tmp_path / "killed", Recorder.on_log

    def call(self, args, state, control, logs=None, **more):
        real(self, args, state, control, logs=logs, **more)
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_log", call)
        with pytest.raises(Killed):
            checked(prompts, tiny_lm, folder, held)
    for path in (folder / "checkpoints" / "best").iterdir():
        path.unlink()
    assert checked(prompts, tiny_lm, folder, held) == 2
    assert "the best policy so far is not there" in capsys.readouterr().err
    held.write_bytes(held.read_bytes() + b'{"prompt": "one more"}\n')
    try:
        assert checked(prompts, tiny_lm, folder, held) == 2
        assert "`check_prompts` was" in capsys.readouterr().err
    finally:
        held.write_bytes(b"".join(held.read_bytes().splitlines(keepends=True)[:-1]))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(finished, tiny_lm, prompts, held, tmp_path):
    folder = tmp_path / "two"
    options = ["--gpus", "2", "--max-steps", "1"]
    assert checked(prompts, tiny_lm, folder, held, *options) == 0
    assert values(folder)[0] == values(finished)[0] and set(values(folder)) == {0, 1}
    assert len(lines(folder / "rollouts.jsonl")) == BATCH


def test_a_check_without_an_answer_is_an_error(tiny_lm, prompts, held, tmp_path, capsys):
    program = "command:" + shlex.join([sys.executable, "-S", "-c", "print('null')"])
    assert checked(prompts, tiny_lm, tmp_path / "out", held, "--check", program) == 1
    said = capsys.readouterr().err
    assert "applies to no held-out prompt" in said and "Traceback" not in said


def test_supervised_fine_tuning_is_checked_too(tiny_lm, tmp_path):
    rows = [{"prompt": f"The sum {i} is", "reference": " e e e"} for i in range(8)]
    path, folder = write(tmp_path / "p.jsonl", rows), tmp_path / "out"
    options = "--method sft --max-steps 4 --batch-size 4 --num-generations 2 --lr 1e-2 -q"
    options += " --device cpu --check regex:e --check-steps 2 --max-new-tokens 5"
    assert cli.run(["rft", str(path), "-m", str(tiny_lm), "-o", str(folder), *options.split()]) == 0
    assert set(values(folder)) == {0, 2, 4}
    assert len(lines(folder / "held_out.jsonl")) == 1  # a tenth of 8, and one at least


# -- which prompts --------------------------------------------------------------------------------


def test_a_tenth_is_set_aside_by_the_seed():
    records = [{"prompt": str(i // 2), "answer": "a"} for i in range(100)]  # each prompt twice
    for i in range(0, 60, 2):
        del records[i]["answer"]  # half of the first 30 prompts' records say nothing
    exact = open_verifier("exact")
    held = set_aside(records, exact, 7)
    assert held == set_aside(records, exact, 7) != set_aside(records, exact, 8)
    assert len(held) == 10 and min(held) >= 60
    assert {i ^ 1 for i in held} == held  # both records of a prompt, or none
    many = [{"prompt": str(i), "answer": "a"} for i in range(5000)]
    assert len(set_aside(many, exact, 0)) == 200


@pytest.mark.parametrize(
    ("rows", "options", "status", "text"),
    [
        ([{"prompt": "a"}] * 2, "", 2, "none is left to train on"),
        ([{"prompt": "a"}, {"prompt": "b"}], "--check exact:x", 2, "applies to no record"),
        ([{"prompt": "a"}], "--check polar", 2, "`--check polar`: no verifier"),
        (
            [{"prompt": "a"}],
            "--check exact:x --check-prompts bad.jsonl",
            3,
            "bad.jsonl:1: `--check",
        ),
        ([{"prompt": "a"}], "--check-prompts nowhere.jsonl", 2, "nowhere.jsonl"),
    ],
)
def test_a_check_that_cannot_work_is_refused(
    rows, options, status, text, tiny_lm, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.jsonl", [{"prompt": "a", "y": "x"}])
    path = write(tmp_path / "p.jsonl", rows)
    base = with_options(["--check", CHECK], options.split())
    assert run(path, tiny_lm, tmp_path / "out", *base) == status
    said = capsys.readouterr().err
    assert text in said and "Traceback" not in said


# -- the alarm ------------------------------------------------------------------------------------


def entries(rewards, checks, words=None):
    """Metrics of steps from 1; `checks` has one value more, of the start."""
    words = words or [0.9] * len(rewards)
    made = [
        {"step": i + 1, "reward/polar": r, "check": c, "distinct_2": w}
        for i, (r, c, w) in enumerate(zip(rewards, checks[1:], words, strict=True))
    ]
    made[0]["check_start"] = checks[0]
    return made


def test_a_rising_reward_with_a_falling_check_raises_the_alarm():
    rising, falling = [1.0, 2.0, 3.0], [0.5, 0.8, 0.7, 0.5]
    # 0.8 to 0.5: two standard errors are 2 sqrt((0.16 + 0.25) / n): 0.256 of 25, 0.404 of 10
    found = alarms(entries(rising, falling), 1, 25)
    assert found == {
        "check": "`polar` rose from 1.000 to 3.000 since step 1 while the check fell from 0.800 to "
        "0.500 (25 prompts): the policy may be exploiting the reward"
    }
    assert alarms(entries(rising, falling), 1, 10) == {}
    assert alarms(entries(rising, [0.5, 0.8, 0.7, 0.8]), 1, 25) == {}
    assert alarms(entries([3.0, 2.0, 1.0], falling), 1, 25) == {}
    assert alarms(entries(rising, [0.9, 0.8, 0.7, 0.5]), 1, 25)["check"].startswith(
        "`polar` rose from 1.000 to 3.000 since the start while the check fell from 0.900"
    )
    assert 2 * math.sqrt((0.16 + 0.25) / 25) == pytest.approx(0.256, abs=1e-3)


def test_a_rising_reward_with_repeated_words_raises_the_alarm():
    rising, even = [1.0, 2.0, 3.0, 4.0], [0.5] * 5
    found = alarms(entries(rising, even, [0.9, 0.9, 0.5, 0.3]), 2, 25)  # 0.9 to 0.4
    assert set(found) == {"words"} and "from 0.900 to 0.400" in found["words"]
    assert alarms(entries(rising, even, [0.9, 0.9, 0.5, 0.5]), 2, 25) == {}
    assert alarms(entries([4.0, 3.0, 2.0, 1.0], even, [0.9, 0.9, 0.1, 0.1]), 2, 25) == {}
    unchecked = [{"step": i, "reward/polar": i, "distinct_2": 1 / i} for i in range(1, 7)]
    assert set(alarms(unchecked, 2, 0)) == {"words"}
    assert alarms(unchecked[:2], 2, 0) == {}


def test_a_rising_reward_with_a_falling_verifier_raises_the_alarm():
    rewards, forms = [1.0, 2.0, 3.0, 4.0], [1.0, 0.8, 0.8, 0.7]  # means 1.5, 3.5 and 0.9, 0.75
    made = [
        {"step": i, "reward/polar": r, "reward/length:9": f}
        for i, (r, f) in enumerate(zip(rewards, forms, strict=True), 1)
    ]
    assert alarms(made, 2, 0) == {
        "form": "`polar` rose from 1.500 to 3.500 since the first 2 steps while `length:9` of the "
        "rollouts fell from 0.900 to 0.750: the policy may be exploiting the reward"
    }
    assert alarms([{**e, "reward/polar": -e["step"]} for e in made], 2, 0) == {}
    less = [{**e, "reward/length:9": f} for e, f in zip(made, [1, 0.8, 0.8, 0.84], strict=True)]
    assert alarms(less, 2, 0) == {}  # 0.9 to 0.82
    seen = [
        {"step": e["step"], "reward/polar": e["reward/polar"], "accuracy": e["reward/length:9"]}
        for e in made
    ]
    assert set(alarms(seen, 2, 0)) == {"form"}


def test_a_reward_that_is_exploited_is_told_of(tiny_lm, prompts, held, tmp_path, capsys):
    """The reward wants no letters, the check wants them."""
    folder = tmp_path / "out"
    options = ["--reward", "regex:^[^a-z]*$", "--check", "regex:[a-z]", "--lr", "5e-2"]
    options += ["--max-steps", "12", "--check-steps", "3"]
    assert checked(prompts, tiny_lm, folder, held, *options) == 0
    said = capsys.readouterr().err
    assert "`regex:^[^a-z]*$` rose from" in said and "while the check fell from" in said
    told = [e["step"] for e in lines(folder / "metrics.jsonl") if "check" in e.get("alarms", ())]
    assert told
    assert said.count("while the check fell") == 1  # once, not at every check
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["best_step"] < told[0]
