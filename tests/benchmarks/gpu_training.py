"""Tokens a second and MFU of training steps on one GPU, with random weights of POLAR's shapes.

    python tests/benchmarks/gpu_training.py --shape 1.8B --rows 16384 32768
    python tests/benchmarks/gpu_training.py --shape 7B --weights bfloat16 --checkpointing

Forward, backward, clipping and AdamW of pairs with P:c = 3:1 in rows of so many tokens. MFU by 6 N
FLOPs a token that went through the model (`polarctl.training.flops`); effective tokens are those
of whole sequences. `--weights bfloat16` keeps weights and moments in bfloat16, which fits 7B on one
GPU and is for measuring alone: nothing learns at such rates.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import accelerate
import torch
import transformers

from polarctl.model.forward import Packed
from polarctl.model.packing import pack
from polarctl.training import flops
from polarctl.training.batches import Micro
from polarctl.training.engine import PlainEngine

SHAPES = {
    "1.8B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
STEPS, WARM = 8, 3


def rows_of(tokens: int, sequence: int, shared: bool) -> tuple[Micro, int]:
    """A full row of pairs of `sequence` tokens each, and its tokens as whole sequences."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(5, 90_000) for _ in range(count)]

    own = sequence // 4
    span = (sequence - own) + 2 * own if shared else 2 * sequence
    groups = []
    for _ in range(max(1, tokens // span)):
        prefix = ids(sequence - own)
        pair = [prefix + ids(own), prefix + ids(own)]
        groups += [pair] if shared else [[pair[0]], [pair[1]]]
    (row,) = pack(groups, tokens)
    return Micro(groups=groups, row=row, pad_id=0), sum(len(x) for g in groups for x in g)


def main() -> None:
    """Print a row per combination."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1.8B")
    parser.add_argument("--rows", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    half = given.weights == "bfloat16"
    config = transformers.LlamaConfig(
        vocab_size=92544,
        max_position_embeddings=32768,
        num_labels=1,
        pad_token_id=2,
        **SHAPES[given.shape],
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    model = model.to(torch.bfloat16) if half else model
    if given.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Packed(model.train())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    boss = accelerate.Accelerator(mixed_precision="no" if half else "bf16")
    engine = PlainEngine(boss, module, optimizer, 1.0)
    size = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    name = torch.cuda.get_device_name()
    peak = flops.peak(name, half=True)
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, N = {size:,}"
    )
    print("shared  row tokens  computed tok/s (spread)     effective tok/s   MFU   peak GiB")
    for shared in (False, True):
        for tokens in given.rows:
            micro, effective = rows_of(tokens, given.sequence, shared)
            torch.cuda.reset_peak_memory_stats()
            took = []
            for _ in range(STEPS + WARM):
                torch.cuda.synchronize()
                start = time.perf_counter()
                engine.backward(engine.module(*micro.inputs("cuda")).square().mean(), last=True)
                engine.finish(1e-6)
                torch.cuda.synchronize()
                took.append(time.perf_counter() - start)
            seconds = statistics.median(took[WARM:])
            speed = micro.computed / seconds
            low, high = micro.computed / max(took[WARM:]), micro.computed / min(took[WARM:])
            used = "?" if peak is None else f"{flops.mfu(speed, size, peak):.1%}"
            print(
                f"{shared!s:7} {micro.computed:10,}  {speed:10,.0f} ({low:,.0f} to {high:,.0f})"
                f"  {effective / seconds:14,.0f}  {used:>5}"
                f"  {torch.cuda.max_memory_allocated() / 2**30:8.1f}"
            )


if __name__ == "__main__":
    main()
