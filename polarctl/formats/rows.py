"""What readers and writers of other formats are made of: fields, messages, answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from polarctl.errors import RecordError, UsageError
from polarctl.formats.groups import Fields, group, shape_of, without

Answer = Literal["reference", "output"]
JOINED = "joined rows"  # the only field of a row that `--join` makes
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


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


def number(value: Any) -> float | int | None:
    """A number, also one that stands as text in a CSV cell; None for null, `N/A` and the like.

    Raises:
        RecordError: Of another type.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        return int(value) if value.is_integer() else value
    if value is not None and not isinstance(value, int | float):
        raise RecordError(f"unexpected {short(value)}: must be a number")
    return value


def turns_of(row: Mapping[str, Any], name: str, role: str, content: str) -> list[Fields]:
    """A field that is a list of messages, with the keys `role` and `content`."""
    turns = need(row, name, list)
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or content not in turn:
            raise RecordError(f"field `{name}[{place}]`: no message with `{role}` and `{content}`")
    return [_plain(turn) for turn in turns]


def _plain(turn: Fields) -> Fields:
    """A message whose text parts are OpenAI's: LLaMA-Factory v1 names the text `value`."""
    parts = turn.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return turn
    if not any("value" in part and "text" not in part for part in parts):
        return turn
    named = [
        {**without(part, "value"), "text": part["value"]} if "value" in part else part
        for part in parts
    ]
    if len(named) == 1 and named[0].get("type") == "text":
        return {**turn, "content": named[0]["text"]}
    return {**turn, "content": named}


def dialogue(text: str) -> list[Fields]:
    r"""A conversation written as `\n\nHuman: ...\n\nAssistant: ...` as messages.

    An empty last answer, which asks for one, is left out. A text of another form gives no message.
    """
    said = _SPEAKER.split(text)
    if len(said) < 3 or said[0].strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": what.strip()}
        for who, what in zip(said[1::2], said[2::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def with_system(asked: Any, system: Any) -> Any:
    """A prompt after a system text, where there is one and the prompt has none of its own."""
    if not system:
        return asked
    if not isinstance(system, str):
        raise RecordError(f"field `system`: unexpected {short(system)}")
    turns = messages(asked, "user")
    if turns and turns[0].get("role") == "system":
        return asked
    return [{"role": "system", "content": system}, *turns]


def compared(
    rest: Mapping[str, Any], asked: Any, first: Fields, second: Fields, better: float
) -> Fields:
    """A group of two candidates of which a person, or a judge, preferred one.

    Args:
        rest: The row's other fields.
        asked: The prompt.
        first: The first candidate: `output`, and `name` where it is known.
        second: The second candidate.
        better: Above 0 the first is the better one, below 0 the second; 0: neither.
    """
    labels = (0.5, 0.5) if better == 0 else (int(better > 0), int(better < 0))
    made = [{**c, "label": label} for c, label in zip((first, second), labels, strict=True)]
    return record_of(rest, asked, candidates=made)


def ranked(entries: Sequence[Fields], ranks: Sequence[Any]) -> list[Fields]:
    """Candidates whose label grows from 0 for the worst rank; rank 0 or 1 is the best."""
    levels = sorted(set(ranks))
    return [
        {**entry, "label": len(levels) - 1 - levels.index(rank)}
        for entry, rank in zip(entries, ranks, strict=True)
    ]


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
    """A record with an answer.

    It is a candidate when the row has a reference of its own, or says by `label` whether the
    answer is good: a bad answer must never become a reference.
    """
    rest = dict(rest)
    if "kto_tag" in rest:  # LLaMA-Factory's name
        rest["label"] = rest.pop("kto_tag")
    where = "output" if "reference" in rest or "label" in rest else answer
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


def with_candidates(record: Fields) -> Fields:
    """A record whose `candidates` may be texts, with `labels` beside them, as one of ours.

    Raises:
        RecordError: There are not as many labels as candidates.
    """
    texts = record.get("candidates")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        return record
    labels = record.get("labels")
    if not isinstance(labels, list):
        return {**record, "candidates": [{"output": text} for text in texts]}
    if len(labels) != len(texts):
        raise RecordError(f"{len(texts)} candidates and {len(labels)} `labels`")
    made = [
        {"output": text, "label": number(label)} for text, label in zip(texts, labels, strict=True)
    ]
    return {**without(record, "labels"), "candidates": made}


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
                hint="`--map reference=human_answer`, or `--map reference=meta.answer`",
            )
        names[ours] = theirs
    return names


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row with the fields `{ours: theirs}` renamed, all at once, so that two can be swapped.

    `a.b` is the field `b` of the object `a`, and `a.0` the first entry of the list `a`. What was
    taken out of an object leaves it; lists stay whole.

    Raises:
        RecordError: The row has no such field.
    """
    kept: dict[str, Any] = dict(row)
    moved = {}
    for ours, theirs in names.items():
        try:
            moved[ours] = field_at(row, theirs)
        except RecordError:
            raise RecordError(f"no field `{theirs}` to rename (--map {ours}={theirs})") from None
        kept = _taken_out(kept, _path(row, theirs))
    return {**moved, **without(kept, *moved)}


def field_at(row: Any, name: str) -> Any:
    """A field by its name, or by a path: `a.b`, `a.0`. A field that is named so comes first.

    Raises:
        RecordError: There is none.
    """
    try:
        value = row
        for step in _path(row, name):
            value = value[int(step)] if isinstance(value, list) else value[step]
    except (KeyError, IndexError, TypeError, ValueError):
        raise RecordError(f"no field `{name}`") from None
    return value


def _path(row: Any, name: str) -> list[str]:
    return [name] if name in row else name.split(".")


def _taken_out(value: Any, path: list[str]) -> Any:
    """A copy of an object without the field at the path, nor objects that it leaves empty."""
    if not isinstance(value, dict) or path[0] not in value:
        return value
    rest = without(value, path[0])
    left = _taken_out(value[path[0]], path[1:]) if len(path) > 1 else {}
    return {**rest, path[0]: left} if left else rest
