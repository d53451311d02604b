"""The stages as one pipeline: through pipes and through files, the bytes are the same."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import build_lm


@pytest.fixture
def place(tmp_path):
    """A folder with two policies, their pool and prompts."""
    for name, seed in (("base", 1), ("other", 2)):
        build_lm(tmp_path / name, seed=seed)
    pool = [{"policy": name, "model": name, "kind": "base"} for name in ("base", "other")]
    prompts = [{"prompt": f"What is the sum of {i} and 4?"} for i in range(12)]
    for name, rows in (("pool", pool), ("prompts", prompts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def bash(script: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def sha256(path: Path) -> str:
    # A verdict names the file of its record.
    data = re.sub(rb'"where":"(?:scores.jsonl|-|stdin|<stdin>):', b'"where":"', path.read_bytes())
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_pipes_and_files_give_the_same_bytes(place):
    bash(
        """
        sample="polarctl sample prompts.jsonl --pool pool.jsonl --max-new-tokens 12"
        pretrain="polarctl pretrain -m base --batch-size 4 --lr 1e-3"
        $sample -o samples.jsonl
        polarctl pair samples.jsonl -o triples.jsonl
        $pretrain triples.jsonl -o by-files
        $sample | tee piped-samples.jsonl | polarctl pair - | tee piped-triples.jsonl \
          | $pretrain - -o by-pipes
        polarctl score triples.jsonl -m by-files -o scores.jsonl
        polarctl eval scores.jsonl -o verdicts.jsonl --report report
        polarctl score - -m by-pipes < triples.jsonl | tee piped-scores.jsonl \
          | polarctl eval - --report piped-report > piped-verdicts.jsonl
        """,
        place,
    )
    for name in ("samples.jsonl", "triples.jsonl", "scores.jsonl", "verdicts.jsonl"):
        assert (place / name).stat().st_size > 0
        assert sha256(place / name) == sha256(place / f"piped-{name}"), name
    for name in ("model.safetensors", "metrics.jsonl"):
        assert sha256(place / "by-files" / name) == sha256(place / "by-pipes" / name), name
    for name in ("report.json", "margins.png", "accuracy.png"):
        assert sha256(place / "report" / name) == sha256(place / "piped-report" / name), name
