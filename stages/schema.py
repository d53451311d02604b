"""Print the JSON Schema of a kind of record, or list the kinds.

polarctl schema triple
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from polarctl.config import Bare


@dataclass(frozen=True, kw_only=True)
class Config(Bare):
    """Options of `polarctl schema`."""

    ABSENT = frozenset({"quiet"})  # it says nothing

    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Kind of record; none: list them.")
    ] = None


def run(config: Config) -> None:
    """Write the schema, or the names of all, to stdout."""
    from polarctl.records import KINDS
    from polarctl.schemas.export import json_schema
    from polarctl.storage.write import stdout

    if config.name is None:
        lines = [f"{name}\t{_first_line(kind.__doc__)}" for name, kind in KINDS.items()]
        text = "\n".join(lines)
    else:
        text = json.dumps(json_schema(config.name), indent=2, ensure_ascii=False)
    stdout().write(text.encode() + b"\n")


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
