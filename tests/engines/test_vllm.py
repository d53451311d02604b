"""vLLM for real, on the CPU: its rewards are those of transformers, offline and over HTTP."""

import json
import random
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from engines.vllm_server import ENVIRONMENT, vllm_server

BIN = Path(sys.executable).parent
ENGINE = ["--engine-option", "enforce_eager=true"]
WORDS = "the sea was calm that day and nobody spoke of a storm".split()


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """A file that exists once code from the published folder has run."""
    return tmp_path_factory.mktemp("canary") / "sang"


@pytest.fixture(scope="module")
def official(canary, tmp_path_factory):
    """A tiny reward model in the published layout, as POLAR-7B is downloaded."""
    from model.internlm2.official import build_official

    folder = tmp_path_factory.mktemp("models") / "POLAR-7B"
    return build_official(folder, format="bin", hidden=128, max_positions=512, canary=canary)


@pytest.fixture(scope="module")
def rm(official, tmp_path_factory):
    """The same as a plain classifier."""
    folder = tmp_path_factory.mktemp("models") / "POLAR-7B-llama"
    made = [BIN / "polarctl", "convert", "checkpoint", official, "-o", folder]
    subprocess.run(made, check=True, capture_output=True, env=ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Five groups of eight candidates with one prompt and reference each."""
    draw = random.Random(0)

    def text(count):
        return " ".join(draw.choice(WORDS) for _ in range(count))

    rows = [
        {
            "prompt": text(30),
            "reference": text(12),
            "candidates": [{"output": text(draw.randint(1, 9))} for _ in range(8)],
        }
        for _ in range(5)
    ]
    path = tmp_path_factory.mktemp("data") / "groups.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score(model, data, out, *options, environment=ENVIRONMENT):
    """Rewards by the program, and what it said."""
    # The server decides its own precision.
    given = [] if "--server" in options or "--dtype" in options else ["--dtype", "float32"]
    done = subprocess.run(
        [BIN / "polarctl", "score", data, "-m", model, "-o", out, *given, *options],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    return [reward for row in rows for reward in row["rewards"]], done.stderr


@pytest.fixture(scope="module")
def by_hf(official, groups, tmp_path_factory):
    return score(official, groups, tmp_path_factory.mktemp("hf") / "scores.jsonl")[0]


def test_transformers_gives_the_rewards_of_the_published_architecture(official, groups, by_hf):
    from model.internlm2 import oracle
    from model.internlm2.official import weights

    settings = json.loads((official / "config.json").read_text())
    state = weights(settings)
    _, ids = inputs_of(official, groups)
    assert [oracle.reward(state, settings, one) for one in ids[::4]] == close(by_hf[::4])
    assert len(set(by_hf)) > 30 and (min(by_hf) < 0 or max(by_hf) > 1)


def test_the_offline_engine_reads_the_published_folder_and_its_prefix_cache(
    official, groups, by_hf, canary, tmp_path
):
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = ["--backend", "vllm", *ENGINE, "--dtype", "auto"]
    out = tmp_path / "scores.jsonl"
    found, said = score(official, groups, out, *options, environment=environment)
    assert found == close(by_hf)  # whatever vLLM itself would take on a CPU
    assert "dtype: float32 (exact, on cpu)" in said
    share, tokens = re.search(r"vLLM: (\d+)% of ([\d,]+) tokens came from", said).groups()
    assert int(share) > 20 and int(tokens.replace(",", "")) > 1000
    assert "vLLM reads the published checkpoint in this form" in said
    assert len(list((tmp_path / "cache/polarctl/converted").iterdir())) == 1
    assert not canary.exists()


@pytest.fixture(scope="module")
def server(rm):
    """The address of vLLM's server."""
    with vllm_server(rm, "rm", "--runner", "pooling") as address:
        yield address


def close(rewards):
    """Equal to 1e-4, of rewards of some tens to 1e-5 of their size."""
    return pytest.approx(rewards, abs=1e-4, rel=1e-5)


def post(address, route, body):
    request = urllib.request.Request(
        address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=60))["data"]


def inputs_of(rm, groups):
    """Glued texts and token ids of all candidates."""
    from polarctl.model import reward_model

    encoder = reward_model.load_encoder(str(rm))
    texts, ids = [], []
    for row in map(json.loads, groups.read_text().splitlines()):
        for candidate in row["candidates"]:
            arguments = (row["prompt"], row["reference"], candidate["output"])
            texts.append(encoder.text(*arguments))
            ids.append(encoder.encode(*arguments))
    return texts, ids


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_the_server_gives_raw_rewards(kind, server, rm, groups, by_hf):
    texts, ids = inputs_of(rm, groups)
    given = texts if kind == "text" else ids
    body = {"model": "rm", "input": given}
    pooled = [row["data"] for row in post(server, "/pooling", body)]
    found = [value[0] if isinstance(value, list) else value for value in pooled]
    assert found == close(by_hf)
    classified = post(server, "/classify", {**body, "use_activation": False})
    assert [row["probs"][0] for row in classified] == close(by_hf)


def test_score_through_the_server_gives_the_same(server, official, groups, by_hf, tmp_path):
    found, said = score(official, groups, tmp_path / "scores.jsonl", "--server", server)
    assert found == close(by_hf)
    assert f"server: vllm ({server} says so)" in said


def test_polarctl_serve_gives_the_same(official, groups, by_hf, canary, tmp_path):
    command = [BIN / "polarctl", "serve", "-m", official, "--port", "0", "--dtype", "float32"]
    child = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        address = next(line for line in child.stderr if line.startswith("serving")).split()[-1]
        found, said = score(official, groups, tmp_path / "scores.jsonl", "--server", address)
    finally:
        child.terminate()
        assert child.wait(60) == 0
    assert found == close(by_hf)
    assert "server: polarctl" in said
    assert not canary.exists()


def test_in_bfloat16_the_head_is_float32_whatever_the_checkpoint_says(rm, groups, tmp_path):
    """Rewards of a bfloat16 head would be bfloat16 numbers, and tie."""
    folder = tmp_path / "rm"
    shutil.copytree(rm, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dtype": "model"}))
    (folder / "manifest.json").unlink()  # it names the config as it was
    options = ["--backend", "vllm", *ENGINE, "--dtype", "bfloat16"]
    rewards, _ = score(folder, groups, tmp_path / "out.jsonl", *options)
    rounded = torch.tensor(rewards, dtype=torch.float64).bfloat16().tolist()
    assert sum(a != b for a, b in zip(rewards, rounded, strict=True)) > 30  # of 40
