"""`polarctl pretrain` and `finetune` as the user runs them, killed, resumed and fed nonsense."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from polarctl.cli import run
from polarctl.records import Manifest, check


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    path = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    draw = random.Random(0)
    with open(path, "w") as stream:
        for i in range(48):
            right, wrong = draw.sample(["yes", "no", "maybe"], 2)
            row = {"prompt": f"q{i}", "reference": right, "chosen": right, "rejected": wrong}
            stream.write(json.dumps(row) + "\n")
    return path


def options(tiny_lm, out):
    return ["-m", str(tiny_lm), "-o", str(out), "--lr", "1e-3", "--batch-size", "8"]


def sha256(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "polarctl", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(triples, tiny_lm, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "rm"
    command = ["pretrain", str(triples), *options(tiny_lm, out), "--epochs", "10", "-q"]
    assert run(command) == 0
    return out


def test_a_run_leaves_a_whole_folder_and_no_checkpoints(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= names
    assert not names & {"checkpoints", ".lock"}
    manifest = json.loads((finished / "manifest.json").read_text())
    check(manifest, Manifest)
    assert manifest["outputs"]["model.safetensors"]["sha256"] == sha256(finished)
    assert manifest["counts"]["triples"] == 48
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == list(range(1, 61))
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert steps[-1]["loss"] < 0.6


def test_a_model_that_cannot_share_trains_on_whole_sequences_and_says_why(
    triples, tiny_lm, tmp_path, capfd
):
    """The soft caps of Gemma 2 are nothing that the shared attention does."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tiny_lm / name).read_bytes())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    config = {"model_type": "gemma2", **sizes, **heads, "max_position_embeddings": 128}
    (base / "config.json").write_text(json.dumps(config))
    out = tmp_path / "rm"
    command = ["pretrain", str(triples), "--init-from-config", str(base), "-o", str(out)]
    assert run([*command, "--lr", "1e-3", "--batch-size", "8", "--max-steps", "2"]) == 0
    said = capfd.readouterr().err
    assert "attention: whole sequences, padded (a `gemma2` model cannot share prefixes" in said
    assert "attention kernel: eager" in said
    chosen = json.loads((out / "manifest.json").read_text())["choices"]
    assert chosen["attention"]["value"] == "whole sequences, padded"
    first, *_ = (out / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(first)
    assert entry["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert entry["computed"] >= entry["tokens"]  # nothing shared, and padding


def wait_for(path, child):
    """Until there is a line in it: the file alone says nothing of a step."""
    while child.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_at_random_moments_then_resume_gives_the_same_weights(
    triples, tiny_lm, finished, tmp_path
):
    out = tmp_path / "rm"
    command = ["pretrain", str(triples), *options(tiny_lm, out), "--epochs", "10", "-q"]
    draw = random.Random(1)
    for _ in range(2):
        child = start(*command, "--save-steps", "3")
        wait_for(out / "metrics.jsonl", child)
        time.sleep(draw.uniform(0.1, 1.0))
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert run(command) == 0
    assert sha256(out) == sha256(finished)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_sigterm_saves_and_the_same_command_goes_on(triples, tiny_lm, finished, tmp_path):
    out = tmp_path / "rm"
    command = ["pretrain", str(triples), *options(tiny_lm, out), "--epochs", "10"]
    child = start(*command)
    wait_for(out / "metrics.jsonl", child)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate()
    assert child.returncode == 75, errors
    assert "stopped by SIGTERM after step" in errors
    assert not (out / "manifest.json").exists() and not (out / "config.json").exists()
    assert len(list((out / "checkpoints").iterdir())) == 1
    os.environ["POLARCTL_PRETRAIN_SEED"] = "1"
    try:
        assert run([*command, "-q"]) == 2  # another seed is another run
    finally:
        del os.environ["POLARCTL_PRETRAIN_SEED"]
    assert run([*command, "-q"]) == 0
    assert sha256(out) == sha256(finished)


def test_a_damaged_checkpoint_is_passed_over(triples, tiny_lm, finished, tmp_path, capfd):
    out = tmp_path / "rm"
    command = ["pretrain", str(triples), *options(tiny_lm, out), "--epochs", "10"]
    child = start(*command)
    wait_for(out / "metrics.jsonl", child)
    child.send_signal(signal.SIGTERM)
    child.communicate()
    (checkpoint,) = (out / "checkpoints").iterdir()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run([*command, "-q"]) == 0
    assert "damaged checkpoint" in capfd.readouterr().err
    assert sha256(out) == sha256(finished)


@pytest.mark.slow
def test_a_pipe_trains_the_model_of_a_file(triples, tiny_lm, tmp_path):
    outputs = []
    for name, text in (("a", None), ("b", triples.read_text())):
        out = tmp_path / name
        source = ["-"] if text else [str(triples)]
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "polarctl",
                "pretrain",
                *source,
                *options(tiny_lm, out),
                "--max-steps",
                "2",
            ],
            input=text,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{out}\n"
        outputs.append(sha256(out))
    assert outputs[0] == outputs[1]


def test_a_finished_folder_is_left_alone_or_refused(triples, tiny_lm, finished, capfd):
    command = ["pretrain", str(triples), *options(tiny_lm, finished), "--epochs", "10"]
    before = (finished / "model.safetensors").stat().st_mtime_ns
    assert run(command) == 0
    assert "complete already" in capfd.readouterr().err
    assert run([*command, "--seed", "7"]) == 2
    assert "`seed` was 0 and is now 7" in capfd.readouterr().err
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


def test_a_strangers_folder_is_not_touched(triples, tiny_lm, tmp_path, capfd):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run(["pretrain", str(triples), *options(tiny_lm, tmp_path)]) == 2
    assert "is not empty" in capfd.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_any_column_can_be_the_reference(tmp_path, tiny_rm, capfd):
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "gold": "yes"}
    rows.write_text((json.dumps(row) + "\n") * 4)
    command = ["finetune", str(rows), *options(tiny_rm, tmp_path / "o"), "--max-steps", "1", "-q"]
    assert run(command) == 3
    assert "rows.jsonl:1: missing field `reference`" in capfd.readouterr().err
    assert run([*command, "--reference-field", "gold"]) == 0
    other = ["finetune", str(rows), *options(tiny_rm, tmp_path / "p"), "--max-steps", "1", "-q"]
    assert run([*other, "--no-reference"]) == 0
    assert sha256(tmp_path / "o") != sha256(tmp_path / "p")


def test_bad_triples_stop_or_are_set_aside(tmp_path, tiny_lm, capfd):
    rows = tmp_path / "rows.jsonl"
    good = {"prompt": "q", "reference": "yes", "chosen": "yes", "rejected": "no"}
    same = {**good, "rejected": "yes"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in (good, same, good)))
    command = ["pretrain", str(rows), *options(tiny_lm, tmp_path / "o"), "--max-steps", "1"]
    assert run(command) == 3
    assert "rows.jsonl:2: `chosen` and `rejected` are the same" in capfd.readouterr().err
    assert not (tmp_path / "o" / "config.json").exists()
    assert run([*command, "--rejects", str(tmp_path / "r.jsonl")]) == 0
    assert json.loads((tmp_path / "r.jsonl").read_text())["where"] == f"{rows}:2"


def test_a_dry_run_checks_the_data_and_writes_nothing(triples, tiny_lm, tmp_path, capfd):
    command = ["pretrain", str(triples), *options(tiny_lm, tmp_path / "o"), "--dry-run"]
    assert run(command) == 0
    assert "48 triples" in capfd.readouterr().err
    assert not (tmp_path / "o").exists()
