"""The options that `pretrain` and `finetune` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from polarctl.config import Common


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Common):
    """Options of a training stage."""

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
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 1e-5
    batch_size: Annotated[int, typer.Option(min=1, help="Triples of one optimiser step.")] = 64
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data.")] = 1.0
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps; overrides --epochs.")
    ] = None
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of warm-up steps.")] = 0.03
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one forward pass, padding included.")
    ] = 16384
    max_length: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Tokens of one input (prompt twice, reference, candidate, 4); default: 16384 or "
            "what the model takes.",
        ),
    ] = None
    max_response_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of one response; default: 5120 in pretrain, 4096 in finetune."
        ),
    ] = None
    cut_side: Annotated[
        str, typer.Option(help="Where a long response is cut: right keeps its start, left its end.")
    ] = "right"
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Train with empty references (an ablation).")
    ] = False
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:I.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
