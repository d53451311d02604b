"""The page "Your own data" from its first command to its last, as typed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def accuracy(verdicts):
    return sum(row["correct"] for row in verdicts) / len(verdicts)


@pytest.mark.slow
def test_the_page_leads_from_rows_to_a_judged_model(tmp_path):
    from test_docs import blocks_of

    page = (ROOT / "docs/guides/your-data.md").read_text(encoding="utf-8")
    blocks = [b.text for b in blocks_of(page, "your-data.md") if b.fixture == "your-data"]
    assert len(blocks) == 5
    shutil.copytree(ROOT / "docs/samples", tmp_path / "docs/samples")
    (tmp_path / "runs").mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    print(f"{time.monotonic() - start:.0f} s")  # for whoever measures
    assert len(lines(tmp_path / "train.jsonl")) == 139
    verdicts, plain = lines(tmp_path / "verdicts.jsonl"), lines(tmp_path / "plain-verdicts.jsonl")
    assert len(verdicts) == len(plain) == 61
    # Other processors give other last digits, so the page's figures move a little.
    assert accuracy(verdicts) > 0.75 and accuracy(plain) > 0.75
    easy = [row for row in verdicts if row["category"] != "wrong number"]
    assert accuracy(easy) > 0.9
    assert (tmp_path / "runs/report/report.html").exists()
    scored = lines(tmp_path / "scores.jsonl")
    assert len(scored) == 10 and all(len(row["rewards"]) == 2 for row in scored)
    evasive = ("hard to say", "It depends", "nobody can tell", "Ask my", " we", " is")
    best = [row["candidates"][row["best"]]["output"] for row in scored]
    assert sum(text.rstrip(".").endswith(evasive) or "depends" in text for text in best) <= 1


@pytest.mark.slow
def test_the_sample_files_are_those_that_their_script_writes(tmp_path):
    shutil.copy(ROOT / "docs/samples/make.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make.py"], check=True, capture_output=True)
    for name in ("pairs.csv", "answers.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "docs/samples" / name).read_bytes()
