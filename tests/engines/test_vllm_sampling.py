"""`sample` through vLLM for real, on the CPU: offline and behind its server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines.vllm_server import ENVIRONMENT, vllm_server
from tiny import build_lm

PROMPTS = [
    *({"prompt": f"The sum of {n} and {n * 7} is"} for n in range(12)),
    {"prompt": [{"role": "user", "content": "What is the capital of France?"}]},
    {"prompt": "The boats lay still", "wrapper": "pretrain"},
    {"prompt": "xyz " * 200, "id": "long"},  # longer than the context
]
ENGINE = {"enforce_eager": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A policy whose heads are as wide as vLLM's attention on a CPU needs."""
    folder = tmp_path_factory.mktemp("models")
    return build_lm(folder / "lm", chat=True, hidden_size=256, sharpness=0.1)


@pytest.fixture(scope="module")
def server(model):
    """The address of vLLM's server."""
    with vllm_server(model, "lm") as address:
        yield address


def sample(folder, pool):
    """Trajectories by (policy, prompt, sample), the manifest's counts, and what was said."""
    prompts, lines, out = folder / "prompts.jsonl", folder / "pool.jsonl", folder / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    lines.write_text("".join(json.dumps(row) + "\n" for row in pool))
    command = ["sample", prompts, "--pool", lines, "-o", out, "--rejects", folder / "bad.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "polarctl", *command, "--max-new-tokens", "24", "--no-clean"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    counts = json.loads(Path(f"{out}.manifest.json").read_text())["counts"]
    return {(r["policy"], r["id"], r["sample"]): r for r in rows}, counts, done.stderr


def of(policy, rows, *, whole=True):
    """What a policy wrote: text, why it ended, how long it is.

    A text that the length limit cuts inside a character ends in U+FFFD, which vLLM's server leaves
    away.
    """
    return {
        (name, number): (
            row["output"] if whole else row["output"].rstrip("\ufffd"),
            row["finish_reason"],
            row["num_tokens"],
        )
        for (writer, name, number), row in rows.items()
        if writer == policy
    }


def test_all_backends_write_the_greedy_texts_of_transformers_and_samples_differ(
    model, server, tmp_path
):
    common = {"top_k": 1, "samples": 1}
    here = {"model": str(model), "dtype": "float32", **common}
    there = {"model": "lm", "backend": "openai", "url": server, **common}
    rows, counts, said = sample(
        tmp_path,
        [
            {"policy": "base", "kind": "base", **here},
            {"policy": "chat", "kind": "chat", **here},
            {"policy": "offline", "kind": "base", "backend": "vllm", "engine": ENGINE, **here},
            # Another engine, after the end of the first.
            {**here, "policy": "drawn", "kind": "base", "backend": "vllm", "engine": ENGINE}
            | {"top_k": 50, "samples": 4},
            {"policy": "served-base", "kind": "base", **there},
            {"policy": "served-chat", "kind": "chat", **there},
        ],
    )
    base, chat = of("base", rows), of("chat", rows)
    assert len(base) == 14 and len(chat) == 13
    assert {end for _, end, _ in base.values()} == {"stop", "length"}
    assert of("offline", rows) == base
    for name, own in (("served-base", "base"), ("served-chat", "chat")):
        assert of(name, rows, whole=False) == of(own, rows, whole=False)
    drawn = of("drawn", rows)
    assert len(drawn) == 14 * 4 and len(set(drawn.values())) > 50  # each has its own seed
    assert {end for _, end, _ in drawn.values()} == {"stop", "length"}
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(bad) == 6 and {row["record"]["id"] for row in bad} == {"long"}
    assert counts["writers"]["served-chat"]["served_by"] == "vllm"
    assert counts["policies"]["served-base"]["prompt_tokens"] > 14 * 5
    assert "vLLM starts for policy `offline`" in said


def test_what_vllm_refuses_is_one_line(model, tmp_path):
    line = {"policy": "p", "model": str(model), "kind": "base", "backend": "vllm"}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "pool.jsonl").write_text(json.dumps({**line, "engine": {"no_such": 1}}))
    done = subprocess.run(
        [sys.executable, "-m", "polarctl", "sample", "prompts.jsonl", "--pool", "pool.jsonl"]
        + ["-o", "out.jsonl"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pool.jsonl:1: vLLM does not start for policy `p`: " in done.stderr
    assert "no_such" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
