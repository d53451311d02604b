"""Check files against the record schemas and name the bad lines.

Reads any records, every file to its end. Names the bad rows on stderr, rows that are bad for the
same reason once with their number; exit status 3 when there is any.

polarctl validate triples.jsonl --kind triple
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from polarctl.config import Bare


@dataclass(frozen=True, kw_only=True)
class Config(Bare):
    """Options of `polarctl validate`."""

    input: Annotated[
        tuple[str, ...],
        typer.Argument(metavar="INPUT", help="Files or globs (.gz and .zst too); `-` for stdin."),
    ] = ("-",)
    kind: Annotated[
        str | None, typer.Option(help="Kind of record; default: told from each line's fields.")
    ] = None


def run(config: Config) -> None:
    """Read every row; raise RecordError when any is bad."""
    from polarctl import console
    from polarctl.errors import PolarctlError, RecordError, UsageError
    from polarctl.records import find_kind, kind_of
    from polarctl.storage.read import Reader, expand, stdin_is_missing
    from polarctl.storage.windows import BadRows

    if config.kind is not None:
        find_kind(config.kind)
    if stdin_is_missing(config.input):
        raise UsageError("no input: name a file or pipe records in", hint="polarctl validate -h")
    paths, bad = expand(config.input), 0
    for path in paths:
        found = BadRows(console.error)
        reader = Reader([path], config.kind or kind_of, on_bad=found)
        try:
            try:
                good = sum(1 for _ in reader)
            finally:
                found.finish()
            if reader.bad:
                told = f"{reader.bad:,} of {reader.rows:,} records are bad"
                raise RecordError(told, where=path)
        except PolarctlError as error:  # also a file without records, or one that is cut off
            if len(paths) == 1:
                raise
            console.error(str(error))
            bad += 1
        else:
            console.note(f"{path}: {good:,} records, all good")
    if bad:
        raise RecordError(f"{bad:,} of {len(paths):,} files are bad")
