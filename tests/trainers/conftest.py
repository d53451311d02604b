"""Files and a reward server from the project's own environment, for the trainers in theirs."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"
OUTPUTS = ["It is 4.", "The sum is 7.", "Paris", "yes"]
PROMPTS = 12
MAKE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import build_lm, build_rm
here = Path(sys.argv[2])
build_lm(here / "lm", seed=1)
build_lm(here / "chat", chat=True, seed=2)
build_rm(here / "rm", here / "lm")
rows = [{"prompt": f"What is {i} + 4?", "reference": f"It is {i + 4}."} for i in range(12)]
(here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def polarctl(*words):
    found = subprocess.run(
        [PYTHON, "-m", "polarctl", *map(str, words)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Tiny models, prompts, and what `rft` writes for both trainers."""
    here = tmp_path_factory.mktemp("world")
    words = [PYTHON, "-c", MAKE, str(ROOT / "tests"), str(here)]
    subprocess.run(words, env=ENVIRONMENT, check=True, capture_output=True)
    for engine in ("verl", "openrlhf"):
        polarctl(
            *("rft", here / "prompts.jsonl", "-m", here / "chat", "--reward-model", here / "rm"),
            *("--engine", engine, "--server", "http://127.0.0.1:1", "--max-new-tokens", 32),
            *("-o", here / engine),
        )
    return here


@pytest.fixture(scope="session")
def served(folder):
    """Address of a `polarctl serve`."""
    words = [PYTHON, "-m", "polarctl", "serve", "-m", folder / "rm", "--port", "0"]
    child = subprocess.Popen(
        [*map(str, words), "--end-token", "<|end|>"],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    for line in child.stderr:
        if line.startswith("serving "):
            yield line.split()[-1]
            break
    child.terminate()
    child.communicate(timeout=30)


def score(folder, rows):
    """The rewards that `polarctl score` gives."""
    path, out = folder / "asked.jsonl", folder / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    polarctl(
        *("score", path, "-m", folder / "rm", "-o", out, "--device", "cpu", "--force"),
        *("--reward-floor", "-20"),
    )
    found = [json.loads(line)["reward"] for line in out.read_text().splitlines()]
    return pytest.approx(found, abs=1e-4)


def wanted_rewards(folder, columns):
    """Those of `OUTPUTS` for the first rows of verl's data set."""
    return score(
        folder,
        [
            {
                "prompt": columns["raw_prompt"][i],
                "reference": columns["reward_model"][i]["ground_truth"],
                "output": text,
            }
            for i, text in enumerate(OUTPUTS)
        ],
    )
