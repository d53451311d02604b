"""What docs/guides/scoring.md shows of vLLM, run as it stands there."""

import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.test_docs import BLOCKS, ELSEWHERE, official

BIN = Path(sys.executable).parent
# The program `vllm` asks for the version of the package `vllm`, which its CPU build is not.
VLLM = f"""#!/bin/sh
shift
exec {BIN}/python -m vllm.entrypoints.openai.api_server --model "$@"
"""


@pytest.fixture
def folder(tmp_path):
    """The page's models and records, the model converted as the page says."""
    official(tmp_path)
    convert = [BIN / "polarctl", "convert", "checkpoint", "POLAR-7B", "-o", "POLAR-7B-llama"]
    subprocess.run(convert, check=True, cwd=tmp_path, capture_output=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text(VLLM)
    (tmp_path / "bin" / "vllm").chmod(0o755)
    return tmp_path


def environment(folder):
    return {
        **os.environ,
        "PATH": f"{folder}/bin:{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def run(text, folder):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_block_is_run_here():
    found = [str(block.fixture) for block in BLOCKS if block.fixture in ELSEWHERE]
    ours = ["vllm-client", "vllm-offline", "vllm-serve"]
    assert sorted(name for name in found if name.startswith("vllm-")) == ours
    assert set(found) == set(ELSEWHERE)  # the others have tests beside test_docs


def test_the_server_and_its_client(folder):
    text = {block.fixture: block.text for block in BLOCKS}
    (command,) = text["vllm-serve"].strip().splitlines()
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            shlex.split(command), cwd=folder, env=environment(folder), stdout=log, stderr=log
        )
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        run(text["vllm-client"], folder)
    finally:
        server.terminate()
        server.wait(60)
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 8


def test_the_engine_without_a_server(folder):
    text = {block.fixture: block.text for block in BLOCKS}
    run(text["vllm-offline"], folder)
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 8
