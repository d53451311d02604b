"""Formats of training tools and servers: OpenAI, ms-swift, LLaMA-Factory v1, verl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from polarctl.errors import RecordError
from polarctl.formats.groups import Fields, candidate, prompt, without
from polarctl.formats.rows import (
    Answer,
    answer_of,
    conversation,
    messages,
    need,
    preference,
    record_of,
    short,
    turns_of,
    with_system,
)
from polarctl.model.template import content_text
from polarctl.records import prompt_id

# -- OpenAI --------------------------------------------------------------------------------------


def read_openai(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A conversation, whose last answer is the answer; or two outputs for one `input`."""
    if "preferred_output" in row or "non_preferred_output" in row:
        asked = row.get("input")
        if not isinstance(asked, dict):
            raise RecordError("field `input`: must hold `messages`")
        turns = turns_of(asked, "messages", "role", "content")
        texts = [
            turns_of(row, name, "role", "content")
            for name in ("preferred_output", "non_preferred_output")
        ]
        rest = {**without(asked, "messages"), **without(row, "input", *_OUTPUTS)}
        return preference(rest, turns, *texts)
    return conversation(
        without(row, "messages"), turns_of(row, "messages", "role", "content"), answer
    )


_OUTPUTS = ("preferred_output", "non_preferred_output")


def write_openai(record: Fields) -> list[Fields]:
    """One conversation that ends with the candidate, else with the reference, if there is one."""
    text, used = answer_of(record, "openai")
    turns = messages(record["prompt"], "user") + messages(text, "assistant")
    return [{"messages": turns, **without(record, *used)}]


# -- ms-swift ------------------------------------------------------------------------------------


def read_swift(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A conversation whose last answer is the chosen one, and `rejected_response` beside it.

    `rejected_messages` may hold the rejected answer with its conversation. The conversation may
    be `query`, `response`, `history` and `system`, or rounds of `human` and `assistant`.
    """
    turns, rest = _swift_turns(row)
    rest = without(rest, "rejected_response", "rejected_messages")
    if row.get("rejected_response") is None and row.get("rejected_messages") is None:
        return conversation(rest, turns, answer)
    if turns[-1]["role"] != "assistant":
        raise RecordError("a rejected answer, and the conversation ends without a chosen one")
    asked, chosen = turns[:-1], turns[-1:]
    if row.get("rejected_messages") is not None:
        rejected: Any = turns_of(row, "rejected_messages", "role", "content")
        if rejected[: len(asked)] != asked or len(rejected) == len(asked):
            raise RecordError("`rejected_messages` is no other answer to the same conversation")
        return preference(rest, asked, chosen, rejected[len(asked) :])
    rejected = need(row, "rejected_response", (str, list))
    if isinstance(rejected, str):
        return preference(rest, asked, chosen, messages(rejected, "assistant"))
    texts = [candidate(messages(text, "assistant"), 0) for text in rejected]
    return record_of(rest, asked, candidates=[candidate(chosen, 1), *texts])


def _swift_turns(row: Mapping[str, Any]) -> tuple[list[Fields], Fields]:
    """The conversation of a row as messages, and the row's other fields."""
    if "messages" in row:
        return turns_of(row, "messages", "role", "content"), without(row, "messages")
    turns: list[Fields] = []
    talk = row.get("conversation")
    if isinstance(talk, list) and talk and isinstance(talk[0], dict) and "role" in talk[0]:
        turns = turns_of(row, "conversation", "role", "content")
        return with_system(turns, row.get("system")), without(row, "system", "conversation")
    if "conversation" in row:
        rounds = [
            (turn.get("human"), turn.get("assistant")) if isinstance(turn, dict) else (None, None)
            for turn in need(row, "conversation", list)
        ]
        used: tuple[str, ...] = ("conversation",)
        name = "conversation"
    else:
        history = row.get("history") or []
        rounds = [tuple(pair) if isinstance(pair, list) else (None, None) for pair in history]
        rounds.append((need(row, "query", str), row.get("response")))
        used, name = ("query", "response", "history"), "history"
    for place, pair in enumerate(rounds):
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise RecordError(f"field `{name}[{place}]`: no question and answer")
        turns.append({"role": "user", "content": pair[0]})
        if isinstance(pair[1], str):
            turns.append({"role": "assistant", "content": pair[1]})
    return with_system(turns, row.get("system")), without(row, "system", *used)


# -- LLaMA-Factory v1 ----------------------------------------------------------------------------


def read_llama_factory_v1(row: Mapping[str, Any], answer: Answer) -> Fields:
    """`chosen_messages` and `rejected_messages`: what both begin with is the prompt."""
    chosen, rejected = (
        turns_of(row, name, "role", "content") for name in ("chosen_messages", "rejected_messages")
    )
    size = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(size) if chosen[i] != rejected[i]), size)
    if same < 1:
        raise RecordError("`chosen_messages` and `rejected_messages` share no beginning")
    rest = without(row, "chosen_messages", "rejected_messages")
    return preference(rest, chosen[:same], chosen[same:], rejected[same:])


# -- verl ----------------------------------------------------------------------------------------


def read_verl(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A row of verl's RL data: `reward_model.ground_truth` is the reference.

    What `write_verl` has put into `extra_info` goes back to its place.

    Raises:
        RecordError: The ground truth is neither a text, a number, nor a list of texts.
    """
    asked = need(row, "prompt", (str, list))
    model, extra = (dict(need(row, name, dict)) if row.get(name) else {} for name in _VERL)
    parts = _truth(model.pop("ground_truth", None))
    rest = without(row, "prompt", *_VERL)
    try:
        fields = orjson.loads(extra.get("fields") or "{}")
    except (orjson.JSONDecodeError, TypeError):
        fields = None
    if isinstance(fields, dict) and "fields" in extra:  # ours
        if rest.get("data_source") in (fields.get("category"), "polarctl"):
            rest = without(rest, "data_source")
        if rest.get("ability") == "general":
            rest = without(rest, "ability")
        kept = {name: extra[name] for name in ("id", "split") if extra.get(name)}
        wrapper = {} if extra.get("wrapper") in (None, "sft") else {"wrapper": extra["wrapper"]}
        return record_of({**rest, **kept, **wrapper, **fields}, asked, **parts)
    left = {} if model in ({}, {"style": "polar"}) else {"reward_model": model}
    if extra:
        left["extra_info"] = extra
    return record_of({**rest, **left}, asked, **parts)


_VERL = ("reward_model", "extra_info")


def _truth(value: Any) -> Fields:
    if value is None:
        return {}
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return {"references": value}
    if isinstance(value, bool | list | dict):
        raise RecordError(
            f"field `reward_model.ground_truth`: unexpected {short(value)}",
            hint="--from native --map reference=FIELD names the field that holds the reference",
        )
    return {"reference": str(value)}


def write_verl(record: Fields) -> list[Fields]:
    """A row of verl's RL data, in the form of the official POLAR release.

    `reward_model.ground_truth` is the reference's text and `extra_info.prompt` repeats the prompt,
    which POLAR's reward function needs and verl does not hand on. `data_source`, `ability` and
    `split` (in `extra_info`) are the record's own, if any; other fields are JSON in
    `extra_info.fields`, because a Parquet column has one type. Candidates are dropped.

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
    used = ("prompt", "reference", "data_source", "ability", "split", "id", "wrapper")
    rest = without(whole, *used)
    return [
        {
            "data_source": str(whole.get("data_source", whole.get("category", "polarctl"))),
            "prompt": turns,
            "ability": str(whole.get("ability", "general")),
            "reward_model": {"style": "polar", "ground_truth": content_text(whole["reference"])},
            "extra_info": {
                "split": str(whole.get("split", "train")),
                "id": prompt_id(whole),
                "prompt": turns,
                "wrapper": whole.get("wrapper", "sft"),
                "fields": msgspec.json.encode(rest).decode(),
            },
        }
    ]
