r"""Control tokens inside the texts that a judge reads: found, and written so that they are none.

A chat template marks turns with tokens of its own: `<|im_end|>`, `[/INST]`. A candidate that spells
one out could end the judge's question and begin another. The question is JSON, so one letter of
such a token is written as JSON's escape, `\u005b/INST]`: the same text for who reads JSON, and no
token. Nothing is taken out, so nothing can close up to a token either.

Of a judge in this process the tokenizer says itself what becomes a control token. Of a judge behind
a server it is not known; there `PUBLISHED` stands for it.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

# The places (start, end) of control tokens in a text.
Finder: TypeAlias = Callable[[str], list[tuple[int, int]]]

# What the published chat models mark turns, thinking and tools with. Sources: tokenizer_config.json
# of each model on the Hub, and src/llama-chat.cpp of llama.cpp, which has most of their templates.
PUBLISHED: dict[str, tuple[str, ...]] = {
    # `<|im_end|>` and all others of this form: Qwen, Llama 3 and 4, Phi, GLM, gpt-oss, Granite,
    # Command, Kimi, SmolLM, OLMo. DeepSeek and Hunyuan write U+FF5C for the bar, Gemma 4 `<turn|>`.
    "bar": (
        r"<[|｜][^\s<>|｜](?:[^<>\n|｜]{0,63}[|｜]>|[^\s<>|｜]{0,63}>)",
        r"</?[\w:.-]{1,64}[|｜]>",
    ),
    "EXAONE": (r"\[\|[A-Za-z_]+\|\]", r"\[BOS\]"),
    "Llama 2": (r"<</?SYS>>",),
    "Mistral": (
        r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|MODEL_SETTINGS|THINK)\]",
        r"\[(?:TOOL_CALLS|TOOL_CONTENT|ARGS|CALL_ID|PREFIX|MIDDLE|SUFFIX|IMG|IMG_BREAK|IMG_END"
        r"|AUDIO|BEGIN_AUDIO|TRANSCRIBE)\]",
    ),
    "GLM": (r"\[[gs]?MASK\]", r"<[se]op>"),
    "BERT": (r"\[(?:CLS|SEP|PAD|UNK|EOS|unused\d+)\]", r"<(?:mask|cls|sep|eod)>"),
    "sentence": (r"</?s>", r"<(?:pad|unk|bos|eos|BOS_TOKEN|EOS_TOKEN)>"),
    "Gemma": (r"<(?:start|end)_of_(?:turn|image|audio)>", r"<unused\d+>"),
    "Seed": (r"</?seed:[a-z_]+>",),
    "MiniMax": (r"\]~!?b[\[\]]", r"\[e~\[", r"</?(?:beginning|begin|end)_of_[a-z]+>"),
    "Ling": (r"</?role>",),
    "Nemotron": (r"<extra_id_\d+>", r"<SPECIAL_\d+>"),
    "Baichuan": (r"<reserved_\d+>",),
    "InternLM": (r"<eo[ah]>", r"<TOKENS_UNUSED_\d+>", r"\[UNUSED_TOKEN_\d+\]"),
    "thinking and tools": (r"</?(?:think|tool_call|tool_response)>",),
}
_PUBLISHED = re.compile("|".join(itertools.chain.from_iterable(PUBLISHED.values())))
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# The letters of a JSON text: a plain one, or an escape.
_LETTER = re.compile(r"\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL)


class UnwritableError(Exception):
    """A control token that cannot be written in another way."""


def published(text: str) -> list[tuple[int, int]]:
    """What is a control token of some published chat model."""
    return [match.span() for match in _PUBLISHED.finditer(text)]


def of_tokenizer(tokenizer: Any) -> Finder:
    """What a tokenizer turns into one of its added tokens, special or not.

    An added token of one letter, or of spaces alone, is a letter or a space. What stands for an
    unknown letter or for a byte is a control token only where it is spelled out.

    Args:
        tokenizer: A tokenizer of transformers.
    """
    tokens = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or len(token.content.strip()) > 1
    }
    if not tokenizer.is_fast:  # no offsets; such a tokenizer cuts added tokens out of the raw text
        longest_first = sorted(map(re.escape, tokens.values()), key=len, reverse=True)
        pattern = re.compile("|".join(longest_first) or r"(?!)", re.IGNORECASE)
        return lambda text: [match.span() for match in pattern.finditer(text)]

    fallback = {i for i, content in tokens.items() if _BYTE.fullmatch(content)}
    fallback.add(tokenizer.unk_token_id)

    def find(text: str) -> list[tuple[int, int]]:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            (start, end)
            for token, (start, end) in zip(
                encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
            if token in tokens and (token not in fallback or text[start:end] == tokens[token])
        ]

    return find


def write_json(frame: Sequence[str], texts: Sequence[str], find: Finder) -> str:
    """Texts inside the quotes of a JSON text, without control tokens.

    Args:
        frame: The JSON around the texts: one piece more than there are texts.
        texts: Their values.
        find: What is a control token. Those that lie in the frame alone stay.

    Raises:
        UnwritableError: The escape of a letter is a control token too.
    """
    letters: list[str] = []
    free: list[bool] = []  # may still be escaped
    for number, piece in enumerate(frame):
        letters.append(piece)
        free.append(False)
        if number < len(texts):
            inner = _LETTER.findall(json.dumps(texts[number], ensure_ascii=False)[1:-1])
            letters += inner
            free += [True] * len(inner)
    written = [False] * len(letters)
    while True:
        text = "".join(letters)
        spans = find(text)
        if not spans:
            return text
        starts = [0, *itertools.accumulate(map(len, letters))]
        again = False
        for start, end in spans:
            inside = range(bisect_right(starts, start) - 1, bisect_right(starts, end - 1))
            open_ones = [i for i in inside if free[i]]
            if open_ones:
                # A space around a token may belong to it, and is not what makes it one.
                chosen = next((i for i in open_ones if not letters[i].isspace()), open_ones[0])
                letters[chosen] = _escape(letters[chosen])
                free[chosen], written[chosen], again = False, True, True
            elif any(written[i] for i in inside):
                raise UnwritableError(text[start:end])
        if not again:
            return text


def _escape(letter: str) -> str:
    """A letter of a JSON text as an escape; two of them beyond U+FFFF."""
    value = json.loads(f'"{letter}"')
    units = value.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
