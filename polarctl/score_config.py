"""The options that the stages share which compute rewards, `score` and `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from polarctl.config import Common

MODEL = typer.Option("--model", "-m", help="Reward model: a folder or a Hub id.")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Common):
    """Options of a stage that scores with a reward model."""

    model: Annotated[str | None, MODEL] = None
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Score against an empty reference.")
    ] = False
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one forward pass, padding included.")
    ] = 8192
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:I.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
