"""Formats of other tools that compare answers: TRL, ShareGPT, NeMo-RL, LLaMA-Factory.

The same functions read and write their rows without a comparison. See `polarctl.formats.table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polarctl.errors import RecordError
from polarctl.formats.groups import Fields, candidate, group, labelled, pairs, without
from polarctl.formats.rows import (
    Answer,
    answer_of,
    answered,
    compares,
    conversation,
    dialogue,
    messages,
    need,
    preference,
    record_of,
    turns_of,
    with_system,
)
from polarctl.model.template import content_text

# Names of the prompt in preference rows of TRL's form, the first that is there.
_ASKING = ("prompt", "question", "instruction", "query", "input", "problem")
_SYSTEM = ("system", "system_prompt")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_SHAREGPT_NAMES = {role: name for name, role in _SHAREGPT_ROLES.items()}


# -- TRL -----------------------------------------------------------------------------------------


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that two conversations, or two strings, begin with, and what follows in each.

    The rule of `trl.extract_prompt`: the longest common prefix in messages, or in characters; a
    space at its end goes to the answers. If one is a prefix of the other, its last message (or
    character) still counts as answer.

    Raises:
        RecordError: They do not differ, or share no beginning.
    """
    size = min(len(chosen), len(rejected))
    differs = next((i for i in range(size) if chosen[i] != rejected[i]), size - 1)
    if chosen == rejected:
        raise RecordError("`chosen` and `rejected` are the same")
    if differs > 0 and chosen[differs] != rejected[differs] and chosen[differs - 1] == " ":
        differs -= 1
    if differs < 1:
        raise RecordError("no `prompt`, and `chosen` and `rejected` share no beginning")
    return chosen[:differs], chosen[differs:], rejected[differs:]


def read_trl(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A preference with an explicit or an implicit prompt, or a prompt with a completion.

    The prompt may have another name (`question`, `input`, ...) and a `system` text before it.
    Several chosen and rejected answers become a group.
    """
    asked_in = prompt_field(row)
    rest = without(row, *_SYSTEM)
    system = next((row[name] for name in _SYSTEM if row.get(name)), None)
    if "chosen" not in row and "rejected" not in row:
        asked = with_system(need(row, "prompt", (str, list)), system)
        rest = without(rest, "prompt", "completion")
        if "completion" not in row:
            return record_of(rest, asked)
        text = need(row, "completion", (str, list))
        return answered(rest, asked, text, "output" if "label" in row else answer)
    chosen, rejected = (_answer_texts(row, name) for name in ("chosen", "rejected"))
    rest = without(rest, "prompt", "chosen", "rejected", *([asked_in] if asked_in else []))
    if _many(chosen) or _many(rejected):
        if asked_in is None:
            raise RecordError("missing field `prompt`: several answers need an explicit one")
        made = [candidate(text, 1) for text in chosen] + [candidate(text, 0) for text in rejected]
        asked = with_system(need(row, asked_in, (str, list)), system)
        return record_of(rest, asked, candidates=made)
    if type(chosen) is not type(rejected):
        raise RecordError("`chosen` and `rejected` must both be strings or both be messages")
    # As in TRL: some data sets repeat an implicit conversation's prompt as a string.
    shared = isinstance(chosen, list) and chosen[:1] == rejected[:1]
    repeated = asked_in and isinstance(row[asked_in], str) and shared
    if asked_in and not repeated:
        asked = with_system(need(row, asked_in, (str, list)), system)
        return preference(rest, asked, chosen, rejected)
    if not asked_in and isinstance(row.get("messages"), list) and not shared:
        asked = turns_of(row, "messages", "role", "content")
        return preference(without(rest, "messages"), with_system(asked, system), chosen, rejected)
    if isinstance(chosen, str) and (talks := dialogue(chosen)):
        both = (talks, dialogue(rejected))
        if any(not turns or turns[-1]["role"] != "assistant" for turns in both):
            raise RecordError("a dialogue does not end with an answer of the assistant")
        chosen, rejected = both
    asked, chosen, rejected = extract_prompt(chosen, rejected)
    return preference(rest, with_system(asked, system), chosen, rejected)


def prompt_field(row: Mapping[str, Any]) -> str | None:
    """The name of the field that asks, in rows of preferences; None: it is implicit."""
    found = next((name for name in _ASKING if row.get(name)), None)
    return "prompt" if found is None and row.get("prompt") is not None else found


def _answer_texts(row: Mapping[str, Any], name: str) -> Any:
    """A text, messages (one of them may stand alone), or a list of texts."""
    value = need(row, name, (str, list, dict))
    if isinstance(value, list) and any(isinstance(turn, dict) for turn in value):
        return turns_of(row, name, "role", "content")
    return [value] if isinstance(value, dict) else value


def _many(texts: Any) -> bool:
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def write_trl(record: Fields) -> list[Fields]:
    """Preference rows, prompt-completion rows, or prompt-only rows that keep `reference`.

    TRL wants all texts of a row to be strings or all to be messages; a mixed row becomes messages.
    """
    if not compares(record):
        if "output" not in record:
            return [record]
        text, made = record["output"], without(record, "output")
        if "label" in made:
            made["label"] = bool(made["label"])
        return [_alike({**made, "completion": text}, "completion")]
    return [_alike(pair, "chosen", "rejected") for pair in pairs(record)]


def _alike(row: Fields, *answers: str) -> Fields:
    if all(isinstance(row[name], str) for name in ("prompt", *answers)):
        return row
    texts = {name: messages(row[name], "assistant") for name in answers}
    return {**row, "prompt": messages(row["prompt"], "user"), **texts}


# -- ShareGPT --------------------------------------------------------------------------------------


def read_sharegpt(row: Mapping[str, Any], answer: Answer) -> Fields:
    """A conversation in ShareGPT's names, or one with `chosen` and `rejected` answers to it."""
    turns = [_from_sharegpt(turn) for turn in turns_of(row, "conversations", "from", "value")]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": need(row, "system", str)})
    rest = without(row, "conversations", "system", "chosen", "rejected")
    if "chosen" not in row and "rejected" not in row:
        return conversation(rest, turns, answer)
    texts = []
    for name in ("chosen", "rejected"):
        value = need(row, name, (str, dict, list))
        value = [value] if isinstance(value, dict) else value
        if isinstance(value, list):
            value = [_from_sharegpt(t) for t in turns_of({name: value}, name, "from", "value")]
        texts.append(value)
    return preference(rest, turns, *texts)


def write_sharegpt(record: Fields) -> list[Fields]:
    """Conversations; with `chosen` and `rejected` beside them, as LLaMA-Factory reads them."""
    if compares(record):
        return [_sharegpt_pair(pair) for pair in pairs(record)]
    text, used = answer_of(record, "sharegpt")
    turns = messages(record["prompt"], "user") + messages(text, "assistant")
    return [{"conversations": [_to_sharegpt(t) for t in turns], **without(record, *used)}]


def _sharegpt_pair(pair: Fields) -> Fields:
    made: Fields = {
        "conversations": [_to_sharegpt(turn) for turn in messages(pair["prompt"], "user")]
    }
    for name in ("chosen", "rejected"):
        turns = messages(pair[name], "assistant")
        if len(turns) != 1:
            raise RecordError(f"field `{name}`: `sharegpt` has room for one message, not more")
        made[name] = _to_sharegpt(turns[0])
    return {**made, **without(pair, "prompt", *made)}


def _from_sharegpt(turn: Mapping[str, Any]) -> Fields:
    role = _SHAREGPT_ROLES.get(turn["from"], turn["from"])
    return {"role": role, "content": turn["value"], **without(turn, "from", "value")}


def _to_sharegpt(turn: Mapping[str, Any]) -> Fields:
    name = _SHAREGPT_NAMES.get(turn["role"], turn["role"])
    return {"from": name, "value": content_text([turn]), **without(turn, "role", "content")}


# -- NeMo-RL -------------------------------------------------------------------------------------


def read_nemo(row: Mapping[str, Any], answer: Answer) -> Fields:
    """Ranked completions as a group; rank 0 is best, so labels are the worst rank minus the rank.

    Two completions get the labels 1 and 0.
    """
    ranked = _turns_of_ranks(need(row, "completions", list))
    ranks = sorted({entry["rank"] for entry in ranked})
    made = [
        candidate(entry["completion"], len(ranks) - 1 - ranks.index(entry["rank"]))
        | without(entry, "rank", "completion")
        for entry in ranked
    ]
    rest = without(row, "context", "completions")
    return record_of(rest, need(row, "context", (str, list)), candidates=made)


def _turns_of_ranks(entries: list[Any]) -> list[Fields]:
    for place, entry in enumerate(entries):
        rank = entry.get("rank") if isinstance(entry, dict) else None
        if type(rank) is not int or "completion" not in entry:
            raise RecordError(
                f"field `completions[{place}]`: no `rank` (a number) and `completion`"
            )
    return entries


def write_nemo(record: Fields) -> list[Fields]:
    """Ranked completions, best first; equal labels share a rank.

    Raises:
        RecordError: No candidates, or one without a label.
    """
    if not compares(record):
        raise RecordError("`nemo` holds ranked candidates, and the record has none to rank")
    whole = group(record)
    known = labelled(whole)
    if len(known) < len(whole["candidates"]):
        raise RecordError("`nemo` holds ranked candidates, and one has no `label`")
    levels = sorted({float(entry["label"]) for entry in known}, reverse=True)
    made = [
        {
            "rank": levels.index(float(entry["label"])),
            "completion": messages(entry["output"], "assistant"),
            **without(entry, "output", "label"),
        }
        for entry in known
    ]
    made.sort(key=lambda entry: entry["rank"])
    row = {"context": messages(whole["prompt"], "user"), "completions": made}
    return [{**row, **without(whole, "prompt", "candidates", *row)}]


# -- LLaMA-Factory -------------------------------------------------------------------------------


def read_llama_factory(row: Mapping[str, Any], answer: Answer) -> Fields:
    r"""Alpaca rows: the prompt is `instruction\ninput`, after `system` and `history` if any.

    `output` may be a list of answers, the best first (the older ranking form).
    """
    asked: Any = need(row, "instruction", str)
    if row.get("input"):
        asked = f"{asked}\n{need(row, 'input', str)}"
    before = _history(row.get("history") or [])
    if row.get("system"):
        before.insert(0, {"role": "system", "content": need(row, "system", str)})
    if before:
        asked = [*before, {"role": "user", "content": asked}]
    used = "instruction input system history chosen rejected output".split()
    rest = without(row, *used)
    if "chosen" in row or "rejected" in row:
        texts = (need(row, name, str) for name in ("chosen", "rejected"))
        return preference(rest, asked, *texts)
    if "output" not in row:
        return record_of(rest, asked)
    text = need(row, "output", (str, list))
    if isinstance(text, str):
        return answered(rest, asked, text, answer)
    made = [candidate(one, len(text) - 1 - place) for place, one in enumerate(text)]
    return record_of(rest, asked, candidates=made)


def _history(history: Any) -> list[Fields]:
    turns: list[Fields] = []
    for round_ in history if isinstance(history, list) else [None]:
        match round_:
            case [str(asked), str(said)]:
                turns += messages(asked, "user") + messages(said, "assistant")
            case _:
                raise RecordError("field `history`: must be a list of [instruction, response]")
    return turns


def write_llama_factory(record: Fields) -> list[Fields]:
    """Alpaca rows, for LLaMA-Factory's `ranking: true` where candidates are compared."""
    if compares(record):
        return [
            {
                **_alpaca_prompt(pair["prompt"]),
                "chosen": content_text(pair["chosen"]),
                "rejected": content_text(pair["rejected"]),
                **without(pair, "prompt", "chosen", "rejected"),
            }
            for pair in pairs(record)
        ]
    text, used = answer_of(record, "llama-factory")
    said = {} if text is None else {"output": content_text(text)}
    return [{**_alpaca_prompt(record["prompt"]), **said, **without(record, *used)}]


def _alpaca_prompt(asked: Any) -> Fields:
    """The `instruction`, `input`, `system` and `history` of a prompt."""
    turns = list(messages(asked, "user"))
    made: Fields = {"instruction": "", "input": ""}
    if turns and turns[0]["role"] == "system":
        made["system"] = content_text(turns[:1])
        turns = turns[1:]
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise RecordError("`llama-factory` holds turns of user and assistant, the last a user's")
    texts = [content_text([turn]) for turn in turns]
    made["instruction"] = texts.pop()
    if texts:
        made["history"] = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return made
