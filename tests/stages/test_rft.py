import hashlib
import json
import os
import shutil
import signal
import statistics

import orjson
import pytest
from tiny import with_options

from polarctl import cli
from polarctl.records import Record, find_kind
from polarctl.records import check as check_record
from polarctl.scoring.reward_function import PolarReward

STEPS, ROLLOUTS, GROUP = 3, 8, 4


@pytest.fixture(scope="module")
def reward_model(tiny_lm, tmp_path_factory):
    """A reward model with a random head: a new one is all zeros and rewards nothing."""
    import torch

    from polarctl.model import reward_model as models

    folder = tmp_path_factory.mktemp("models") / "rm"
    made = models.create(base=str(tiny_lm))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.nn.init.normal_(made.model.score.weight)
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(5)]
    rows[1]["wrapper"], rows[1]["mine"] = "sft", {"kept": True}
    rows[2]["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "In parts"}]}]
    rows[2]["reference"] = [{"role": "assistant", "content": "yes"}]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def run(prompts, policy, reward_model, folder, *more):
    options = f"--max-steps {STEPS} --batch-size {ROLLOUTS} --num-generations {GROUP} --lr 1e-3"
    options += " --max-new-tokens 6 --save-steps 1 --device cpu -q"
    models = ["-m", str(policy), "--reward-model", str(reward_model), "-o", str(folder)]
    return cli.run(with_options(["rft", str(prompts), *models, *options.split()], more))


@pytest.fixture(scope="module")
def finished(tiny_lm, reward_model, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(prompts, tiny_lm, reward_model, folder, "--kl-coef", "0.05") == 0
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def hashes(folder):
    names = ("model.safetensors", "metrics.jsonl", "rollouts.jsonl", "curves.png")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_the_folder_holds_the_policy_and_what_it_did(finished, tiny_lm):
    import torch
    import transformers

    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
        *("metrics.jsonl", "rollouts.jsonl", "curves.png", "kl.png", "manifest.json"),
    }
    start, end = (
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tiny_lm, finished)
    )
    assert end.config.use_cache == start.config.use_cache
    moved = [
        not torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True)
    ]
    assert all(moved)
    manifest = json.loads((finished / "manifest.json").read_text())
    check_record(manifest, find_kind("manifest"))
    assert manifest["counts"]["steps"] == STEPS
    assert manifest["counts"]["rollouts"] == STEPS * ROLLOUTS
    assert set(manifest["outputs"]) == {path.name for path in finished.iterdir()} - {
        "manifest.json"
    }


def test_every_rollout_is_a_trajectory_with_rewards(finished, prompts):
    rollouts, given = lines(finished / "rollouts.jsonl"), lines(prompts)
    assert len(rollouts) == STEPS * ROLLOUTS
    for number, record in enumerate(rollouts):
        check_record(record, find_kind("trajectory"))
        check_record(record, find_kind("score"))
        assert record["step"] == number // ROLLOUTS + 1
        assert record["sample"] == number % GROUP
        assert record["num_tokens"] <= 6
        (source,) = (row for row in given if row["prompt"] == record["prompt"])
        assert record["reference"] == source["reference"]
        assert record.get("mine") == source.get("mine")
        assert record["wrapper"] == source.get("wrapper", "pretrain")  # no chat template
    for first in range(0, len(rollouts), GROUP):
        group = rollouts[first : first + GROUP]
        assert len({json.dumps(record["prompt"]) for record in group}) == 1
        rewards = [record["reward"] for record in group]
        mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
        for record in group:
            wanted = (record["reward"] - mean) / (spread + 1e-4)
            assert record["advantage"] == pytest.approx(wanted, abs=1e-3)
            assert record["reward_normalized"] == record["reward"]


def test_metrics_follow_from_the_rollouts(finished):
    metrics, rollouts = lines(finished / "metrics.jsonl"), lines(finished / "rollouts.jsonl")
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    for entry in metrics:
        rewards = [r["reward"] for r in rollouts if r["step"] == entry["step"]]
        assert entry["reward"] == pytest.approx(statistics.fmean(rewards))
        assert entry["reward_std"] == pytest.approx(statistics.pstdev(rewards))
        assert entry["lr"] == 1e-3
        assert {"loss", "grad_norm", "entropy", "clip_ratio", "completion_length"} <= set(entry)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy has not moved yet
    assert metrics[2]["kl"] > 0


def test_rewards_are_those_of_score(finished, reward_model, tmp_path):
    out = tmp_path / "scored.jsonl"
    source = str(finished / "rollouts.jsonl")
    options = ["-m", str(reward_model), "--reward-floor", "-20", "-o", str(out), "-q"]
    assert cli.run(["score", source, *options]) == 0
    before = lines(finished / "rollouts.jsonl")
    assert [r.get("floored") for r in lines(out)] == [r.get("floored") for r in before]
    before = [record["reward"] for record in before]
    assert [record["reward"] for record in lines(out)] == pytest.approx(before, abs=1e-5)
    assert len(set(before)) > STEPS
    rollouts = lines(finished / "rollouts.jsonl")[:3]
    mine = PolarReward.load(str(reward_model), device="cpu", normalize="polar-1.8b")(
        *([r[key] for r in rollouts] for key in ("prompt", "output")),
        reference=[r["reference"] for r in rollouts],
        wrapper=[r["wrapper"] for r in rollouts],
    )
    assert mine == pytest.approx([(value + 10) / 10 for value in before[:3]], abs=1e-5)


def test_a_finished_run_is_left_alone_and_another_is_refused(
    finished, tiny_lm, reward_model, prompts, capsys
):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert run(prompts, tiny_lm, reward_model, finished, "--kl-coef", "0.05") == 0
    assert run(prompts, tiny_lm, reward_model, finished, "--kl-coef", "0.06") == 2
    assert "`kl_coef` was 0.05 and is now 0.06" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir()}


class Killed(BaseException):
    """Ends a run as a crash does: nothing more is written."""


@pytest.mark.parametrize("how", ["sigterm", "ctrl-c", "crash"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    how, finished, tiny_lm, reward_model, prompts, tmp_path, monkeypatch
):
    from polarctl.rl.callback import Recorder

    folder, options = tmp_path / "stopped", ("--kl-coef", "0.05")
    if how == "crash":  # the checkpoint that it goes on from was written by the clock
        options += ("--save-steps", "1000", "--save-minutes", "1e-9")
    on_log = Recorder.on_log
    signals = {"sigterm": (signal.SIGTERM, 75), "ctrl-c": (signal.SIGINT, 130)}

    def stop(self, args, state, control, logs=None, **more):
        on_log(self, args, state, control, logs=logs, **more)
        if how == "crash" and state.global_step == 2:
            raise Killed  # the second step is written but has no checkpoint
        if how in signals and state.global_step == 1 and "loss" in logs:
            os.kill(os.getpid(), signals[how][0])

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_log", stop)
        if how in signals:
            assert run(prompts, tiny_lm, reward_model, folder, *options) == signals[how][1]
        else:
            with pytest.raises(Killed):
                run(prompts, tiny_lm, reward_model, folder, *options)
            with open(folder / "rollouts.jsonl", "ab") as torn:
                torn.write(b'{"prompt": "to')
            # A later checkpoint that was being written: without a mark it does not count.
            shutil.copytree(
                folder / "checkpoints/checkpoint-1", folder / "checkpoints/checkpoint-2"
            )
            (folder / "checkpoints/checkpoint-2/checkpoint.json").unlink()
    assert not (folder / "manifest.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert run(prompts, tiny_lm, reward_model, folder, "--kl-coef", "0.06") == 2
    assert run(prompts, tiny_lm, reward_model, folder, *options) == 0
    assert hashes(folder) == hashes(finished)
    assert not (folder / "checkpoints").exists()


def test_a_loss_that_is_not_finite_leaves_no_policy(
    tiny_lm, reward_model, prompts, tmp_path, capsys
):
    folder = tmp_path / "broken"
    assert run(prompts, tiny_lm, reward_model, folder, "--lr", "1e30") == 1
    assert "not finite" in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "manifest.json").exists()


def test_a_chat_policy_gets_messages(tiny_chat_lm, reward_model, prompts, tmp_path):
    folder = tmp_path / "chat"
    options = ("--max-steps", "1", "--micro-batch-size", "2", "--normalize", "polar-7b")
    options += ("--reward-floor", "none")
    assert run(prompts, tiny_chat_lm, reward_model, folder, *options) == 0
    rollouts = lines(folder / "rollouts.jsonl")
    assert {record["wrapper"] for record in rollouts} == {"sft"}
    assert all(isinstance(record["output"], str) for record in rollouts)
    for record in rollouts:
        assert record["reward_normalized"] == pytest.approx((record["reward"] + 5) / 10)
    (entry,) = lines(folder / "metrics.jsonl")
    assert "kl" not in entry  # no reference model without --kl-coef
    assert not (folder / "kl.png").exists()


def test_rollouts_without_an_answer_get_the_floor_and_are_counted(
    tiny_chat_lm, reward_model, prompts, tmp_path, capsys
):
    folder = tmp_path / "chat"
    # Six tokens are too few for a random policy: whoever gets to an end does so by chance.
    options = ("--max-steps", "1", "--normalize", "polar-7b", "--max-new-tokens", "6")
    assert run(prompts, tiny_chat_lm, reward_model, folder, *options) == 0
    rollouts = lines(folder / "rollouts.jsonl")
    for record in rollouts:
        check_record(record, find_kind("score"))
        no_answer = record["finish_reason"] == "length" or not record["output"].strip()
        assert (record["reward"] == -20) == no_answer == ("floored" in record)
        assert record["reward_normalized"] == pytest.approx((record["reward"] + 5) / 10)
    cut = sum(record.get("floored") == "cut_off" for record in rollouts)
    assert cut > 0
    (entry,) = lines(folder / "metrics.jsonl")
    assert entry["floored"] == sum("floored" in record for record in rollouts) / ROLLOUTS
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["floored"]["cut_off"] == cut and counts["rollouts"] == ROLLOUTS
    said = capsys.readouterr().err
    assert f"of {ROLLOUTS} outputs have no answer and got the reward floor -20" in said
    assert ("no rollout has an answer" in said) == (entry["floored"] == 1)


def test_a_prompt_that_cannot_be_used_is_named(tiny_lm, reward_model, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "reference": "b"}\n{"prompt": "a"}\n')
    assert run(path, tiny_lm, reward_model, tmp_path / "out") == 3
    assert f"{path}:2: missing field `reference`" in capsys.readouterr().err
    path.write_text(json.dumps({"prompt": "long " * 200, "reference": "b"}) + "\n")
    assert run(path, tiny_lm, reward_model, tmp_path / "out") == 3
    assert f"{path}:1: the prompt" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--batch-size", "10"], "not a multiple of `--num-generations 4`"),
        (["--micro-batch-size", "3"], "not a multiple of 3 rollouts"),
        (["--loss-type", "ppo"], "invalid value for `--loss-type`: `ppo` is not one of"),
        (["--normalize", "mean"], "`mean` is not one of"),
        (["-o", "-"], "writes a folder"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(
    options, text, tiny_lm, reward_model, prompts, tmp_path, capsys
):
    assert run(prompts, tiny_lm, reward_model, tmp_path / "out", *options) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_trl_the_extra_is_named(
    tiny_lm, reward_model, prompts, tmp_path, capsys, monkeypatch
):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    from polarctl.errors import MissingError
    from polarctl.rl import trainer

    with pytest.raises(MissingError) as error:
        trainer.require()
    assert error.value.hint == "pip install 'polarctl[rft]'"


def test_the_order_is_a_new_shuffle_for_each_epoch(tiny_lm):
    from polarctl.policies.pool import Policy
    from polarctl.rl.callback import PolicyRun
    from polarctl.stages.rft import Config

    config = Config(model="m", reward_model="r", batch_size=8, num_generations=4, epochs=2)
    rows = [{"prompt": str(i)} for i in range(5)]
    job = PolicyRun(
        config=config,
        run=None,
        rows=rows,
        policy=Policy(name="m", model="m"),
        tokenizer=None,
    )
    order = job.order()
    assert job.steps == 5  # 5 prompts x 2 epochs, 2 prompts a step
    assert len(order) == 10
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:]


def test_a_prompt_becomes_what_the_policy_takes():
    from polarctl.stages.rft import row_of

    text = Record({"prompt": "q", "reference": "r", "wrapper": "pretrain"})
    messages = [{"role": "system", "content": [{"type": "text", "text": "s"}], "name": "x"}]
    talk = Record({"prompt": messages, "reference": "r"})
    assert row_of(text, True)["prompt"] == [{"role": "user", "content": "q"}]
    assert row_of(text, True)["wrapper"] == "pretrain"
    assert row_of(text, False)["prompt"] == "q"
    assert row_of(talk, True)["prompt"] == [{"role": "system", "content": "s"}]
    assert row_of(talk, True)["wrapper"] == "sft"
    assert row_of(talk, False) == {"prompt": "s", "reference": "r", "wrapper": "pretrain"}


class Canary:
    """A pickle that makes a file when it is opened carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_in_a_checkpoint_is_refused_and_not_executed(
    tiny_lm, reward_model, prompts, tmp_path, monkeypatch, capsys
):
    import torch

    from polarctl.rl.callback import Recorder

    folder, canary = tmp_path / "stopped", tmp_path / "canary"
    on_log = Recorder.on_log

    def stop(self, *given, **more):
        on_log(self, *given, **more)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_log", stop)
        assert run(prompts, tiny_lm, reward_model, folder) == 75
    checkpoint = max((folder / "checkpoints").iterdir())
    mark = json.loads((checkpoint / "checkpoint.json").read_bytes())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        honest = (checkpoint / name).read_bytes()
        torch.save({"state": Canary(canary)}, checkpoint / name)
        data = (checkpoint / name).read_bytes()
        files = {**mark["files"]}
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        told = {key: value for key, value in mark.items() if key != "sha256"} | {"files": files}
        own = hashlib.sha256(orjson.dumps(told)).hexdigest()
        (checkpoint / "checkpoint.json").write_text(json.dumps({**told, "sha256": own}))
        capsys.readouterr()
        assert run(prompts, tiny_lm, reward_model, folder) == 1, name
        said = capsys.readouterr().err
        assert f"{checkpoint}: a file in it holds `" in said and "Traceback" not in said
        assert not canary.exists()
        torch.load(checkpoint / name, weights_only=False)  # the canary does sing
        canary.unlink()
        (checkpoint / name).write_bytes(honest)
