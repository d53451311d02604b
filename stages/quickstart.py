r"""Run the whole pipeline on a small world of real models, and show what each step is for.

Reads nothing and downloads nothing. Trains a zoo of small language models, lets the stages run on
them one after the other, prints each command, and ends with a table, `report.html` and the line of
shell that scores a text of your own. The same command again goes on where it stopped.

\b
polarctl quickstart -o quickstart
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from polarctl.config import Basic


@dataclass(frozen=True, kw_only=True)
class Config(Basic):
    """Options of `polarctl quickstart`."""

    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for everything.", metavar="DIR")
    ] = "quickstart"
    fast: Annotated[
        bool, typer.Option("--fast", help="Smaller in every way: a minute or two, weaker figures.")
    ] = False
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0


def run(config: Config) -> None:
    """All steps, then the table and the report."""
    import shutil

    from polarctl import cli, console
    from polarctl.evaluation.page import terminal_table
    from polarctl.quickstart import report as tour_report
    from polarctl.quickstart.policies import Zoo, fast
    from polarctl.quickstart.steps import FAST, Sizes, Tour
    from polarctl.rl import grpo
    from polarctl.storage.write import stdout

    grpo.require()
    folder = Path(config.output)
    if config.force and folder.exists():
        shutil.rmtree(folder)
    for part in ("zoo", "eval", "tuned"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    zoo = Zoo(seed=config.seed)
    sizes, zoo = (FAST, fast(zoo)) if config.fast else (Sizes(), zoo)
    tour = Tour(folder, sizes, zoo, config.seed, cli.run)
    start = time.monotonic()
    tour.make_world()
    tour.sample()
    tour.pretrain()
    tour.ablate()
    tour.improve()
    seconds = {**tour.seconds, "all": time.monotonic() - start}
    figures = tour_report.collect(folder, zoo=tour.zoo, seeds=tour.sizes.seeds, seconds=seconds)
    tour_report.write(folder, figures)
    for table in tour_report.tables(figures):
        console.show(terminal_table(table))
    stdout().write(f"{folder}/report.html\n".encode())
    console.note("score a text of your own:")
    console.note(tour_report.own_text(folder, tour.zoo))
