"""`polarctl score` and `serve` on a GPU: the rewards of the CPU, and a process for each GPU."""

import json

import pytest
import torch

from polarctl.cli import run

pytestmark = pytest.mark.gpu
WORDS = "the sea was calm that day and nobody spoke of the storm".split()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    with open(path, "w") as stream:
        for i in range(1200):  # three windows
            candidates = [{"output": " ".join(WORDS[: 1 + (i + k) % 10])} for k in range(1 + i % 4)]
            row = {"prompt": f"q{i}", "reference": "the sea", "candidates": candidates}
            stream.write(json.dumps(row) + "\n")
    return path


def scored(rows, tiny_rm, out, *options):
    assert run(["score", str(rows), "-m", str(tiny_rm), "-o", str(out), "-q", *options]) == 0
    return [r for line in out.read_text().splitlines() for r in json.loads(line)["rewards"]]


@pytest.fixture(scope="module")
def by_cpu(rows, tiny_rm, tmp_path_factory):
    return scored(rows, tiny_rm, tmp_path_factory.mktemp("cpu") / "out.jsonl", "--device", "cpu")


def test_float32_on_the_gpu_gives_the_rewards_of_the_cpu(rows, tiny_rm, by_cpu, tmp_path):
    found = scored(rows, tiny_rm, tmp_path / "out.jsonl", "--device", "cuda", "--dtype", "float32")
    assert found == pytest.approx(by_cpu, abs=1e-4)


def test_bfloat16_on_the_gpu_keeps_the_order(rows, tiny_rm, by_cpu, tmp_path):
    found = torch.tensor(scored(rows, tiny_rm, tmp_path / "out.jsonl", "--dtype", "bfloat16"))
    wanted = torch.tensor(by_cpu)
    assert torch.corrcoef(torch.stack([found, wanted]))[0, 1] > 0.99


def test_a_process_for_each_gpu_writes_the_bytes_of_one(rows, tiny_rm, tmp_path):
    """With one GPU this is one process; with more, as many."""
    scored(rows, tiny_rm, tmp_path / "one.jsonl", "--dtype", "float32")
    count = str(torch.cuda.device_count())
    scored(rows, tiny_rm, tmp_path / "all.jsonl", "--dtype", "float32", "--gpus", count)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()
