"""Published preference data in the row forms of their data set cards.

HelpSteer 2 and 3, PKU-SafeRLHF, Nectar, UltraFeedback, Chatbot Arena. Each reader turns a
row's answers into candidates with labels; what it does not need stays in the record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from polarctl.errors import RecordError
from polarctl.formats.groups import Fields, without
from polarctl.formats.rows import (
    Answer,
    compared,
    dialogue,
    need,
    number,
    ranked,
    record_of,
    short,
    turns_of,
)

_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")


def _named(output: Any, name: Any) -> Fields:
    return {**({"name": name} if isinstance(name, str) and name else {}), "output": output}


# -- HelpSteer -----------------------------------------------------------------------------------


def read_helpsteer(row: Mapping[str, Any], answer: Answer) -> Fields:
    """HelpSteer 2's ratings and preferences, and HelpSteer 3's preferences.

    A rated answer becomes a candidate whose label is `helpfulness`, 0 to 4. A preference of -3 to
    3 is below 0 where the first answer is the better one.
    """
    if "response" in row:
        label = number(row["helpfulness"])
        text = need(row, "response", str)
        rest = without(row, "prompt", "response", "helpfulness")
        return record_of(rest, _helpsteer_prompt(row), output=text, label=label)
    third = "overall_preference" in row
    first, second = ("response1", "response2") if third else ("response_1", "response_2")
    strength = "overall_preference" if third else "preference_strength"
    texts = [{"output": need(row, name, str)} for name in (first, second)]
    by = number(row.get(strength))
    if by is None:
        raise RecordError(f"missing field `{strength}`")
    asked = turns_of(row, "context", "role", "content") if third else _helpsteer_prompt(row)
    rest = without(row, "context" if third else "prompt", first, second)
    return compared(rest, asked, texts[0], texts[1], -by)


def _helpsteer_prompt(row: Mapping[str, Any]) -> Any:
    r"""A prompt; several turns are written `...<extra_id_1>Assistant\n...<extra_id_1>User\n...`."""
    text = need(row, "prompt", str)
    said = _TURN.split(text)
    if len(said) == 1:
        return text
    turns = [{"role": "user", "content": said[0].strip("\n")}]
    for who, what in zip(said[1::2], said[2::2], strict=True):
        turns.append({"role": who.lower(), "content": what.strip("\n")})
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


# -- PKU-SafeRLHF --------------------------------------------------------------------------------


def read_pku(row: Mapping[str, Any], answer: Answer) -> Fields:
    """Two answers and `better_response_id`, the number of the more helpful one.

    `--map better_response_id=safer_response_id` compares by safety.
    """
    texts = [
        _named(need(row, f"response_{i}", str), row.get(f"response_{i}_source")) for i in (0, 1)
    ]
    better = number(row.get("better_response_id"))
    if better not in (0, 1):
        raise RecordError(f"field `better_response_id`: unexpected {short(better)}: 0 or 1")
    used = "prompt response_0 response_1 response_0_source response_1_source".split()
    asked = need(row, "prompt", str)
    return compared(without(row, *used), asked, texts[0], texts[1], 1 - 2 * better)


# -- Nectar --------------------------------------------------------------------------------------


def read_nectar(row: Mapping[str, Any], answer: Answer) -> Fields:
    """Answers with a `model` and a `rank`, 1 the best; the best gets the highest label."""
    entries = need(row, "answers", list)
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("answer"), str):
            raise RecordError(
                f"field `answers[{place}]`: no `answer` and `rank`",
                hint="--map candidates=answers reads a list of texts",
            )
        if number(entry.get("rank")) is None:
            raise RecordError(f"field `answers[{place}]`: no `rank`")
    made = [
        _named(entry["answer"], entry.get("model")) | without(entry, "answer", "model", "rank")
        for entry in entries
    ]
    asked = need(row, "prompt", str)
    group = ranked(made, [number(entry["rank"]) for entry in entries])
    return record_of(without(row, "prompt", "answers"), dialogue(asked) or asked, candidates=group)


# -- UltraFeedback -------------------------------------------------------------------------------


def read_ultrafeedback(row: Mapping[str, Any], answer: Answer) -> Fields:
    """Completions of several models, rated: the label is `fine-grained_score`.

    That is the mean of the ratings of four aspects. Without it, `overall_score` is the label. The
    ratings stay with each candidate.
    """
    made = []
    for place, entry in enumerate(need(row, "completions", list)):
        if not isinstance(entry, dict) or not isinstance(entry.get("response"), str):
            raise RecordError(f"field `completions[{place}]`: no `response`")
        label = number(entry.get("fine-grained_score"))
        label = number(entry.get("overall_score")) if label is None else label
        one = _named(entry["response"], entry.get("model"))
        made.append({**one, "label": label, **without(entry, "response", "model")})
    if all(one["label"] is None for one in made):
        raise RecordError("no completion has a `fine-grained_score` or an `overall_score`")
    rest = without(row, "instruction", "completions")
    return record_of(rest, need(row, "instruction", str), candidates=made)


# -- Chatbot Arena --------------------------------------------------------------------------

_ARENA_WINNERS = {"model_a": 1, "model_b": -1}


def read_arena(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A battle of two models: conversations, or a prompt and two responses; the winner.

    PPE's human preferences have this form too.

    What both conversations begin with is the prompt; ties get the label 0.5 twice.
    """
    if "response_1" in row:
        return _read_battle(row)
    if "conversation_a" in row:
        talks = [_parsed(row, f"conversation_{x}") for x in "ab"]
        both = [turns_of({"conversation": t}, "conversation", "role", "content") for t in talks]
        size = min(map(len, both))
        same = next((i for i in range(size) if both[0][i] != both[1][i]), size)
        asked = both[0][:same]
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
        if not asked:
            raise RecordError("the two conversations share no beginning")
        texts: list[Any] = [talk[len(asked) :] for talk in both]
        if not all(texts):
            raise RecordError("a conversation without an answer")
        prompt: Any = asked
    else:
        said = [_rounds(row, name) for name in ("prompt", "response_a", "response_b")]
        if any(len(rounds) != len(said[0]) for rounds in said[1:]):
            raise RecordError("the prompt and the responses differ in their number of turns")
        prompt = said[0][0]
        texts = [_answers(said[0], said[1]), _answers(said[0], said[2])]
    used = "prompt conversation_a conversation_b full_conversation response_a response_b".split()
    used += ["model_a", "model_b"]
    first, second = (
        _named(text, row.get(f"model_{x}")) for text, x in zip(texts, "ab", strict=True)
    )
    return compared(without(row, *used), prompt, first, second, _winner(row))


def _parsed(row: Mapping[str, Any], name: str) -> Any:
    """A list, which some files hold as its JSON text."""
    value = row.get(name)
    if isinstance(value, str) and value.startswith("["):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            raise RecordError(f"field `{name}`: {short(value)} is no JSON list") from None
    return value


def _rounds(row: Mapping[str, Any], name: str) -> list[str]:
    """The texts of the turns: a list, its JSON text, or one plain text."""
    value = row.get(name)
    if isinstance(value, str) and value.startswith('["'):
        value = _parsed(row, name)
    rounds = [value] if isinstance(value, str) else value
    if not isinstance(rounds, list) or not rounds:
        raise RecordError(f"field `{name}`: unexpected {short(value)}")
    return ["" if text is None else str(text) for text in rounds]


def _answers(asked: list[str], said: list[str]) -> Any:
    """One answer as it is; several with the user's turns between them."""
    if len(said) == 1:
        return said[0]
    turns = [{"role": "assistant", "content": said[0]}]
    for question, text in zip(asked[1:], said[1:], strict=True):
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text},
        ]
    return turns


def _winner(row: Mapping[str, Any]) -> float:
    """1 for the first, -1 for the second, 0 for a tie."""
    winner = row.get("winner")
    if winner is None and "winner_model_a" in row:
        won = [number(row.get(f"winner_model_{x}")) or 0 for x in "ab"]
        return won[0] - won[1]
    if not isinstance(winner, str):
        raise RecordError("missing field `winner`: model_a, model_b or a tie")
    if winner in _ARENA_WINNERS:
        return _ARENA_WINNERS[winner]
    if winner.startswith("tie") or winner in ("both_bad", "bothbad"):
        return 0
    raise RecordError(f"field `winner`: unexpected {short(winner)}")


def _read_battle(row: Mapping[str, Any]) -> Fields:
    """PPE's human preferences: two responses, their models, and the winner."""
    fields = ("response_1", "response_2")
    first, second = (
        _named(need(row, field, str), row.get(f"model_{x}"))
        for field, x in zip(fields, "ab", strict=True)
    )
    rest = without(row, "prompt", "model_a", "model_b", *fields)
    return compared(rest, need(row, "prompt", str), first, second, _winner(row))
