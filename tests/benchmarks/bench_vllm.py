"""Our engine and vLLM's, on the same groups, model and machine: seconds of wall time in turn.

    .venv-vllm/bin/python tests/benchmarks/bench_vllm.py      # `make test-vllm` makes .venv-vllm

6 layers of width 512, random weights, float32 on a CPU, one thread each. vLLM runs offline with its
prefix cache, which is emptied before every round, so that each round reads every prefix once.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polarctl.backends.vllm import VllmScorer
    from polarctl.scoring import ModelScorer

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROUNDS = 3


def main() -> None:
    """Print the table."""
    try:
        import vllm
    except ImportError:
        print("vLLM is not here: `make test-vllm` makes .venv-vllm, which has it")
        return
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch
    from benchmarks.bench_scoring import groups_of
    from tiny import build_lm

    from polarctl import model
    from polarctl.backends.vllm import VllmScorer
    from polarctl.scoring import ModelScorer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lm = build_lm(folder / "lm", hidden_size=512, layers=6, context=4096, sharpness=0.05)
        made = model.create(base=str(lm))
        torch.nn.init.normal_(made.model.score.weight, std=0.1)
        made.save(folder / "rm")
        weights = sum(weight.numel() for weight in made.model.parameters())
        ours = ModelScorer(model.load(str(folder / "rm")), 8192)
        engine = {"max_num_batched_tokens": 8192, "enforce_eager": True}
        theirs = VllmScorer(str(folder / "rm"), dtype="float32", engine_options=engine)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"vllm {vllm.__version__}, {weights / 1e6:.0f}M weights, {ROUNDS} rounds"
        )
        print("N x P:c            vLLM's seconds / ours       from its cache   difference")
        for n, p, c in ((1, 768, 256), (8, 768, 256), (32, 768, 256), (8, 256, 256), (32, 192, 64)):
            # The tiny tokenizer has a few ids less than the groups are drawn from.
            ids = [[[i % 256 for i in one] for one in group] for group in groups_of(n, p, c)]
            _row(ours, theirs, f"{n} x {p}:{c}", ids)


def _row(ours: ModelScorer, theirs: VllmScorer, name: str, made: list) -> None:
    ratios, gap = [], 0.0
    for number in range(ROUNDS + 1):
        theirs.engine.reset_prefix_cache()
        before = theirs.stats()
        start = time.perf_counter()
        first = ours.rewards_of(made)
        middle = time.perf_counter()
        second = theirs.rewards_of(made)
        end = time.perf_counter()
        after = theirs.stats()
        if number:
            ratios.append((end - middle) / (middle - start))
        pairs = [
            (a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
        ]
        gap = max(gap, *(abs(a - b) for a, b in pairs))
    share = (after["hits"] - before["hits"]) / (after["queries"] - before["queries"])
    print(
        f"{name:18} {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})  {share:16.0%}   {gap:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
