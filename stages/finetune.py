r"""Fine-tune a reward model on triples ranked by people: reference > chosen > rejected.

Reads triples, or any preference data with `prompt`, `chosen`, `rejected` and a column that serves
as the reference. Writes a checkpoint folder. Prints the folder's path.

With `--prompt-style chat` it trains a plain Bradley-Terry reward model, which reads a conversation
in the tokenizer's chat template and no reference: the baseline to compare a POLAR model with.

\b
polarctl finetune ranked.jsonl -m runs/rm -o runs/rm-tuned
polarctl finetune pairs.jsonl -m models/chat --prompt-style chat -o runs/baseline
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from polarctl.config import Needs
from polarctl.training.options import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of `polarctl finetune`."""

    NEEDS = [
        Needs(
            "reference_field",
            lambda c: not (c.no_reference or c.chat),
            "runs with references (--prompt-style chat reads none)",
        ),
        Needs(
            "no_reference max_response_length cut_side",
            lambda c: not c.chat,
            "--prompt-style polar",
        ),
    ]

    reference_field: Annotated[
        str, typer.Option(metavar="FIELD", help="Field of the records that holds the reference.")
    ] = "reference"
    prompt_style: Annotated[
        Literal["polar", "chat"],
        typer.Option(
            help="How the input is written: POLAR's template, or the tokenizer's chat template (a "
            "plain reward model, without references)."
        ),
    ] = "polar"

    @property
    def chat(self) -> bool:
        """See `TrainConfig.chat`."""
        return self.prompt_style == "chat"


def run(config: Config) -> None:
    """Train on the input."""
    from polarctl.evaluation import course
    from polarctl.training import run as training

    training.run(
        "finetune",
        config,
        reference_field=config.reference_field,
        max_response_length=4096,
        draw=course.draw,
    )
