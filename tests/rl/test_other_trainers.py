"""`rft --engine verl` and `--engine openrlhf`: what the folder holds is what the trainers take.

`tests/trainers` gives these files to the trainers themselves.
"""

import importlib.util
import json
import os
import subprocess

import pyarrow.parquet
import pytest
from scoring.faulty_server import reward_of, serving
from tiny import with_options

from polarctl import cli
from polarctl.model import reward_model
from polarctl.storage import run_folder

PROMPTS, URL = 12, "http://scorer:8000"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {"id": f"p{i}", "prompt": f"What is {i} + 4?", "reference": f"It is {i + 4}.", "accept": []}
        for i in range(PROMPTS)
    ]
    rows[1]["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "In parts?"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(engine, prompts, policy, model, folder, *more):
    words = ["rft", str(prompts), "-m", str(policy), "--reward-model", str(model), "-q"]
    words += ["--engine", engine, "--server", URL, "-o", str(folder), "--max-new-tokens", "32"]
    return cli.run(with_options(words, more))


@pytest.fixture(scope="module")
def made(prompts, tiny_chat_lm, tiny_rm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for engine in ("verl", "openrlhf"):
        assert run(engine, prompts, tiny_chat_lm, tiny_rm, folder / engine) == 0
    return folder


def arguments_of(folder, tmp_path, *more, **variables):
    """What `launch.sh` gives to python3."""
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", **variables}
    words = ["bash", str(folder / "launch.sh"), *more]
    found = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_verl_gets_the_papers_settings_and_the_users_own(
    made, prompts, tiny_chat_lm, tiny_rm, tmp_path
):
    words = arguments_of(made / "verl", tmp_path, "trainer.logger=x", NODES="4", GPUS="2")
    assert words[:2] == ["-m", "verl.trainer.main_ppo"] and words[-1] == "trainer.logger=x"
    given = dict(word.split("=", 1) for word in words[2:])
    paper = {
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "critic.optim.lr": 1e-5,
        "data.train_batch_size": 1024,
        "actor_rollout_ref.rollout.n": 1,
        "trainer.total_epochs": 1,
        "algorithm.gamma": 1,
        "algorithm.lam": 1,
        "actor_rollout_ref.actor.clip_ratio": 0.2,
        "algorithm.kl_ctrl.kl_coef": 0,
        "actor_rollout_ref.rollout.temperature": 1,
    }
    assert {name: float(given[name]) for name in paper} == paper
    assert (given["trainer.nnodes"], given["trainer.n_gpus_per_node"]) == ("4", "2")
    assert given["data.train_files"] == str(made / "verl" / "train.parquet")
    kwargs = "+reward.custom_reward_function.reward_kwargs."
    assert given[kwargs + "url"] == URL and given[kwargs + "model"] == str(tiny_rm)

    own = ["--batch-size", "64", "--num-generations", "8", "--lr", "2e-6", "--kl-coef", "0.01"]
    own += ["--normalize", "polar-7b", "--max-steps", "7", "--seed", "5"]
    assert run("verl", prompts, tiny_chat_lm, tiny_rm, tmp_path / "own", *own) == 0
    words = arguments_of(tmp_path / "own", tmp_path, REWARD="http://other:1")
    given = dict(word.split("=", 1) for word in words[2:])
    # 64 rollouts, 8 of a prompt: 8 prompts a step
    assert given["data.train_batch_size"] == "8" and given["actor_rollout_ref.rollout.n"] == "8"
    assert float(given["actor_rollout_ref.actor.optim.lr"]) == 2e-6
    assert given["algorithm.use_kl_in_reward"] == "True"
    assert given["trainer.total_training_steps"] == "7" and given["data.seed"] == "5"
    assert given[kwargs + "url"] == "http://other:1"
    assert given[kwargs + "normalize"] == "polar-7b"


def test_verls_rows_are_the_prompts_some_of_them_held_out(made, prompts):
    train, val = (
        pyarrow.parquet.read_table(made / "verl" / f"{name}.parquet").to_pylist()
        for name in ("train", "val")
    )
    assert (len(train), len(val)) == (PROMPTS - 1, 1)
    known = {row["id"]: row for row in map(json.loads, prompts.read_text().splitlines())}
    assert {row["extra_info"]["id"] for row in train + val} == set(known)
    for row in train + val:
        mine = known[row["extra_info"]["id"]]
        assert row["reward_model"]["ground_truth"] == mine["reference"]
        text = mine["prompt"] if isinstance(mine["prompt"], str) else "In parts?"
        assert row["prompt"] == row["extra_info"]["prompt"] == [{"role": "user", "content": text}]


def test_openrlhf_gets_prompts_with_labels_and_the_same_settings(made, tiny_chat_lm, tmp_path):
    words = arguments_of(made / "openrlhf", tmp_path, NODES="2", GPUS="4")
    assert words[:2] == ["-m", "openrlhf.cli.train_ppo_ray"]

    def after(name):
        return words[words.index(f"--{name}") + 1]

    assert after("reward.remote_url") == f"{URL}/get_reward"
    assert (after("data.input_key"), after("data.label_key")) == ("prompt", "label")
    assert "--data.apply_chat_template" in words
    assert after("vllm.num_engines") == "8"
    paper = {"actor.adam.lr": 1e-6, "critic.adam.lr": 1e-5, "train.batch_size": 1024}
    paper |= {"algo.kl.init_coef": 0, "actor.eps_clip": 0.2, "rollout.n_samples_per_prompt": 1}
    assert {name: float(after(name)) for name in paper} == paper
    rows = [json.loads(line) for line in (made / "openrlhf/train.jsonl").read_text().splitlines()]
    assert len(rows) == PROMPTS
    assert rows[1]["prompt"] == [{"role": "user", "content": "In parts?"}]
    assert rows[1]["label"] == {"prompt": "In parts?", "reference": "It is 5.", "wrapper": "sft"}


def test_openrlhfs_reward_file_gives_the_rewards(prompts, tiny_chat_lm, tiny_rm, tmp_path):
    """A scale needs the file, for the server's replies are raw: the script takes it by itself."""
    with serving() as server:
        words = ["--normalize", "polar-7b", "--server", server.url]
        assert run("openrlhf", prompts, tiny_chat_lm, tiny_rm, tmp_path / "out", *words) == 0
        words = arguments_of(tmp_path / "out", tmp_path)
        path = words[words.index("--reward.remote_url") + 1]
        # As OpenRLHF loads it.
        spec = importlib.util.spec_from_file_location("reward_func", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        marked = "<|user|>Why?<|end|><|assistant|>"
        label = {"prompt": "Why?", "reference": "Because.", "wrapper": "sft"}
        reply = module.reward_func([f"{marked}So.<|end|>"], [marked], [label])
    ids = reward_model.load_encoder(str(tiny_rm)).encode("Why?", "Because.", "So.")
    assert reply["rewards"].tolist() == pytest.approx([(reward_of(ids) + 5) / 10])


def test_typed_twice_it_does_nothing_and_what_the_trainer_wrote_stays(
    prompts, tiny_chat_lm, tiny_rm, tmp_path, capsys
):
    folder = tmp_path / "out"
    assert run("openrlhf", prompts, tiny_chat_lm, tiny_rm, folder) == 0
    (folder / "trained").mkdir()
    (folder / "trained" / "policy").write_text("weeks of work")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run("openrlhf", prompts, tiny_chat_lm, tiny_rm, folder) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run("openrlhf", prompts, tiny_chat_lm, tiny_rm, folder, "--lr", "1e-5") == 2
    assert run("openrlhf", prompts, tiny_chat_lm, tiny_rm, folder, "--lr", "1e-5", "--force") == 2
    assert (folder / "trained" / "policy").read_text() == "weeks of work"


class Killed(BaseException):
    """Ends a run as a crash does."""


@pytest.mark.parametrize("moment", ["before", "amid"])
def test_a_folder_that_was_killed_is_made_whole(
    moment, prompts, tiny_chat_lm, tiny_rm, tmp_path, monkeypatch, made
):
    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(run_folder.Run, "finish", die)
        else:
            patch.setattr(run_folder.manifest, "write", die)
        with pytest.raises(Killed):
            run("verl", prompts, tiny_chat_lm, tiny_rm, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run("verl", prompts, tiny_chat_lm, tiny_rm, tmp_path / "out") == 0
    names = {"README.md", "launch.sh", "train.parquet", "val.parquet", "manifest.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    same = (tmp_path / "out" / "train.parquet").read_bytes()
    assert same == (made / "verl" / "train.parquet").read_bytes()


@pytest.mark.parametrize("engine", ["verl", "openrlhf"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "cpu"], "`--device` has no effect here: it is for `--engine trl`"),
        (["--loss-type", "grpo"], "`--loss-type` has no effect here"),
        (["--micro-batch-size", "4"], "`--micro-batch-size` has no effect here"),
        (["--batch-size", "10", "--num-generations", "4"], "not a multiple"),
    ],
)
def test_options_of_training_here_are_refused(
    engine, more, said, prompts, tiny_chat_lm, tiny_rm, tmp_path, capsys
):
    assert run(engine, prompts, tiny_chat_lm, tiny_rm, tmp_path / "out", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(prompts, tiny_lm, tiny_chat_lm, tiny_rm, tmp_path, capsys):
    words = ["rft", str(prompts), "-m", str(tiny_chat_lm), "--reward-model", str(tiny_rm)]
    assert cli.run([*words, "-o", str(tmp_path / "out"), "--engine", "verl"]) == 2
    assert "`--engine verl` needs `--server URL`" in capsys.readouterr().err
    assert run("verl", prompts, tiny_lm, tiny_rm, tmp_path / "out") == 2
    assert "no chat template" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    assert run("openrlhf", bad, tiny_lm, tiny_rm, tmp_path / "out2") == 3
    assert "bad.jsonl:1: missing field `reference`" in capsys.readouterr().err


def test_a_policy_without_a_chat_template_gets_text_from_openrlhf(
    prompts, tiny_lm, tiny_rm, tmp_path
):
    assert run("openrlhf", prompts, tiny_lm, tiny_rm, tmp_path / "out") == 0
    assert "--data.apply_chat_template" not in arguments_of(tmp_path / "out", tmp_path)
    row = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == "What is 0 + 4?" and row["label"]["wrapper"] == "pretrain"


def test_where_verl_is_not_installed_it_is_said(prompts, tiny_chat_lm, tiny_rm, tmp_path, capsys):
    words = ["rft", str(prompts), "-m", str(tiny_chat_lm), "--reward-model", str(tiny_rm)]
    words += ["--engine", "verl", "--server", URL, "-o", str(tmp_path / "out")]
    assert cli.run([*words, "--max-new-tokens", "32"]) == 0
    assert "its data set has not read the files" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["read by verl"] is False
