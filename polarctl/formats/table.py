"""The data formats of other tools, each one function to our records and one back.

    format           a row                                                     read  write
    native           prompt, reference, chosen, rejected | output | candidates  x     x
    trl              prompt (or none: implicit), chosen, rejected | completion  x     x
    openai           messages: [{role, content}]                                x     x
    sharegpt         conversations: [{from, value}], chosen, rejected           x     x
    nemo             context, completions: [{rank, completion}]                 x     x
    llama-factory    instruction, input, system, history, chosen | output       x     x
    verl             data_source, prompt, ability, reward_model, extra_info     x     x
    llama-factory-v1 chosen_messages, rejected_messages                         x
    ms-swift         messages, rejected_response | query, response, history     x
    gsm8k            question, answer                                           x
    gsm8k-solutions  question, ground_truth, POLICY: {solution, is_correct}     x
    helpsteer        response, helpfulness | two responses and a preference     x
    pku-saferlhf     prompt, response_0, response_1, better_response_id         x
    nectar           prompt, answers: [{answer, model, rank}]                   x
    ultrafeedback    instruction, completions: [{response, fine-grained_score}] x
    arena            conversation_a, conversation_b | response_a, ..., winner   x

Benchmarks, only read: rewardbench, m-rewardbench, rewardbench2, rm-bench, judgebench, rewardmath,
helpsteer3, rmb, ppe; see `polarctl.formats.benchmarks`.

`trl` also reads preferences whose prompt is named `question`, `input` and the like, with `system`
before it, and `openai` its preference form (`input`, `preferred_output`, `non_preferred_output`).

A row gives one record; a group of candidates may give several rows. A preference without a
`reference` becomes a group of two candidates, labels 1 and 0, because our triples need one. Other
fields pass through untouched, but for those whose name the result needs itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from polarctl.errors import RecordError, UsageError
from polarctl.formats.benchmarks import (
    read_helpsteer3,
    read_judgebench,
    read_ppe,
    read_rewardbench,
    read_rewardbench2,
    read_rewardmath,
    read_rm_bench,
    read_rmb,
)
from polarctl.formats.comparisons import (
    prompt_field,
    read_llama_factory,
    read_nemo,
    read_sharegpt,
    read_trl,
    write_llama_factory,
    write_nemo,
    write_sharegpt,
    write_trl,
)
from polarctl.formats.groups import Fields, candidate, without
from polarctl.formats.published import (
    read_arena,
    read_helpsteer,
    read_nectar,
    read_pku,
    read_ultrafeedback,
)
from polarctl.formats.rows import Answer, need, record_of
from polarctl.formats.tools import (
    read_llama_factory_v1,
    read_openai,
    read_swift,
    read_verl,
    write_openai,
    write_verl,
)
from polarctl.records import prompt_id

# -- native --------------------------------------------------------------------------------------


def read_native(row: Mapping[str, Any], answer: Answer) -> Fields:
    """Our own record as it is."""
    return dict(row)


def write_native(record: Fields) -> list[Fields]:
    """Our own record as it is."""
    return [record]


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


_TWO = ("chosen", "rejected")
# The order is that of `detect`: the first format with all of its signs wins.
FORMATS: dict[str, Format] = {
    "nemo": Format(read_nemo, write_nemo, [("context", "completions")]),
    "sharegpt": Format(read_sharegpt, write_sharegpt, [("conversations",)]),
    "ultrafeedback": Format(read_ultrafeedback, None, [("instruction", "completions")]),
    "llama-factory": Format(read_llama_factory, write_llama_factory, [("instruction",)]),
    "llama-factory-v1": Format(
        read_llama_factory_v1, None, [("chosen_messages", "rejected_messages")]
    ),
    "helpsteer": Format(
        read_helpsteer,
        None,
        [
            ("prompt", "response", "helpfulness"),
            ("response_1", "response_2", "preference_strength"),
            ("response1", "response2", "overall_preference"),
        ],
    ),
    "pku-saferlhf": Format(read_pku, None, [("response_0", "response_1", "better_response_id")]),
    "ppe": Format(read_ppe, None, [("prompt", "response_1", "scores")]),
    "rewardbench": Format(
        read_rewardbench,
        None,
        [
            (*_TWO, "chosen_model", "rejected_model", "subset"),
            (*_TWO, "chosen_model", "rejected_model", "source", "language"),
        ],
    ),
    "rewardbench2": Format(read_rewardbench2, None, [(*_TWO, "num_correct", "subset")]),
    "m-rewardbench": Format(read_rewardbench, None),
    "helpsteer3": Format(read_helpsteer3, None),
    "rm-bench": Format(read_rm_bench, None),
    "judgebench": Format(read_judgebench, None, [("response_A", "response_B", "label")]),
    "rewardmath": Format(read_rewardmath, None, [("problem", "eval_solution", "solution_type")]),
    "rmb": Format(
        read_rmb,
        None,
        [("conversation_input", "chosen", "reject"), ("conversation_input", "bon_best")],
    ),
    "arena": Format(
        read_arena,
        None,
        [
            ("conversation_a", "conversation_b"),
            ("response_a", "response_b", "winner"),
            ("response_a", "response_b", "winner_model_a"),
            ("prompt", "response_1", "response_2", "winner"),
        ],
    ),
    "nectar": Format(read_nectar, None, [("prompt", "answers", "num_responses")]),
    "verl": Format(read_verl, write_verl, [("prompt", "data_source", "reward_model")]),
    "gsm8k-solutions": Format(read_gsm8k_solutions, None, [("question", "ground_truth")]),
    "gsm8k": Format(read_gsm8k, None, [("question", "answer")]),
    "native": Format(
        read_native,
        write_native,
        [("prompt", "reference", *_TWO), ("prompt", "candidates"), ("prompt", "output")],
    ),
    "trl": Format(read_trl, write_trl, [_TWO, ("prompt", "completion")]),
    "ms-swift": Format(
        read_swift,
        None,
        [
            ("messages", "rejected_response"),
            ("messages", "rejected_messages"),
            ("conversation",),
            ("query", "response"),
        ],
    ),
    "openai": Format(
        read_openai, write_openai, [("preferred_output", "non_preferred_output"), ("messages",)]
    ),
}


def detect(row: Mapping[str, Any]) -> tuple[str, str]:
    """The format of a row and the reason in words; a row with only a `prompt` is ours.

    Raises:
        RecordError: Nothing fits.
    """
    name, signs = _format_of(frozenset(row))
    if name is None:
        raise RecordError("no known format", hint=f"--from with one of: {', '.join(readable())}")
    return name, f"rows have {' and '.join(f'`{sign}`' for sign in signs)}{_asks(row, signs)}"


@lru_cache(maxsize=1024)  # the rows of a file have few sets of fields
def _format_of(fields: frozenset[str]) -> tuple[str | None, tuple[str, ...]]:
    for name, known in FORMATS.items():
        for signs in known.signs:
            if fields.issuperset(signs):
                return name, signs
    return ("native", ("prompt",)) if "prompt" in fields else (None, ())


def _asks(row: Mapping[str, Any], signs: tuple[str, ...]) -> str:
    """Where the prompt of a preference is, if not in `prompt`."""
    if signs != _TWO or (name := prompt_field(row)) == "prompt":
        return ""
    if name is not None:
        return f"; `{name}` is the prompt"
    return "" if "messages" in row else "; what both begin with is the prompt"


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
