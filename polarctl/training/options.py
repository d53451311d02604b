"""The options that `pretrain` and `finetune` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from polarctl.config import Common, DeepSpeed, Device, Gpus, LoraAlpha, Needs, Nnodes, SaveMinutes


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Common):
    """Options of a training stage."""

    # It reads all of its input, and keeps its manifest in the folder that it marks as complete.
    ABSENT = frozenset({"shard", "manifest"})
    NEEDS = [
        Needs("init_from_config", lambda c: c.model is None, "a run without --model"),
        Needs("epochs", lambda c: c.max_steps is None, "a run without --max-steps"),
        Needs("val_steps", lambda c: c.val_fraction > 0, "a run with --val-fraction"),
        Needs("plan_for tokens_per_s", lambda c: c.dry_run, "a plan, --dry-run"),
        Needs("lora_alpha", lambda c: c.lora_rank is not None, "a run with --lora-rank"),
    ]

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Causal LM or reward model to start from."),
    ] = None
    init_from_config: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Random weights from this model config instead."),
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder or Hub id; default: the model's.")
    ] = None
    lr: Annotated[
        float | None,
        typer.Option(
            min=0, help="Peak learning rate; default: the paper's, higher for small models."
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Triples of one optimiser step, over all processes; default: the paper's, fewer "
            "for few data.",
        ),
    ] = None
    epochs: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Passes over the data; default: 1, few data up to 4."),
    ] = None
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps, in place of --epochs; the data is not counted."),
    ] = None
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of warm-up steps.")] = 0.03
    preset: Annotated[
        Literal["polar", "internlm2", "xtuner"],
        typer.Option(help="Loss by name."),
    ] = "polar"
    loss: Annotated[
        Literal["bradley-terry", "focal"] | None,
        typer.Option(help="Ranking loss; default: the preset's."),
    ] = None
    margin: Annotated[
        float,
        typer.Option(help="Rewards should differ by this; a record's own `margin` is added."),
    ] = 0.0
    penalty: Annotated[
        Literal["none", "barrier", "l2"] | None,
        typer.Option(help="On every reward; default: the preset's."),
    ] = None
    penalty_weight: Annotated[
        float | None,
        typer.Option(min=0, help="Its weight; default: the preset's, or 0.01."),
    ] = None
    negatives: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rejected trajectories of a record that are used: `rejected`, then `negatives`.",
        ),
    ] = 1
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Train with empty references (an ablation).")
    ] = False
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of one forward pass; default: 32768 on a GPU, 4096 on a CPU.",
        ),
    ] = None
    shared_prefix: Annotated[
        bool,
        typer.Option(help="Compute what a triple's candidates share once (exact, and faster)."),
    ] = True
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Compute activations again: less memory, slower."
        ),
    ] = False
    max_length: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Tokens of one input (prompt twice, reference, candidate, 4); default: the reward "
            "model's own, else 16384 or what the model takes.",
        ),
    ] = None
    max_response_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of one response; default: the reward model's own, else 5120 in pretrain, "
            "4096 in finetune.",
        ),
    ] = None
    cut_side: Annotated[
        Literal["left", "right"] | None,
        typer.Option(
            help="Where a long response is cut: right keeps its start, left its end; default: "
            "right, or the reward model's own."
        ),
    ] = None
    val_fraction: Annotated[
        float,
        typer.Option(
            min=0, max=0.5, help="Share of the prompts held out to measure loss and accuracy on."
        ),
    ] = 0.0
    val_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between validations; default: --save-steps."),
    ] = None
    shuffle_window: Annotated[
        int,
        typer.Option(
            min=1, help="Triples held in memory to be shuffled; all, where there are fewer."
        ),
    ] = 10_000
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes that tokenize; default: 0 on a CPU, else as cores allow."
        ),
    ] = None
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Train low-rank adapters and the head alone."),
    ] = None
    lora_alpha: LoraAlpha = None
    deepspeed: DeepSpeed = None
    gpus: Gpus = 1
    nnodes: Nnodes = 1
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Precision of computing; weights and optimiser stay in float32."),
    ] = "auto"
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500
    save_minutes: SaveMinutes = 30.0
    report_to: Annotated[
        tuple[str, ...],
        typer.Option(metavar="TRACKER", help="tensorboard, wandb or trackio; may be repeated."),
    ] = ()
    plan_for: Annotated[
        Literal["A100", "A800", "B200", "H100", "H200", "H800", "L40S"] | None,
        typer.Option(help="With --dry-run: plan for GPUs of this kind, which need not be here."),
    ] = None
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            help="With --dry-run: tokens a second of one GPU, as training prints them (computed, "
            "of all GPUs: divide); default: published figures.",
        ),
    ] = None

    @property
    def chat(self) -> bool:
        """Whether the model reads conversations in a chat template, and no references."""
        return False
