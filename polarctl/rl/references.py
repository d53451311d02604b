"""References as texts to learn from: token ids of a prompt, its reference and what ends it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from polarctl.model import chat_template
from polarctl.model.template import content_text


def encode(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, ends: Any, thinking_opened: bool
) -> list[dict[str, list[int]]]:
    """For each row the token ids of the whole text, and labels: -100 where nothing is learned.

    The prompt has the ids that sampling starts from, so the answer is learned at the place where
    the policy would write it.

    Args:
        rows: `prompt` (messages or text) and `reference`.
        tokenizer: The policy's.
        ends: Ids that end a text for the policy: one, several or None.
        thinking_opened: Prompts end in `<think>`: a reference without thoughts closes it first.
    """
    rows = list(rows)
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    chat = bool(rows) and not isinstance(rows[0]["prompt"], str)
    end = _end(tokenizer, stops | {tokenizer.eos_token_id}, chat)
    encoded = []
    for row in rows:
        prompt = _prompt(tokenizer, row["prompt"])
        text = content_text(row["reference"])
        if thinking_opened and "</think>" not in text:
            text = "\n</think>\n\n" + text
        answer = tokenizer(text, add_special_tokens=False)["input_ids"] + end
        encoded.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return encoded


def _prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """The ids that the trainers of TRL sample from."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = chat_template.render(tokenizer, prompt, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(tokenizer: Any, stops: set[int | None], chat: bool) -> list[int]:
    """What ends an answer: the token that the chat template puts there, else the tokenizer's."""
    own = tokenizer.eos_token_id
    if chat:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer(chat_template.render(tokenizer, talk), add_special_tokens=False)[
            "input_ids"
        ]
        found = [token for token in ids if token in stops]
        own = found[-1] if found else own
    return [] if own is None else [own]
