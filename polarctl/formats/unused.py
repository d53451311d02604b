"""Fields of a row that a record keeps but no stage reads, and the refusal to leave answers so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from polarctl.errors import RecordError
from polarctl.formats.groups import SCHEMA_OF, Fields, Shape, shape_of

# `response`, `response_1`, `response_a`, `completions`, `chosen_response`, `conversation_a`, ...
_ANSWER = re.compile(
    r"(?:(?:chosen|rejected|preferred|non_preferred|better|worse|best|worst|good|bad|correct"
    r"|incorrect|positive|negative|model|human|llm|gpt4?|assistant|original)_)*"
    r"(?:answer|response|completion|output|generation|candidate|conversation|reply|chosen|rejected"
    r"|preferred|trajectory)(?:s|_messages?|_text)?_?(?:\d+|[a-f])?"
)
_RIVAL = re.compile(r"chosen|rejected|preferred|non_preferred|better|worse")
# One of these may be the known result beside a reference, which verifiers read.
_RESULT = re.compile(r"answers?|solutions?|ground_truth|target|gold")


def unused(record: Mapping[str, Any]) -> list[str]:
    """The fields that no stage reads: those that the schema of the record's shape has not."""
    known = _known(shape_of(record))
    return [name for name in record if name not in known]


@cache
def _known(shape: Shape) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(SCHEMA_OF[shape]))


def refuse_answers(record: Fields) -> None:
    """Raise RecordError for a record that leaves answers in fields that no stage reads.

    That is one without a candidate, or with a single one and its rival in such a field.
    """
    shape = shape_of(record)
    if shape not in ("prompt", "single"):
        return
    found = [name for name in unused(record) if _is_answer(name, record)]
    if shape == "single":
        found = [name for name in found if _RIVAL.match(name.lower())]
    if not found:
        return
    named = ", ".join(f"`{name}`" for name in found[:4]) + (", ..." if len(found) > 4 else "")
    verb = "looks like an answer" if len(found) == 1 else "look like answers"
    raise RecordError(f"{named} {verb} and would go unused", hint=_hint(record, found))


def _is_answer(name: str, record: Fields) -> bool:
    value = record[name]
    if not value or not isinstance(value, str | list | dict):
        return False
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    if _RESULT.fullmatch(plain):
        return "reference" not in record
    return bool(_ANSWER.fullmatch(plain))


def _hint(record: Fields, found: list[str]) -> str:
    leave = "--to prompts leaves answers unused"
    if isinstance(record.get("labels"), list) and "completions" in found:
        return f"steps of one answer with a label each: no stage scores steps; {leave}"
    if len(found) > 1:
        return f"--map chosen={found[0]} --map rejected={found[1]}, if these are; {leave}"
    name = found[0]
    if "output" in record:
        return f"--map chosen=output --map rejected={name} makes a pair; {leave}"
    if isinstance(record[name], list):
        return f"--map candidates={name} reads a list of texts; {leave}"
    if "reference" in record:
        return f"--map output={name} makes it the candidate; {leave}"
    return f"--map reference={name}, or output={name} for a candidate; {leave}"
