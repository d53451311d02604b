"""The documented loop of rft, pair and finetune, at tiny size, typed once and typed again."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny import build_lm, build_rm

from polarctl import cli

PAGE = Path(__file__).parent.parent.parent / "docs" / "guides" / "rft.md"
SMALL = {
    "POLARCTL_RFT_MAX_STEPS": "2",
    "POLARCTL_RFT_BATCH_SIZE": "8",
    "POLARCTL_RFT_NUM_GENERATIONS": "4",
    "POLARCTL_RFT_MAX_NEW_TOKENS": "8",
    "POLARCTL_RFT_LR": "1e-3",
    "POLARCTL_RFT_DEVICE": "cpu",
    "POLARCTL_FINETUNE_MAX_STEPS": "2",
    "POLARCTL_FINETUNE_BATCH_SIZE": "4",
    "POLARCTL_FINETUNE_DEVICE": "cpu",
}


def commands(folder, **variables):
    """The commands of the loop, as bash expands them."""
    block = PAGE.read_text().partition("<!-- test: rounds -->\n```bash\n")[2].partition("```")[0]
    assert block.count("polarctl ") == 3
    stub = folder / "bin" / "polarctl"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" ""\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        env={**os.environ, **variables, "PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [part.splitlines() for part in found.stdout.removesuffix("\n\n").split("\n\n")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    build_lm(tmp_path / "models" / "policy", seed=1)
    (tmp_path / "runs").mkdir()
    build_rm(tmp_path / "runs" / "rm", tmp_path / "models" / "policy")
    prompts = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(20)]
    ranked = [{**p, "chosen": p["reference"], "rejected": " no"} for p in prompts]
    for name, rows in (("prompts", prompts), ("ranked", ranked)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_documented_loop_runs_and_does_nothing_new_when_typed_again(folder, capfd):
    # Whatever the random policy writes, its shorter texts are right.
    words = commands(folder, ROUNDS="1 2", CHECK="length:8")
    assert [one[0] for one in words] == ["rft", "pair", "finetune"] * 2
    for one in words:
        assert cli.run(one) == 0, capfd.readouterr().err
    first, second = (rows(folder / f"labels-{n}.jsonl") for n in (1, 2))
    assert first and second
    for n, labels in ((1, first), (2, second)):
        written = rows(folder / f"runs/rft-{n}/rollouts.jsonl")
        for triple in labels:
            assert len(triple["rejected"]) > 8
            assert len(triple["chosen"]) <= 8 or triple["chosen"] == triple["reference"]
            mine = [r["output"] for r in written if r["prompt"] == triple["prompt"]]
            assert triple["rejected"] in mine
    # The second reward model has learned from all labels, the second policy from the first.
    counts = [
        json.loads((folder / f"runs/rm-{n}/manifest.json").read_text())["inputs"] for n in (1, 2)
    ]
    assert [len(inputs) for inputs in counts] == [2, 3]
    start = json.loads((folder / "runs/rft-2/manifest.json").read_text())["config"]
    assert (start["model"], start["reward_model"]) == ("runs/rft-1", "runs/rm-1")

    def state():
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = state()
    for one in words:
        assert cli.run(one) == 0, capfd.readouterr().err
    assert state() == before
