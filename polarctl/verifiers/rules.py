"""What the verifiers without a program look at: texts, patterns, numbers, form, JSON.

Each rule takes what the record says, made ready by a function beside it, and an output; it gives 0
or 1. A text is at most what a policy writes; patterns have a time limit all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import orjson
import regex

PATTERN_S = 5.0
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII
)
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})
_THINKS = re.compile(r"<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)


# -- texts ----------------------------------------------------------------------------------------


def texts(value: Any) -> list[str]:
    """The accepted texts of a field, at least one.

    Args:
        value: A text, a number, messages, or a list of texts and numbers.

    Raises:
        ValueError: Something else, or an empty list or text.
    """
    several = isinstance(value, list) and not any(isinstance(one, Mapping) for one in value)
    found = [_text(one) for one in value] if several else [_text(value)]
    if not found or not all(one.strip() for one in found):
        raise ValueError("takes no empty text")
    return found


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return "\n".join(_content(one.get("content")) for one in value)
    raise ValueError("takes a text, a number, or a list of accepted texts")


def _content(value: Any) -> str:
    if isinstance(value, list):
        return "".join(str(part.get("text", "")) for part in value if isinstance(part, Mapping))
    return value if isinstance(value, str) else ""


def exact(accepted: Sequence[str], output: str) -> float:
    """Whether the output is one of the texts, blank space at both ends aside."""
    return float(output.strip() in {text.strip() for text in accepted})


# -- patterns -------------------------------------------------------------------------------------


def patterns(value: Any) -> list[Any]:
    """Compiled patterns, in the syntax of Python's `re`.

    Raises:
        ValueError: Not a text or a list of texts, or no pattern.
    """
    try:
        return [regex.compile(text) for text in texts(value)]
    except regex.error as error:
        raise ValueError(f"takes a pattern: {error}") from None


def found(wanted: Sequence[Any], output: str) -> float:
    """Whether one of the patterns is found anywhere in the output.

    Raises:
        TimeoutError: One takes longer than `PATTERN_S` seconds.
    """
    for pattern in wanted:
        try:
            if pattern.search(output, timeout=PATTERN_S):
                return 1.0
        except TimeoutError:
            raise TimeoutError(
                f"has a pattern {pattern.pattern!r} that took more than {PATTERN_S:g} s on an "
                f"output of {len(output):,} characters"
            ) from None
    return 0.0


# -- numbers --------------------------------------------------------------------------------------


def number_of(text: str) -> Decimal | None:
    """The answer of a text as GSM8K writes it: the number after the last `####`, else the last one.

    A dollar sign and commas between thousands are passed over. A minus sign counts where it cannot
    be a subtraction (`10-3` ends in 3). None: no number, or none after `####`.
    """
    _, marked, after = text.translate(_MINUS).rpartition("####")
    numbers = _NUMBER.findall(after)
    if not numbers:
        return None
    chosen = numbers[0] if marked else numbers[-1]
    return Decimal(chosen.replace(",", "").replace("$", ""))


def numbers(value: Any) -> set[Decimal]:
    """The accepted numbers of a field, each read by `number_of`.

    Raises:
        ValueError: A text without a number.
    """
    read = [number_of(text) for text in texts(value)]
    if None in read:
        raise ValueError("takes a text with a number")
    return {number for number in read if number is not None}


def gsm8k(accepted: set[Decimal], output: str) -> float:
    """Whether the output's answer is one of the numbers."""
    return float(number_of(output) in accepted)


# -- form -----------------------------------------------------------------------------------------


def thinks(_: Any, output: str) -> float:
    """Whether an output is one thought in `<think>` tags and then an answer without any."""
    match = _THINKS.fullmatch(output.strip())
    if match is None or not match["answer"].strip():
        return 0.0
    return float("think>" not in match["thought"] and "think>" not in match["answer"])


def thinks_in_the_prompt(_: Any, output: str) -> float:
    """The same where the prompt ends in `<think>`."""
    return thinks(_, "<think>" + output)


def at_most(characters: int) -> Callable[[Any, str], float]:
    """A rule: the output has at most so many characters (Unicode code points)."""
    return lambda _, output: float(len(output) <= characters)


# -- JSON -----------------------------------------------------------------------------------------


def schema(value: Any) -> Any:
    """A JSON Schema, ready to check; by `$schema`, else draft 2020-12. It fetches nothing.

    Args:
        value: The schema, or its text.

    Raises:
        ValueError: No schema.
    """
    import jsonschema
    import referencing

    try:
        rules = orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError as error:
        raise ValueError(f"takes a JSON Schema: {error}") from None
    if not isinstance(rules, dict | bool):
        raise ValueError("takes a JSON Schema: an object")
    kind = jsonschema.validators.validator_for(rules, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(rules)
    except jsonschema.SchemaError as error:
        raise ValueError(f"takes a JSON Schema: {error.message}") from None
    return kind(rules, registry=referencing.Registry())


def fits(validator: Any, output: str) -> float:
    """Whether the whole output is JSON (RFC 8259) that the schema allows.

    Raises:
        ValueError: The schema refers to another that it does not hold.
    """
    import referencing

    try:
        value = orjson.loads(output)
    except orjson.JSONDecodeError:
        return 0.0
    try:
        return float(validator.is_valid(value))
    except RecursionError:  # a recursive schema on what is nested without end
        return 0.0
    except referencing.exceptions.Unresolvable as error:
        raise ValueError(f"takes a schema that holds all it refers to: {error}") from None
