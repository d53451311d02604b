"""What a run will be, before it is: tokens, steps, memory, disk and hours.

From the model's config and a sample of the data; no weights are read.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polarctl import console
from polarctl.model.packing import pack, span_of
from polarctl.training.loop import Hyperparameters
from polarctl.training.memory import Memory, Model, disk, memory
from polarctl.training.options import TrainConfig
from polarctl.training.speeds import MEMORY, Speed, published

_ROOM = 0.9  # share of a GPU's memory that an estimate may fill


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a sample of the encoded triples shows.

    Attributes:
        triples: Triples of the sample.
        tokens: Mean tokens of a triple, its sequences counted whole.
        computed: Mean tokens of a triple in a row, its prefix counted once.
        fill: Share of the rows' budget that is used; a last, unfilled row is left out.
        longest: Tokens of the longest triple in a row.
        cut: How many triples had a piece cut, by piece, and `any`.
    """

    triples: int
    tokens: float
    computed: float
    fill: float
    longest: int
    cut: Counter[str]

    @property
    def saved(self) -> float:
        """Share of the tokens that sharing prefixes saves."""
        return 1 - self.computed / self.tokens


def look(groups: Sequence[Any], batch_tokens: int) -> Sample:
    """What some encoded triples show of the whole.

    Args:
        groups: Encoded triples (`polarctl.training.data.Group`).
        batch_tokens: Tokens of a row.
    """
    spans = [span_of(group.ids) for group in groups]
    rows = sorted(len(row.ids) for row in pack([group.ids for group in groups], batch_tokens))
    full = rows[1:] or rows
    cut: Counter[str] = Counter()
    for group in groups:
        cut.update(group.cut)
        cut["any"] += bool(group.cut)
    return Sample(
        triples=len(groups),
        tokens=sum(span.unshared for span in spans) / len(spans),
        computed=sum(span.tokens for span in spans) / len(spans),
        fill=sum(full) / (len(full) * batch_tokens),
        longest=max(span.tokens for span in spans),
        cut=cut,
    )


def warn_of_cuts(sample: Sample, limits: Mapping[str, int]) -> None:
    """Warn when triples are longer than the template, with the limits and the remedy.

    Args:
        sample: What a sample shows.
        limits: The encoder's.
    """
    if sample.cut["any"]:
        pieces = ", ".join(
            f"{piece}: {sample.cut[piece]:,}"
            for piece in ("prompt", "reference", "output")
            if sample.cut[piece]
        )
        allowed = " and ".join(f"--{name} {tokens}" for name, tokens in limits.items())
        console.warn(
            f"{sample.cut['any']:,} of a sample of {sample.triples:,} triples are longer than "
            f"{allowed} allow and are cut ({pieces}); larger values read more, as far as the model "
            "goes"
        )


# -- what the run would be -------------------------------------------------------------------------

_GIB, _LORA_RANK = 2**30, 16
_ROWS = (32768, 16384, 8192)  # tokens of a row that are tried on a GPU


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The kind of GPU that a plan is for.

    Attributes:
        name: Such as `H100`.
        memory: Bytes of it, or None where it is not known.
    """

    name: str
    memory: float | None


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is known of a run before it is one.

    Attributes:
        config: Its options.
        hyper: How it would train.
        sample: What a sample of its data shows.
        triples: Training triples of one epoch, or None when they were not counted.
        model: The model's figures.
        processes: How many would train.
        half: Computing in bfloat16.
        zero: ZeRO's stage, 0 without.
        gpu: What it would train on, or None: CPUs.
    """

    config: TrainConfig
    hyper: Hyperparameters
    sample: Sample
    triples: int | None
    model: Model
    processes: int
    half: bool
    zero: int
    gpu: Gpu | None

    def memory(self, **other: Any) -> Memory:
        """What a process needs, as the run is, or with other arguments of `memory.memory`."""
        given: dict[str, Any] = {
            "batch_tokens": self.hyper.batch_tokens,
            "half": self.half,
            "checkpointing": self.config.gradient_checkpointing,
            "zero": self.zero,
            "processes": self.processes,
            "lora_rank": self.config.lora_rank,
        }
        return memory(self.model, **{**given, **other})

    @property
    def computed(self) -> float:
        """Tokens that go through the model, in all steps."""
        each = self.sample.computed if self.hyper.shared else self.sample.tokens
        return self.hyper.steps * self.hyper.batch_size * each

    @property
    def speed(self) -> Speed | None:
        """Tokens a second of one GPU: what the user says, or what somebody has published."""
        if self.config.tokens_per_s is not None:
            return Speed(self.config.tokens_per_s, "--tokens-per-s")
        return None if self.gpu is None else published(self.gpu.name, self.model.parameters)

    @property
    def hours(self) -> float | None:
        """Hours of all steps at that speed, or None where none is known."""
        speed = self.speed
        if speed is None:
            return None
        return self.computed / (speed.tokens_per_s * self.processes) / 3600


def gpu_of(config: TrainConfig, device: str) -> Gpu | None:
    """The GPU that a plan is for: the one that is named, or that of this machine.

    Args:
        config: The options.
        device: Where the run would compute.
    """
    if config.plan_for is not None:
        return Gpu(name=config.plan_for, memory=MEMORY[config.plan_for])
    if not device.startswith("cuda"):
        return None
    import torch

    about = torch.cuda.get_device_properties(device)
    return Gpu(name=about.name, memory=about.total_memory)


def lines(outline: Outline) -> list[str]:
    """The plan in words, a line each."""
    sample, hyper, triples = outline.sample, outline.hyper, outline.triples
    total = None if triples is None else triples * sample.tokens
    use = hyper.steps * hyper.batch_size
    return [
        f"model: {outline.model.parameters:,} weights, counted without reading them",
        f"triples: {'not counted' if triples is None else f'{triples:,}'}"
        + ("" if total is None else f", about {total:,.0f} tokens"),
        f"a triple: {sample.tokens:,.0f} tokens, {sample.computed:,.0f} with its prefix once "
        f"({sample.saved:.0%} saved), from a sample of {sample.triples:,}",
        f"rows of {hyper.batch_tokens:,} tokens: {sample.fill:.0%} full",
        f"steps: {hyper.steps:,} of {hyper.batch_size:,} triples, {use:,} triples in all, "
        f"{use * sample.tokens:,.0f} tokens, peak learning rate {hyper.lr:.4g}",
        f"memory: about {_words(outline.memory())}",
        *_memory_table(outline),
        _disk_line(outline),
        _time_line(outline),
        f"flags: {' '.join(flags(outline))}",
    ]


_PARTS = ("weights", "gradients", "optimizer", "buffers", "activations")


def _words(need: Memory) -> str:
    parts = " + ".join(
        f"{name} {_size(getattr(need, name))}" for name in _PARTS if getattr(need, name)
    )
    return f"{_size(need.total)} a process at most ({parts})"


def _size(count: float) -> str:
    for unit, name in ((2**40, "TiB"), (_GIB, "GiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 2**20:.1f} MiB"


def _ways(outline: Outline) -> dict[str, dict[str, Any]]:
    """Ways to train by name: all weights with ZeRO 0 to 3, and adapters."""
    found: dict[str, dict[str, Any]] = {
        "zero1 zero2 zero3".split()[stage - 1] if stage else "no ZeRO": {
            "zero": stage,
            "lora_rank": None,
        }
        for stage in range(4)
    }
    rank = outline.config.lora_rank or _LORA_RANK
    return {**found, f"LoRA, rank {rank}": {"zero": 0, "lora_rank": rank}}


def _memory_table(outline: Outline) -> list[str]:
    """Memory of a process for each way, in GiB; columns of figures under their names."""
    gpu, names = outline.gpu, (*_PARTS, "most", "less")
    where = "process on the CPU (--plan-for: on a GPU)" if gpu is None else gpu.name
    many = "" if outline.processes == 1 else f" of {outline.processes:,}"
    rows: list[tuple[str, ...]] = [("GiB", *names)]
    for way, other in _ways(outline).items():
        need = outline.memory(**{**other, "checkpointing": False})
        less = outline.memory(**{**other, "checkpointing": True}).total
        parts = (f"{getattr(need, name) / _GIB:.1f}" for name in _PARTS)
        totals = (f"{t / _GIB:.1f}{' ' if _fits(t, gpu) else '!'}" for t in (need.total, less))
        rows.append((way, *parts, *totals))
    room = "" if gpu is None or gpu.memory is None else f", which has {gpu.memory / _GIB:.0f} GiB"
    return [
        f"one {where}{many}{room}; `less`: with --gradient-checkpointing"
        + (", `!`: does not fit" if room else ""),
        *(
            f"{row[0]:<14}"
            + "".join(
                f" {cell:>{max(7, len(name))}}" for cell, name in zip(row[1:], names, strict=True)
            )
            for row in rows
        ),
        _main_memory_line(outline),
    ]


def _fits(total: float, gpu: Gpu | None) -> bool:
    return gpu is None or gpu.memory is None or total <= _ROOM * gpu.memory


def _main_memory_line(outline: Outline) -> str:
    """Every process makes the whole model in float32 before it goes to its device."""
    whole, here = 4 * outline.model.parameters, outline.config.gpus
    each = f"main memory: {_size(whole)} a process while the model is read"
    return each if here == 1 else f"{each}, {_size(here * whole)} for the {here} of a machine"


def _disk_line(outline: Outline) -> str:
    config = outline.config
    room = disk(
        outline.model,
        half=outline.half,
        zero=outline.zero,
        lora_rank=config.lora_rank,
        validated=config.val_fraction > 0,
    )
    return (
        f"disk: {_size(room.final)} when it is done, {_size(room.most)} at most (a checkpoint is "
        f"{_size(room.checkpoint)})"
    )


def _time_line(outline: Outline) -> str:
    speed, hours = outline.speed, outline.hours
    if speed is None or hours is None:
        return "time: not known: give --tokens-per-s, of one GPU or process"
    took = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    if hours >= 48:
        took += f" ({hours / 24:,.0f} days)"
    unit = "process" if outline.gpu is None else "GPU"
    return (
        f"time: about {took}: {outline.computed:,.0f} tokens through the model at "
        f"{speed.tokens_per_s:,.0f} a second and {unit} ({speed.source}); an estimate, without "
        "saving and validating"
    )


def flags(outline: Outline) -> list[str]:
    """The options that say what this plan is, with the simplest way that fits into the GPU.

    Tried in turn, where the user has not decided: no ZeRO, zero1, zero2, then the same with
    gradient checkpointing, then zero3; rows of 32,768, 16,384 and 8,192 tokens each.
    """
    config, hyper = outline.config, outline.hyper
    found = [f"--lr {hyper.lr:.4g}", f"--batch-size {hyper.batch_size}"]
    if config.max_steps is not None:
        found.append(f"--max-steps {config.max_steps}")
    elif outline.triples:
        epochs = config.epochs or max(1, round(hyper.steps * hyper.batch_size / outline.triples))
        found.append(f"--epochs {epochs:g}")
    if outline.processes > 1:
        found.append(f"--gpus {config.gpus}")
    if config.nnodes > 1:
        found.append(f"--nnodes {config.nnodes}")
    asked = (outline.zero, config.gradient_checkpointing, hyper.batch_tokens)
    chosen = _fitting(outline) if outline.gpu is not None and outline.gpu.memory else asked
    zero, checkpointing, tokens = chosen or asked
    if zero:
        found.append(f"--deepspeed {config.deepspeed if zero == outline.zero else f'zero{zero}'}")
    if checkpointing:
        found.append("--gradient-checkpointing")
    if config.lora_rank is not None:
        found.append(f"--lora-rank {config.lora_rank}")
    found.append(f"--batch-tokens {tokens}")
    if chosen is None and outline.gpu is not None:
        remedy = "more GPUs" if config.lora_rank is not None else "more GPUs, or --lora-rank 16"
        found.append(f"(but this does not fit into {outline.gpu.name}: {remedy})")
    return found


def _fitting(outline: Outline) -> tuple[int, bool, int] | None:
    """ZeRO's stage, gradient checkpointing and tokens of a row: the first ones that fit."""
    config, gpu = outline.config, outline.gpu
    assert gpu is not None
    stages = [outline.zero] if config.deepspeed or outline.processes == 1 else [0, 1, 2, 3]
    again = [True] if config.gradient_checkpointing else [False, True]
    own = outline.hyper.batch_tokens
    # A triple that is longer than a row goes alone, so shorter rows save nothing beyond it.
    rows = [own] if config.batch_tokens else [t for t in _ROWS if t >= outline.sample.longest]
    for zero, checkpointing in sorted(
        itertools.product(stages, again), key=lambda way: (way[0] == 3, way[1], way[0])
    ):
        for tokens in rows or [own]:
            need = outline.memory(zero=zero, checkpointing=checkpointing, batch_tokens=tokens)
            if _fits(need.total, gpu):
                return zero, checkpointing, tokens
    return None
