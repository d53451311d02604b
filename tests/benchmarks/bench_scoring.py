"""Scoring side by side: what candidates share computed once, against the plain batched forward.

    python tests/benchmarks/bench_scoring.py          # both tables
    python tests/benchmarks/bench_scoring.py groups   # one of: groups records

`groups`: N candidates of one prompt and reference, P shared and c own tokens each, 6 layers of
width 512, random weights, float32 on a CPU. Contenders in turn in one process, CPU seconds on one
thread.
The bound is N (P + c) / (P + N c). Sequences have equal length, which spares the plain forward its
padding. `records`: `polarctl score` as a whole, on files that grow, with a model so small that what
is around it shows; peak memory is that of the program's process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from polarctl.model.forward import Padded
from polarctl.model.reward_model import pad
from polarctl.scoring.scorer import ModelScorer, token_batches

ROUNDS, BUDGET = 3, 4096


class Bare:
    """As much of a reward model as a scorer needs when it is given token ids."""

    def __init__(self, layers: int = 6, width: int = 512):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=320,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 128),
            max_position_embeddings=8192,
            num_labels=1,
            pad_token_id=0,
        )
        made = transformers.AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(made.score.weight)
        self.model, self.device = made.eval(), torch.device("cpu")


def groups_of(n: int, p: int, c: int) -> list[list[list[int]]]:
    """About 8,192 tokens of groups, as whole sequences."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(5, 300) for _ in range(count)]

    prefixes = [ids(p) for _ in range(max(1, 2 * BUDGET // (n * (p + c))))]
    return [[prefix + ids(c) for _ in range(n)] for prefix in prefixes]


def plain(model: torch.nn.Module, groups: list[list[list[int]]]) -> list[float]:
    """Rewards by padded batches sorted by length, through the library's own attention."""
    flat = [ids for group in groups for ids in group]
    module, found = Padded(model), [0.0] * len(flat)
    with torch.inference_mode():
        for batch in token_batches([len(ids) for ids in flat], BUDGET):
            values = module(*pad([flat[i] for i in batch], 0, "cpu")).tolist()
            for i, value in zip(batch, values, strict=True):
                found[i] = value
    return found


def groups() -> None:
    """Against the plain batched forward."""
    shared, alone = ModelScorer(Bare(), BUDGET), Bare().model
    print("N x P:c            bound   times faster        of bound   largest difference")
    for n, p, c in (
        *((1, 960, 64), (1, 300, 20)),
        *((8, 64, 64), (8, 192, 64), (8, 768, 64)),
        *((32, 64, 64), (32, 192, 64), (32, 768, 64)),
    ):
        made = groups_of(n, p, c)
        ratios, gap = [], 0.0
        for number in range(ROUNDS + 1):
            start = time.process_time()
            first = [value for group in shared.rewards_of(made) for value in group]
            middle = time.process_time()
            second = plain(alone, made)
            end = time.process_time()
            if number:
                ratios.append((end - middle) / (middle - start))
            gap = max(gap, *(abs(a - b) for a, b in zip(first, second, strict=True)))
        bound = n * (p + c) / (p + n * c)
        print(
            f"{f'{n} x {p}:{c}':18} {bound:5.2f}   {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})  {statistics.median(ratios) / bound:7.0%}"
            f"   {gap:.1e}"
        )


def records() -> None:
    """The whole program by the number of records, and the share of what is not the model."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tiny import build_lm

    from polarctl.model import reward_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = reward_model.create(base=str(build_lm(folder / "lm")))
        torch.nn.init.normal_(made.model.score.weight)
        made.save(folder / "rm")
        print("records    seconds   records/s   peak MiB   (4 candidates a record, 28 k weights)")
        for count in (500, 2000, 8000):
            data = folder / f"{count}.jsonl"
            rows = (
                {
                    "prompt": f"What is {i} and {i}?",
                    "reference": f"It is {2 * i}.",
                    "candidates": [{"output": f"{2 * i + k}."} for k in range(4)],
                }
                for i in range(count)
            )
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            before = os.times()
            peak = _scored(folder / "rm", data, folder / "out.jsonl")
            after = os.times()
            spent = after.children_user - before.children_user
            print(f"{count:7}   {spent:8.1f}   {count / spent:9.0f}   {peak:8.0f}")
        _shares(folder / "rm", data)


def _scored(rm: Path, data: Path, out: Path) -> float:
    """Run `polarctl score` in a process of its own; its highest resident memory, MiB."""
    # Linux's `ru_maxrss` of a child begins at its parent's: the process itself reads its peak.
    code = (
        "import sys; from polarctl.cli import run; status = run(sys.argv[1:]);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line));"
        "sys.exit(status)"
    )
    options = ["score", str(data), "-m", str(rm), "-o", str(out), "-q", "--force"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout.split()[-1]) / 1024


def _shares(rm: Path, data: Path) -> None:
    """Shares of reading, of encoding, of the model and of writing for the same records."""
    from polarctl.config import Common
    from polarctl.model import reward_model
    from polarctl.records import kind_of_scorable
    from polarctl.storage.read import Reader, sizes
    from polarctl.storage.write import Output

    loaded = reward_model.load(str(rm))
    scorer = ModelScorer(loaded, 8192)
    start = time.process_time()
    read = list(Reader([str(data)], kind_of_scorable))
    after_reading = time.process_time()
    encoded = [
        [
            e.ids
            for e in loaded.encoder.report_group(
                r["prompt"], r["reference"], [c["output"] for c in r["candidates"]]
            )
        ]
        for r in read
    ]
    after_encoding = time.process_time()
    rewards = scorer.rewards_of(encoded)
    after_scoring = time.process_time()
    config = Common(input=(str(data),), output=str(data) + ".out")
    with Output("score", config, sizes([str(data)])) as out:
        for index, (record, values) in enumerate(zip(read, rewards, strict=True), 1):
            out.write({**record, "rewards": values})
            if index % 512 == 0:
                out.commit(out.units + 1)
        out.commit(out.units + 1)
    end = time.process_time()
    whole = end - start
    print(
        f"of {whole:.1f} s in one process: "
        f"reading and checking {(after_reading - start) / whole:.1%}, "
        f"tokenizing {(after_encoding - after_reading) / whole:.1%}, "
        f"the model {(after_scoring - after_encoding) / whole:.1%}, "
        f"writing {(end - after_scoring) / whole:.1%}"
    )


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser()
    tables = {"groups": groups, "records": records}
    parser.add_argument("tables", nargs="*", default=list(tables))
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {ROUNDS} rounds"
    )
    for name in given.tables:
        print(f"\n{name}: {tables[name].__doc__}")
        tables[name]()


if __name__ == "__main__":
    main()
