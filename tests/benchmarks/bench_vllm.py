"""Our engine and vLLM's, on the same groups, model and machine: seconds of wall time in turn.

    .venv-vllm/bin/python tests/benchmarks/bench_vllm.py      # `make test-vllm` makes .venv-vllm

6 layers of width 512, random weights, float32 on a CPU, one thread each. vLLM runs offline with its
prefix cache, which is emptied before every round, so that each round reads every prefix once. It
caches whole blocks, which its CPU build makes 128 tokens long unless told; here they have 32, so
that a prefix of 192 tokens is not read as one of 128. Processor seconds are those of all threads,
vLLM's own process included: one that computed on two threads would show.
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
    from polarctl.scoring.scorer import ModelScorer
    from polarctl.scoring.vllm import VllmScorer

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROUNDS = 3
BLOCK = 32  # tokens
SHAPES = (
    *((n, p, 256) for p in (768, 256) for n in (1, 8, 32)),
    (32, 192, 64),
)


def main() -> None:
    """Print the table."""
    try:
        import vllm
    except ImportError:
        print("vLLM is not here: `make test-vllm` makes .venv-vllm, which has it")
        return
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch
    import transformers
    from benchmarks.bench_scoring import groups_of
    from tiny import build_lm

    from polarctl.model import reward_model
    from polarctl.scoring.scorer import ModelScorer
    from polarctl.scoring.vllm import VllmScorer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lm = build_lm(folder / "lm", hidden_size=512, layers=6, context=4096, sharpness=0.05)
        made = reward_model.create(base=str(lm))
        torch.nn.init.normal_(made.model.score.weight, std=0.1)
        made.save(folder / "rm")
        weights = sum(weight.numel() for weight in made.model.parameters())
        ours = ModelScorer(reward_model.load(str(folder / "rm")), 8192)
        engine = {"max_num_batched_tokens": 8192, "enforce_eager": True, "block_size": BLOCK}
        theirs = VllmScorer(str(folder / "rm"), dtype="float32", engine_options=engine)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, vllm {vllm.__version__}, "
            f"{weights / 1e6:.0f}M weights, {ROUNDS} rounds\n"
        )
        print("| N x P:c | vLLM's s / ours | processor s | ours, s | its cache | all of P | gap |")
        print("|---|---|---|---|---|---|---|")
        for n, p, c in SHAPES:
            # The tiny tokenizer has a few ids less than the groups are drawn from.
            ids = [[[i % 256 for i in one] for one in group] for group in groups_of(n, p, c)]
            _row(ours, theirs, (n, p, c), ids)


def _row(ours: ModelScorer, theirs: VllmScorer, shape: tuple[int, int, int], made: list) -> None:
    """Measure one shape and print its line."""
    n, p, c = shape
    ratios, processor, seconds, gap = [], [], [], 0.0
    for number in range(ROUNDS + 1):
        theirs.engine.reset_prefix_cache()
        before = theirs.stats()
        start, idle = time.perf_counter(), _processor_s()
        first = ours.rewards_of(made)
        middle, used = time.perf_counter(), _processor_s()
        second = theirs.rewards_of(made)
        end, after = time.perf_counter(), _processor_s()
        found = theirs.stats()
        if number:
            seconds.append(middle - start)
            ratios.append((end - middle) / (middle - start))
            processor.append((after - used) / (used - idle))
        pairs = [
            (a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
        ]
        gap = max(gap, *(abs(a - b) for a, b in pairs))
    share = (found["hits"] - before["hits"]) / (found["queries"] - before["queries"])
    print(
        f"| {n} x {p}:{c} | {_spread(ratios)} | {_spread(processor)} "
        f"| {statistics.median(seconds):.2f} | {share:.0%} | {(n - 1) * p / (n * (p + c)):.0%} "
        f"| {gap:.1e} |",
        flush=True,
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _processor_s() -> float:
    """Processor seconds so far of this process and of those that it started and that live."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


if __name__ == "__main__":
    main()
