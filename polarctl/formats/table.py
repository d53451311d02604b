"""The data formats of other tools, each one function to our records and one back.

    format           a row                                                     read  write
    native           prompt, reference, chosen, rejected | output | candidates  x     x
    trl              prompt (or none: implicit), chosen, rejected | completion  x     x
    openai           messages: [{role, content}]                                x     x
    sharegpt         conversations: [{from, value}], chosen, rejected           x     x
    nemo             context, completions: [{rank, completion}]                 x     x
    llama-factory    instruction, input, system, history, chosen | output       x     x
    gsm8k            question, answer                                           x
    gsm8k-solutions  question, ground_truth, POLICY: {solution, is_correct}     x
    verl             data_source, prompt, ability, reward_model, extra_info           x

A row gives one record; a group of candidates may give several rows. A preference without a
`reference` becomes a group of two candidates, labels 1 and 0, because our triples need one. Other
fields pass through untouched, but for those whose name the result needs itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from polarctl.errors import RecordError, UsageError
from polarctl.formats.comparisons import (
    read_llama_factory,
    read_nemo,
    read_sharegpt,
    read_trl,
    write_llama_factory,
    write_nemo,
    write_sharegpt,
    write_trl,
)
from polarctl.formats.groups import Fields, candidate, prompt, without
from polarctl.formats.rows import (
    Answer,
    answer_of,
    conversation,
    messages,
    need,
    record_of,
    turns_of,
)
from polarctl.model.template import content_text
from polarctl.records import prompt_id

# -- native --------------------------------------------------------------------------------------


def read_native(row: Mapping[str, Any], answer: Answer) -> Fields:
    """Our own record as it is."""
    return dict(row)


def write_native(record: Fields) -> list[Fields]:
    """Our own record as it is."""
    return [record]


# -- OpenAI --------------------------------------------------------------------------------------


def read_openai(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A conversation; the assistant's last message is the answer."""
    return conversation(
        without(row, "messages"), turns_of(row, "messages", "role", "content"), answer
    )


def write_openai(record: Fields) -> list[Fields]:
    """One conversation that ends with the candidate, else with the reference, if there is one."""
    text, used = answer_of(record, "openai")
    turns = messages(record["prompt"], "user") + messages(text, "assistant")
    return [{"messages": turns, **without(record, *used)}]


# -- GSM8K ---------------------------------------------------------------------------------------


def read_gsm8k(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A problem with a person's solution as the reference."""
    rest = without(row, "question", "answer")
    return record_of(rest, need(row, "question", str), reference=need(row, "answer", str))


def read_gsm8k_solutions(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A problem, a person's solution as the reference, and every policy's solution with a label.

    The rows of `example_model_solutions.jsonl` in openai/grade-school-math.
    """
    policies = {name: value for name, value in row.items() if _is_solution(value)}
    if not policies:
        raise RecordError("no field holds a policy's `solution` and `is_correct`")
    asked = need(row, "question", str)
    made = [
        candidate(value["solution"], int(value["is_correct"]), name)
        for name, value in policies.items()
    ]
    rest = without(row, "question", "ground_truth", *policies)
    said = need(row, "ground_truth", str)
    record = record_of(rest, asked, reference=said, candidates=made)
    return {"id": prompt_id(record), **record}


def _is_solution(value: Any) -> bool:
    return isinstance(value, dict) and "solution" in value and type(value.get("is_correct")) is bool


# -- verl ----------------------------------------------------------------------------------------


def write_verl(record: Fields) -> list[Fields]:
    """A row of verl's RL data, in the form of the official POLAR release.

    `reward_model.ground_truth` is the reference's text and `extra_info.prompt` repeats the prompt,
    which POLAR's reward function needs and verl does not hand on. `data_source` and `ability` are
    the record's own, if any; other fields are JSON in `extra_info.fields`, because a Parquet
    column has one type. Candidates are dropped.

    Raises:
        RecordError: No reference.
    """
    whole = prompt(record)
    if "reference" not in whole:
        raise RecordError(
            "missing field `reference`", hint="--map reference=FIELD names the field that holds it"
        )
    turns = [
        {"role": turn["role"], "content": content_text([turn])}
        for turn in messages(whole["prompt"], "user")
    ]
    used = ("prompt", "reference", "data_source", "ability", "id", "wrapper")
    rest = without(whole, *used)
    return [
        {
            "data_source": str(whole.get("data_source", whole.get("category", "polarctl"))),
            "prompt": turns,
            "ability": str(whole.get("ability", "general")),
            "reward_model": {"style": "polar", "ground_truth": content_text(whole["reference"])},
            "extra_info": {
                "id": prompt_id(whole),
                "prompt": turns,
                "wrapper": whole.get("wrapper", "sft"),
                "fields": msgspec.json.encode(rest).decode(),
            },
        }
    ]


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A format: what reads it, what writes it, and the fields that give it away.

    Attributes:
        read: Row and place of a plain answer to our record; None: only written.
        write: Our record to rows; None: only read.
        signs: Field names of which all must be there for `detect`; empty: never detected.
    """

    read: Callable[[Mapping[str, Any], Answer], Fields] | None
    write: Callable[[Fields], list[Fields]] | None
    signs: Sequence[tuple[str, ...]] = ()


# The order is that of `detect`: the first format with all of its signs wins.
FORMATS: dict[str, Format] = {
    "nemo": Format(read_nemo, write_nemo, [("context", "completions")]),
    "sharegpt": Format(read_sharegpt, write_sharegpt, [("conversations",)]),
    "llama-factory": Format(read_llama_factory, write_llama_factory, [("instruction",)]),
    "gsm8k-solutions": Format(read_gsm8k_solutions, None, [("question", "ground_truth")]),
    "gsm8k": Format(read_gsm8k, None, [("question", "answer")]),
    "native": Format(
        read_native,
        write_native,
        [("prompt", "reference", "chosen"), ("prompt", "candidates"), ("prompt", "output")],
    ),
    "trl": Format(read_trl, write_trl, [("chosen", "rejected"), ("prompt", "completion")]),
    "openai": Format(read_openai, write_openai, [("messages",)]),
    "verl": Format(None, write_verl),
}


def detect(row: Mapping[str, Any]) -> tuple[str, str]:
    """The format of a row and the reason in words; a row with only a `prompt` is ours.

    Raises:
        RecordError: Nothing fits.
    """
    for name, known in FORMATS.items():
        for signs in known.signs:
            if all(sign in row for sign in signs):
                return name, f"rows have {' and '.join(f'`{sign}`' for sign in signs)}"
    if "prompt" in row:
        return "native", "rows have `prompt`"
    raise RecordError("no known format", hint=f"--from with one of: {', '.join(readable())}")


def readable() -> list[str]:
    """The formats that can be read."""
    return [name for name, known in FORMATS.items() if known.read]


def writable() -> list[str]:
    """The formats that can be written."""
    return [name for name, known in FORMATS.items() if known.write]


def require(option: str, name: str, allowed: Sequence[str]) -> None:
    """Raise UsageError for a name that is not allowed, with the nearest that is."""
    if name in allowed:
        return
    other = {"--from": "written", "--to": "read"}.get(option)
    if name in FORMATS and other:
        raise UsageError(
            f"`{option} {name}`: this format is only {other}", hint=f"one of: {', '.join(allowed)}"
        )
    near = difflib.get_close_matches(name, allowed, 1)
    hint = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(allowed)}"
    raise UsageError(f"`{option} {name}`: no such format", hint=hint)
