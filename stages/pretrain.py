r"""Pre-train a reward model on unlabelled triples: tell policies apart.

Reads triples (`prompt, reference, chosen, rejected`), in which reference and chosen are of one
policy and rejected is of another. Writes a checkpoint folder that transformers loads as a sequence
classifier. Prints the folder's path.

\b
polarctl pair trajectories.jsonl | polarctl pretrain -m models/base -o runs/rm
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from polarctl.config import Needs
from polarctl.training.options import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of `polarctl pretrain`."""

    NEEDS = [Needs("base_tokens", lambda c: c.lr is None, "the law's learning rate, not --lr")]

    base_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens that the base model was pre-trained on (2.5T), for the paper's law of the "
            "learning rate.",
        ),
    ] = None


def run(config: Config) -> None:
    """Train on the input."""
    from polarctl.evaluation import course
    from polarctl.training import run as training

    training.run(
        "pretrain",
        config,
        reference_field="reference",
        max_response_length=5120,
        draw=course.draw,
    )
