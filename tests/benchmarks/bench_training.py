"""Training steps side by side: shared prefixes, whole sequences, and TRL's RewardTrainer.

    python tests/benchmarks/bench_training.py            # all tables
    python tests/benchmarks/bench_training.py peers      # one of: peers tricks growth fill

Every figure is a ratio of steps taken in turn in one process: forward, backward, clipping, AdamW,
float32 on a CPU, random weights, random tokens, sequences of equal length (which spares the padded
contenders their padding). Times are CPU seconds on one thread, which other work on the machine
disturbs little. The token-ratio bound is N (P + c) / (P + N c) for N candidates with P
shared and c own tokens. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
import transformers

from polarctl.model.forward import Packed, Padded
from polarctl.model.packing import pack, span_of
from polarctl.training.engine import PlainEngine
from polarctl.training.loop import Hyperparameters, Trainer

ROUNDS = 3
BUDGET = 4096  # tokens of a forward pass


@dataclass(frozen=True)
class Group:
    """Candidates of one reference: the first is chosen."""

    ids: tuple[list[int], ...]
    margin: float = 0.0


@dataclass(frozen=True)
class Shape:
    """N candidates of P shared and c own tokens; a model of some layers and some width."""

    n: int
    p: int
    c: int
    layers: int = 6
    width: int = 512

    @property
    def bound(self) -> float:
        """What sharing can give at most, if time goes with tokens."""
        return self.n * (self.p + self.c) / (self.p + self.n * self.c)

    @property
    def groups(self) -> list[Group]:
        """About a row of them, as whole sequences."""
        draw = random.Random(0)

        def ids(count: int) -> list[int]:
            return [draw.randrange(5, 300) for _ in range(count)]

        count = max(1, BUDGET // (self.n * (self.p + self.c)))
        prefixes = [ids(self.p) for _ in range(count)]
        return [Group(tuple(p + ids(self.c) for _ in range(self.n))) for p in prefixes]

    def classifier(self) -> torch.nn.Module:
        """A Llama with random weights."""
        torch.manual_seed(0)
        heads = max(1, self.width // 64)
        config = transformers.LlamaConfig(
            vocab_size=320,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=8192,
            num_labels=1,
            pad_token_id=0,
        )
        return transformers.AutoModelForSequenceClassification.from_config(config)


def ours(shape: Shape, kind: str) -> Callable[[], float]:
    """A step of ours: `shared`, `whole last layer`, `unshared` rows or `padded` batches."""
    classifier = shape.classifier()
    module = (
        Padded(classifier)
        if kind == "padded"
        else Packed(classifier, reward_only=kind != "whole last layer")
    )
    if kind == "checkpointing":
        classifier.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    engine = PlainEngine(accelerate.Accelerator(cpu=True), module, optimizer, 1.0)
    groups = shape.groups
    plan = Hyperparameters(
        lr=1e-5,
        batch_size=len(groups),
        steps=10**9,
        batch_tokens=BUDGET,
        shared=kind != "padded",
    )
    trainer = Trainer(engine, plan, 0)
    if kind == "unshared":
        # The same rows, attention and last layer; every candidate carries its own prefix.
        from polarctl.training import batches

        def cut(mine: list[Group]) -> list[batches.Micro]:
            found = []
            for row in pack([[ids] for group in mine for ids in group.ids], BUDGET):
                found.append(batches.Micro(groups=mine, row=row, pad_id=0))
            return found

        return lambda: _unshared_step(trainer, cut(groups))

    def step() -> float:
        start = time.process_time()
        next(trainer.train(iter(groups)))
        return time.process_time() - start

    return step


def _unshared_step(trainer: Trainer, micros: list) -> float:
    """A step over rows of single sequences: the loss is a plain sum, which costs the same."""
    start = time.process_time()
    for micro in micros:
        rewards = trainer.engine.module(*micro.inputs("cpu"))
        trainer.engine.backward(rewards.square().mean(), last=True)
    trainer.engine.finish(1e-5)
    return time.process_time() - start


def trl_step(shape: Shape) -> Callable[[], float]:
    """A step of TRL's RewardTrainer on the same pairs, in as many tokens a pass."""
    import tempfile

    sys.path.insert(0, str(Path(__file__).parent.parent))
    import datasets
    import trl
    from tiny import build_tokenizer

    datasets.disable_progress_bars()
    groups = shape.groups
    micro = max(1, BUDGET // (2 * (shape.p + shape.c)))
    rows = [{"chosen_ids": g.ids[0], "rejected_ids": g.ids[1]} for g in groups]
    took: list[float] = []

    class Watch(transformers.TrainerCallback):
        """Seconds of every step."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.start = time.process_time()

        def on_step_end(self, *_: object, **__: object) -> None:
            took.append(time.process_time() - self.start)

    arguments = trl.RewardConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=-(-len(rows) // micro),
        max_steps=1,
        learning_rate=1e-5,
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    trainer = trl.RewardTrainer(
        model=shape.classifier(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=build_tokenizer(),
        callbacks=[Watch()],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)

    def step() -> float:
        trainer.train()
        return took[-1]

    return step


def contender(shape: Shape, name: str) -> Callable[[], float]:
    """A step that takes its own time, in seconds."""
    return trl_step(shape) if name == "TRL" else ours(shape, name)


def race(shape: Shape, names: list[str]) -> dict[str, list[float]]:
    """Seconds of every contender's step, taken in turn, a first round left out."""
    steps = {name: contender(shape, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            seconds = step()
            if number:
                times[name].append(seconds)
    return times


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median, least and largest ratio of paired rounds."""
    every = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return statistics.median(every), every[0], every[-1]


def peak_memory(shape: Shape, name: str) -> float:
    """GiB that a process of its own takes at most over two steps."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", name, *map(str, (shape.n, shape.p, shape.c))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1]) / 2**20  # KiB


def peers() -> None:
    """Against our own paths without sharing, and against TRL."""
    names = ["shared", "unshared", "padded", "TRL"]
    print("shape          bound  vs unshared rows       of bound  vs padded  vs TRL (pairs/s)")
    for shape in (Shape(2, 768, 256), Shape(8, 768, 256), Shape(2, 512, 512)):
        racing = names if shape.n == 2 else names[:3]
        times = race(shape, racing)
        ratios = {name: ratio(times[name], times["shared"]) for name in racing[1:]}
        middle, low, high = ratios["unshared"]
        pairs = len(shape.groups) * (shape.n - 1) / statistics.median(times["shared"])
        text = f"{shape.n} x {shape.p}:{shape.c}"
        tail = "-"
        if "TRL" in ratios:
            tail = f"{ratios['TRL'][0]:.2f} ({ratios['TRL'][1]:.2f} to {ratios['TRL'][2]:.2f})"
        print(
            f"{text:14} {shape.bound:5.2f}  {middle:.2f} ({low:.2f} to {high:.2f})"
            f"  {middle / shape.bound:9.0%}  {ratios['padded'][0]:9.2f}  {tail}"
            f"   [{pairs:.2f} pairs/s]"
        )
    shape = Shape(2, 768, 256)
    print(
        "peak memory, GiB, 2 x 768:256: "
        + ", ".join(f"{name} {peak_memory(shape, name):.2f}" for name in names)
    )


def tricks() -> None:
    """What each trick gives."""
    print("shape          layers  last layer at rewards   gradient checkpointing costs")
    for shape in (Shape(2, 768, 256, layers=6), Shape(2, 768, 256, layers=12, width=256)):
        times = race(shape, ["shared", "whole last layer", "checkpointing"])
        gain = ratio(times["whole last layer"], times["shared"])
        cost = ratio(times["checkpointing"], times["shared"])
        print(
            f"{f'{shape.n} x {shape.p}:{shape.c}':14} {shape.layers:6}  "
            f"{gain[0]:.3f} ({gain[1]:.3f} to {gain[2]:.3f})   "
            f"{cost[0]:.2f} ({cost[1]:.2f} to {cost[2]:.2f})"
        )


def growth() -> None:
    """With the candidates, with P:c, with the size of the model."""
    print("shape            layers x width  bound  vs unshared rows        of bound")
    for shape in (
        *(Shape(n, 384, 128, 4, 256) for n in (2, 4, 8, 16)),
        *(Shape(4, p, 128, 4, 256) for p in (128, 768, 1536)),
        *(Shape(4, 384, 128, 4, width) for width in (128, 512)),
    ):
        times = race(shape, ["shared", "unshared"])
        middle, low, high = ratio(times["unshared"], times["shared"])
        print(
            f"{f'{shape.n} x {shape.p}:{shape.c}':16} {f'{shape.layers} x {shape.width}':14}  "
            f"{shape.bound:5.2f}  {middle:.2f} ({low:.2f} to {high:.2f})"
            f"  {middle / shape.bound:9.0%}"
        )


def fill() -> None:
    """How full rows are, by the largest group's share of a row."""
    print("groups of lognormal length, mean/budget   rows   fill (all rows but the last)")
    for share in (0.02, 0.1, 0.25, 0.5):
        draw = random.Random(1)
        mean = share * 32768
        lengths = [
            min(32768, max(16, int(draw.lognormvariate(0, 0.6) * mean))) for _ in range(2000)
        ]
        groups = [
            [[1] * (n // 2) + [2] * (n // 4), [1] * (n // 2) + [3] * (n // 4)] for n in lengths
        ]
        rows = pack(groups, 32768)
        sizes = sorted(sum(span_of(groups[i]).tokens for i in row.members) for row in rows)
        used = sum(sizes[1:]) / (len(sizes[1:]) * 32768)
        print(f"{share:10.2f} {'':28} {len(rows):6}   {used:.1%}")


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser()
    tables = {"peers": peers, "tricks": tricks, "growth": growth, "fill": fill}
    parser.add_argument("tables", nargs="*", default=list(tables))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, if there, warns of no GPU
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if given.peak:
        step = contender(Shape(*map(int, given.tables)), given.peak)
        step(), step()
        # Not getrusage: its peak begins at that of the process which started this one.
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {ROUNDS} rounds"
    )
    for name in given.tables:
        print(f"\n{name}: {tables[name].__doc__}")
        tables[name]()


if __name__ == "__main__":
    main()
