"""What `convert` says at the end: what the rows were, what was written, what was not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from polarctl import console
from polarctl.formats.groups import Fields, labelled, shape_of
from polarctl.formats.unused import unused
from polarctl.records import outputs_of

# Rows; rows whose prompt was there already, or nearly; rows of the other part of a split; rows
# without two candidates to compare; triples whose chosen text is the reference; rows whose
# candidates were left out; candidates without a label; groups with other labels than 1 and 0; rows
# whose messages became their text.
FIXED = (
    *("rows", "repeated", "near_repeated", "other_part", "no_pair", "equal_chosen"),
    *("left_out", "unlabelled", "graded", "as_text"),
)
_COUNTED = ("format.", "read.", "unused.")
_MOST_NUMBERS = 100
_SHOWN_FIELDS = 12
_SHAPES = {
    "triple": "triples",
    "group": "groups of candidates",
    "single": "candidates",
    "prompt": "prompts",
    "referenced": "prompts with a reference",
}


def resumed(counts: Mapping[str, Any]) -> Counter[str]:
    """The numbers that an earlier run has left, to go on with."""
    kept = {k: v for k, v in counts.items() if k in FIXED or k.startswith(_COUNTED)}
    return Counter({**dict.fromkeys(FIXED, 0), **kept})


def count(
    counts: Counter[str], record: Fields, name: str, *, written: bool, to: str, by_label: bool
) -> None:
    """Count a record.

    Args:
        counts: Where to.
        record: As it was read.
        name: The format that it was read as.
        written: Whether it gave any row.
        to: The format that is written.
        by_label: Whether only the order of the labels is written, as pairs or ranks.
    """
    shape = shape_of(record)
    kind = "referenced" if shape == "prompt" and "reference" in record else shape
    counts[f"format.{name}"] += 1
    counts[f"read.{kind}"] += 1
    counts["no_pair"] += not written
    if to in ("prompts", "verl"):
        counts["left_out"] += shape != "prompt"
    if to == "verl":
        counts["as_text"] += isinstance(record.get("reference"), list)
    elif to == "llama-factory":
        texts = outputs_of(record) if shape != "prompt" else [record.get("reference")]
        counts["as_text"] += any(isinstance(text, list) for text in texts)
    if by_label and shape == "group":
        known = labelled(record)
        counts["unlabelled"] += len(record["candidates"]) - len(known)
        counts["graded"] += not {one["label"] for one in known} <= {0, 1}
    for field in unused(record):
        if f"unused.{field}" in counts or len(counts) < _MOST_NUMBERS:
            counts[f"unused.{field}"] += 1


def say(counts: Counter[str], records: int, to: str) -> None:
    """One line of what was read and written, and one of the fields that nothing reads."""
    formats = _named(counts, "format.")
    shapes = {_SHAPES[kind]: n for kind, n in _named(counts, "read.").items()}
    what = "" if to == "native" else f" for --to {to}"
    parts = [f"convert: {counts['rows']:,} rows gave {records:,} records{what}"]
    if formats:
        parts.append(f"read as {_list(formats)}: {_list(shapes)}")
    for key, text in (
        ("repeated", "rows have a prompt that was there already"),
        ("near_repeated", "rows have nearly one that was there already"),
        ("other_part", "rows are of the other part"),
        ("no_pair", "rows have no candidates that differ enough to compare"),
        ("left_out", "rows had candidates, which are left out"),
        ("unlabelled", "candidates without a label are left out"),
        ("as_text", "rows have answers as messages, of which the text is written"),
        ("graded", "groups have grades, of which only the order is written"),
    ):
        if counts[key]:
            parts.append(f"{counts[key]:,} {text}")
    if counts["equal_chosen"]:
        parts.append(f"in {counts['equal_chosen']:,} triples the chosen text is the reference")
    console.note("; ".join(parts), **counts)
    fields = _named(counts, "unused.")
    if fields:
        names = list(fields)
        more = f" and {len(names) - _SHOWN_FIELDS} more" if len(names) > _SHOWN_FIELDS else ""
        shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_FIELDS])
        console.note(f"convert: left unused, but kept: {shown}{more}")


def _named(counts: Counter[str], prefix: str) -> dict[str, int]:
    return {k.removeprefix(prefix): n for k, n in counts.items() if k.startswith(prefix) and n}


def _list(numbers: Mapping[str, int]) -> str:
    if len(numbers) == 1:
        return next(iter(numbers))
    return ", ".join(f"{n:,} {name}" for name, n in numbers.items())
