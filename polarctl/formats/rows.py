"""What readers and writers of other formats are made of: fields, messages, answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from polarctl.errors import RecordError, UsageError
from polarctl.formats.groups import Fields, group, shape_of, without

Answer = Literal["reference", "output"]


def need(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a row.

    Raises:
        RecordError: It is missing, of another type, or an empty list.
    """
    if name not in row:
        raise RecordError(f"missing field `{name}`")
    value = row[name]
    if not isinstance(value, kind) or value == []:
        raise RecordError(f"field `{name}`: unexpected {short(value)}")
    return value


def short(value: Any) -> str:
    """A value for a message, cut to 40 characters."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else text[:37] + "..."


def turns_of(row: Mapping[str, Any], name: str, role: str, content: str) -> list[Fields]:
    """A field that is a list of messages, with the keys `role` and `content`."""
    turns = need(row, name, list)
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or content not in turn:
            raise RecordError(f"field `{name}[{place}]`: no message with `{role}` and `{content}`")
    return list(turns)


def messages(text: Any, role: str) -> list[Fields]:
    """A text field as messages: a string becomes one message of `role`, None no message."""
    if text is None:
        return []
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def record_of(rest: Mapping[str, Any], asked: Any, **parts: Any) -> Fields:
    """A record of a prompt, some parts and the row's other fields."""
    made = {"prompt": asked, **parts}
    return {**made, **without(rest, *made)}


def answered(rest: Mapping[str, Any], asked: Any, text: Any, answer: Answer) -> Fields:
    """A record with an answer: a candidate when the row has a reference of its own."""
    where = "output" if "reference" in rest else answer
    return record_of(rest, asked, **{where: text})


def preference(rest: Mapping[str, Any], asked: Any, chosen: Any, rejected: Any) -> Fields:
    """A triple if the row has a reference, else a group of two."""
    if "reference" in rest:
        return record_of(rest, asked, chosen=chosen, rejected=rejected)
    return group(record_of(rest, asked, chosen=chosen, rejected=rejected))


def conversation(rest: Mapping[str, Any], turns: list[Fields], answer: Answer) -> Fields:
    """Messages whose last is the answer if the assistant speaks it, else all are the prompt."""
    if turns[-1].get("role") != "assistant":
        return record_of(rest, turns)
    if len(turns) == 1:
        raise RecordError("an answer without a question before it")
    return answered(rest, turns[:-1], turns[-1:], answer)


def answer_of(record: Fields, name: str) -> tuple[Any, tuple[str, ...]]:
    """The answer of a single candidate or of a prompt, and the fields that it takes up.

    Raises:
        RecordError: The record compares candidates, which the format has no place for.
    """
    if compares(record):
        raise RecordError(
            f"`{name}` has no place for candidates to compare",
            hint="--to trl, sharegpt, nemo or llama-factory; --to prompts drops them",
        )
    field = "output" if "output" in record else "reference"
    return record.get(field), ("prompt", field)


def compares(record: Fields) -> bool:
    """Whether the record holds candidates to compare."""
    return shape_of(record) in ("triple", "group")


def field_map(options: tuple[str, ...]) -> dict[str, str]:
    """`--map OURS=THEIRS` as `{ours: theirs}`.

    Raises:
        UsageError: An option is not of that form, or a name is given twice.
    """
    names: dict[str, str] = {}
    for option in options:
        ours, _, theirs = option.partition("=")
        if not ours or not theirs or ours in names or theirs in names.values():
            raise UsageError(
                f"`--map {option}`: not of the form OURS=THEIRS, each name once",
                hint="`--map reference=human_answer`",
            )
        names[ours] = theirs
    return names


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row with the fields `{ours: theirs}` renamed, all at once, so that two can be swapped.

    Raises:
        RecordError: The row has no such field.
    """
    for ours, theirs in names.items():
        if theirs not in row:
            raise RecordError(f"no field `{theirs}` to rename (--map {ours}={theirs})")
    moved = {ours: row[theirs] for ours, theirs in names.items()}
    kept = {k: v for k, v in row.items() if k not in moved and k not in names.values()}
    return {**moved, **kept}
