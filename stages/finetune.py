r"""Fine-tune a reward model on triples ranked by people: reference > chosen > rejected.

Reads triples, or any preference data with `prompt`, `chosen`, `rejected` and a column that serves
as the reference. Writes a checkpoint folder. Prints the folder's path.

\b
polarctl finetune ranked.jsonl -m runs/rm -o runs/rm-tuned
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from polarctl.config import Needs
from polarctl.training.options import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of `polarctl finetune`."""

    NEEDS = [Needs("reference_field", lambda c: not c.no_reference, "runs with references")]

    reference_field: Annotated[
        str, typer.Option(metavar="FIELD", help="Field of the records that holds the reference.")
    ] = "reference"


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
