"""Rollouts of rft by vLLM, in the process that trains."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_lm, build_rm, with_options

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Compiling takes a minute, and changes no number here.
    "VLLM_USE_AOT_COMPILE": "0",
    "TORCHDYNAMO_DISABLE": "1",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy whose heads are as wide as vLLM's attention on a CPU needs, and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    policy = build_lm(folder / "lm", hidden_size=256, sharpness=0.1)
    return policy, build_rm(folder / "rm", build_lm(folder / "base"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(models, prompts, out, *more):
    policy, reward_model = models
    base = f"rft {prompts} -m {policy} --reward-model {reward_model} -o {out} --max-steps 4 "
    base += "--batch-size 16 --num-generations 4 --lr 1e-2 --max-new-tokens 8 --device cpu -q"
    done = subprocess.run(
        [sys.executable, "-m", "polarctl", *with_options(base.split(), more)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora-rank", "8"]])
def test_vllm_samples_from_the_policy_as_it_is_trained(more, models, prompts, tmp_path):
    """The trainer computes the log-probabilities of vLLM's tokens anew with its own weights.

    vLLM computes in another order and partly in fewer bits: 0.02 nats a token with the same
    weights. With those of the start it is 2 nats from the second step on.
    """
    out = tmp_path / "out"
    status, said, errors = run(models, prompts, out, "--rollouts", "vllm", *more)
    assert status == 0, errors[-3000:]
    assert said == f"{out}\n"
    metrics, rollouts = lines(out / "metrics.jsonl"), lines(out / "rollouts.jsonl")
    assert len(metrics) == 4 and len(rollouts) == 64
    assert max(entry["sampling_gap"] for entry in metrics) < 0.1
    assert len({record["output"] for record in rollouts}) > 32
    weights, start = (load_file(p / "model.safetensors") for p in (out, models[0]))
    moved = [float((weights[name] - start[name]).abs().max()) for name in start]
    assert max(moved) > 1e-2
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.slow
def test_a_server_that_needs_a_gpu_for_its_weights_is_refused(models, prompts, tmp_path):
    server = ("--rollouts", "vllm-server", "--vllm-server", "http://127.0.0.1:9")
    status, _, errors = run(models, prompts, tmp_path / "out", *server)
    assert status == 4
    assert "gets the policy's weights by NCCL, which needs a GPU" in errors
    assert "Traceback" not in errors
