r"""Run the whole pipeline on a small world of real models, and show what each step is for.

Reads nothing and downloads nothing. Trains a zoo of small language models, lets the stages run on
them one after the other, prints each command, and ends with a table, `report.html` and the line of
shell that scores a text of your own. The same command again goes on where it stopped.

\b
polarctl quickstart -o quickstart
"""

from __future__ import annotations

import contextlib
import json
import os
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


# What the steps make, by name; the first marks a folder as a quickstart.
MARK = "quickstart.json"
MADE = (
    f"{MARK} zoo eval tuned rm-config rm rft prompts-* samples-* triples.* test-* ranked-* "
    "pool.jsonl pool-final.jsonl figures.json report.html"
).split()


def run(config: Config) -> None:
    """All steps, then the table and the report."""
    import shutil

    from polarctl import console
    from polarctl.rl import trainer
    from polarctl.storage import replace, run_folder
    from polarctl.storage.write import stdout

    trainer.require()
    target = Path(config.output)
    replace.check_unused(target, {}, [config.config] if config.config else [])
    if config.dry_run:
        console.note(f"quickstart: would train policies and reward models in {target}")
        return
    with contextlib.ExitStack() as held:
        held.enter_context(run_folder.locked(target))
        place = target
        if config.force and (target / replace.MANIFEST).exists():
            replace.check_folder(target)
            replace.check_exchange(target)
            place = replace.next_to(target)
            held.enter_context(run_folder.locked(place))
        _prepare(place, config, again=config.force and place == target)
        own_text = _tour(place, target, config)
        if place != target:
            replace.exchange(place, target)
            shutil.rmtree(place)
    stdout().write(f"{target}/report.html\n".encode())
    console.note("score a text of your own:")
    console.note(own_text)


def _prepare(place: Path, config: Config, *, again: bool) -> None:
    """Make the folder a quickstart, or find that it is the same one already.

    Args:
        place: The folder.
        config: The options.
        again: Begin again where an unfinished one is found.

    Raises:
        UsageError: It holds files of others, or a quickstart with other options.
    """
    import shutil

    from polarctl.errors import UsageError
    from polarctl.storage import atomic, replace

    wanted = {"seed": config.seed, "fast": config.fast}
    mark = place / MARK
    inside = [path for path in place.iterdir() if path.name != replace.LOCK]
    if inside and not mark.exists():
        replace.refuse(place, "it is not empty and no quickstart")
    same = mark.exists() and json.loads(mark.read_bytes()) == wanted
    # Out of sight there is only what an earlier start with --force left.
    out_of_sight = str(place) == str(replace.next_to(config.output))
    if inside and (again or (out_of_sight and not same)):
        ours = [path for path in inside if any(path.match(name) for name in MADE)]
        replace.check_folder(place, [path.name for path in ours])
        for path in sorted(ours, key=lambda path: path == mark):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif inside and not same:
        raise UsageError(
            f"{place}: is a quickstart with other options", hint="pass --force to begin again"
        )
    for part in ("zoo", "eval", "tuned", "rft"):
        (place / part).mkdir(exist_ok=True)
    atomic.write(mark, json.dumps(wanted).encode())


def _tour(place: Path, target: Path, config: Config) -> str:
    """Take all steps in a folder; the line of shell that scores a text in the final one."""
    from polarctl import cli, console
    from polarctl.evaluation.page import terminal_table
    from polarctl.quickstart import report as tour_report
    from polarctl.quickstart.policies import Zoo, fast
    from polarctl.quickstart.steps import FAST, Sizes, Tour
    from polarctl.storage import manifest, replace

    zoo = Zoo(seed=config.seed)
    sizes, zoo = (FAST, fast(zoo)) if config.fast else (Sizes(), zoo)
    before = os.getcwd()
    # From inside the folder its files have the same paths wherever it stands, and in the end.
    os.chdir(place)
    console.note(f"$ cd {place}")
    try:
        here = Path(".")
        tour = Tour(here, sizes, zoo, config.seed, cli.run)
        start = time.monotonic()
        tour.make_world()
        tour.sample()
        tour.pretrain()
        tour.ablate()
        tour.improve()
        seconds = {**tour.seconds, "all": time.monotonic() - start}
        figures = tour_report.collect(here, zoo=zoo, seeds=sizes.seeds, seconds=seconds)
        tour_report.write(here, figures, zoo)
        files = manifest.folder_files(here)
        made = {
            name: facts
            for name, facts in files.items()
            if any(Path(Path(name).parts[0]).match(glob) for glob in MADE)
        }
        manifest.write(replace.MANIFEST, "quickstart", config, inputs=[], outputs=made, counts={})
    finally:
        os.chdir(before)
    for table in tour_report.tables(figures):
        console.show(terminal_table(table))
    return tour_report.own_text(target, zoo)
