"""Every method of rft, killed with SIGKILL: the same command ends in the bytes of a whole run.

`KILLS=10 pytest tests/stages/test_rft_kills.py` kills each run more often (`make test-kills`).
"""

import hashlib
import os
import random
import signal
import time

import orjson
import pytest
from forks import Forks
from tiny import build_rm

KILLS = int(os.environ.get("KILLS", "2"))
STEPS = max(6, 2 * KILLS)
# Options of each way to train. Every second step is saved, so that a kill loses some.
SAMPLED = ["--max-new-tokens", "6", "--micro-batch-size", "4"]
WAYS = {
    "grpo": [*SAMPLED, "--kl-coef", "0.05"],
    "rloo": [*SAMPLED, "--method", "rloo"],
    "distill": [*SAMPLED, "--method", "distill", "--temperature", "0.7"],
    "sft": ["--method", "sft", "--micro-batch-size", "1"],
}
if KILLS > 2:
    WAYS["lora"] = [*SAMPLED, "--lora-rank", "4"]
    WAYS["zero2"] = [*SAMPLED, "--deepspeed", "zero2", "--gpus", "2"]


@pytest.fixture(scope="module")
def forks():
    with Forks() as made:
        yield made


@pytest.fixture(scope="module")
def reward_model(tiny_lm, tmp_path_factory):
    return build_rm(tmp_path_factory.mktemp("models") / "rm", tiny_lm)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(5)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


@pytest.fixture
def command(prompts, tiny_lm, reward_model):
    """The arguments of a run of one way to train."""

    def of(way, out, *more):
        own = WAYS[way]
        judge = [] if way == "sft" else ["--reward-model", reward_model]
        return [
            *("rft", prompts, "-m", tiny_lm, "-o", out, *judge, *own, *more),
            *f"--max-steps {STEPS} --batch-size 8 --num-generations 4 --lr 1e-3".split(),
            *"--save-steps 2 --device cpu -q".split(),
        ]

    return of


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def hashes(folder):
    names = (
        "model.safetensors",
        "metrics.jsonl",
        "rollouts.jsonl",
        "adapter/adapter_model.safetensors",
    )
    paths = (folder / name for name in names)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.exists()}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_ends_in_the_same_bytes(way, forks, command, tmp_path):
    whole, out, said = tmp_path / "whole", tmp_path / "killed", tmp_path / "said"
    assert forks.run(command(way, whole), said) == 0, said.read_text()
    draw = random.Random(way)
    saved = []
    for kill in range(KILLS):
        until = 1 + kill * (STEPS - 2) // KILLS + draw.randint(0, 1)
        child = forks.start(command(way, out), said)
        # The lines of a step reach the file when the step is saved, before the save is marked.
        while lines(out / "metrics.jsonl") < until and not _gone(child):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))  # into the save, or the step after it
        os.kill(child, signal.SIGKILL)
        assert forks.finish() == -signal.SIGKILL, said.read_text()
        saved.append(max(map(_step, (out / "checkpoints").glob("*/checkpoint.json")), default=0))
    assert saved == sorted(saved) and saved[-1] > 0  # later runs went on from earlier ones
    assert forks.run(command(way, out), said) == 0, said.read_text()
    assert hashes(out) == hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "number", "status"), [("sft", signal.SIGTERM, 75), ("distill", signal.SIGINT, 130)]
)
def test_a_signal_saves_the_step_in_hand(way, number, status, forks, command, tmp_path):
    out, said = tmp_path / "stopped", tmp_path / "said"
    child = forks.start(command(way, out), said)
    while lines(out / "metrics.jsonl") < 2 and not _gone(child):
        time.sleep(0.001)
    os.kill(child, number)
    assert forks.finish() == status
    done = max(map(_step, (out / "checkpoints").glob("*/checkpoint.json")))
    assert f"after step {done} of {STEPS}" in said.read_text()
    assert "hint: the same command goes on from here" in said.read_text()
    assert lines(out / "metrics.jsonl") == done < STEPS
    assert not (out / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rloo", "sft"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(way, forks, command, tmp_path):
    out, said = tmp_path / "full", tmp_path / "said"
    assert forks.run(command(way, out), said, limit=100_000) == 1  # its weights have 149 kB
    error, hint = said.read_text().strip().splitlines()[-2:]
    assert error.startswith("polarctl: cannot write: ") and "goes on from here" in hint
    assert "Traceback" not in said.read_text()
    assert forks.run(command(way, out), said) == 0
    assert lines(out / "metrics.jsonl") == STEPS


def _step(mark):
    return int(mark.parent.name.rpartition("-")[2])


def _gone(child):
    try:
        with open(f"/proc/{child}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
