"""Page through records in the terminal: triples, scores, verdicts, trajectories, rollouts.

Reads any records. Shows prompt, reference and answers, the answers of a pair beside each other
where the terminal has 100 columns, with their differences marked, and their rewards. On a terminal
the text goes through $PAGER (default: less); else it is plain, and `head` or `grep` can follow.
What a terminal would obey in a text is written out.

polarctl show verdicts.jsonl --worst 20
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import nsmallest
from itertools import count
from typing import Annotated, Any

import typer

from polarctl.config import Bare


@dataclass(frozen=True, kw_only=True)
class Config(Bare):
    """Options of `polarctl show`."""

    ABSENT = frozenset({"quiet"})  # what it says is what it is for

    input: Annotated[
        tuple[str, ...],
        typer.Argument(metavar="INPUT", help="Files or globs (.gz and .zst too); `-` for stdin."),
    ] = ("-",)
    id: Annotated[
        tuple[str, ...],
        typer.Option(metavar="ID", help="Only records with this id (may be given several times)."),
    ] = ()
    worst: Annotated[
        int | None,
        typer.Option(
            min=1, help="The N verdicts or scored triples with the lowest margins, worst first."
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N records.")] = None


def select(records: Iterable[Any], ids: Iterable[str], worst: int | None) -> Iterator[Any]:
    """The records to show, in their order; with `worst` those of the lowest margins, worst first.

    Raises:
        RecordError: None is left.
    """
    from polarctl.errors import RecordError
    from polarctl.evaluation.legible import identity, margin_of

    wanted = set(ids)
    found = (record for record in records if not wanted or identity(record) in wanted)
    if worst is not None:
        number = count()
        known = ((margin_of(record), next(number), record) for record in found)
        low = nsmallest(worst, (entry for entry in known if entry[0] is not None))
        found = (record for _, _, record in low)
    none = True
    for record in found:
        none = False
        yield record
    if none and worst is not None:
        raise RecordError(
            "no record has a margin",
            hint="--worst is for what `polarctl eval` writes, and for scored triples",
        )
    if none:
        raise RecordError(f"no record has the id {' or '.join(f'`{name}`' for name in ids)}")


def run(config: Config) -> None:
    """Write the records that were asked for, as text."""
    from polarctl.errors import UsageError
    from polarctl.evaluation.legible import check_shown, leaf, render
    from polarctl.storage.read import Reader, expand, stdin_is_missing
    from polarctl.storage.write import stdout

    if stdin_is_missing(config.input):
        raise UsageError("no input: name a file or pipe records in", hint="polarctl show --help")
    reader = Reader(expand(config.input), None, limit=config.limit, verify=check_shown)
    stream = stdout()
    terminal = stream.isatty()
    color = terminal and not config.no_color and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size().columns
    if terminal:
        width = os.get_terminal_size(stream.fileno()).columns or width
    with _pager(stream) if terminal else _to(stream) as write:
        for record in select(reader, config.id, config.worst):
            text = render(leaf(record), width, color=color)
            write(text.encode("utf-8", "replace"))


@contextmanager
def _to(stream: Any) -> Iterator[Callable[[bytes], Any]]:
    yield stream.write
    stream.flush()


@contextmanager
def _pager(stream: Any) -> Iterator[Callable[[bytes], Any]]:
    """A way to write through the user's pager; straight to the terminal when there is none."""
    command = os.environ.get("PAGER", "less")
    program = command.split()
    if not program or program == ["cat"] or shutil.which(program[0]) is None:
        with _to(stream) as write:
            yield write
        return
    # As git does: leave when all fits on the screen, pass colours on, keep the screen.
    environment = {"LESS": "FRX", **os.environ}
    child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=stream, env=environment)
    assert child.stdin is not None
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pager's
    try:
        yield child.stdin.write
    finally:
        try:
            child.stdin.close()
        except BrokenPipeError:
            pass
        child.wait()
        signal.signal(signal.SIGINT, before)
