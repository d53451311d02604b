r"""Verifiers by name: from `gsm8k` or `exact:accept` to what looks at an output.

    exact[:FIELD]        the output is the field's text, blank space at both ends aside
    regex:PATTERN        the pattern is found in the output; `regex:@FIELD`: the field's pattern
    gsm8k[:FIELD]        the number after `####`, else the last one, is the field's
    math[:FIELD]         math-verify finds the output's answer equal to the field's
    think-format         one `<think>...</think>` at the start, and an answer after it
    length:N             at most N characters
    json-schema:FILE     JSON that the schema allows; `json-schema:@FIELD`: the field's schema
    command:CMD          what a program of the user's prints

A value is from 0 (wrong) to 1 (right), or None: the verifier is not applicable, because the record
lacks the field (or has null there). A FIELD holds a text, a number, messages, or a list of accepted
texts; where none is named it is `answer`, else `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from polarctl.errors import RecordError, UsageError, need
from polarctl.verifiers.bounds import Bounds

DEFAULT_FIELDS = ("answer", "reference")
NAMES = ("exact", "regex", "gsm8k", "math", "think-format", "length", "json-schema", "command")


class Verifier(Protocol):
    """What looks at outputs."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def whole(self) -> bool:
        """Looks at the whole output; others at the answer alone where thinking is stripped."""

    def applies(self, record: Mapping[str, Any]) -> bool:
        """Whether it has something to say of a record's outputs.

        Raises:
            RecordError: The field is there and cannot be used.
        """

    def values(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[str]
    ) -> list[float | None]:
        """For each output a number from 0 to 1, or None where the record is not its business.

        Raises:
            RecordError: A record's field cannot be used.
            PolarctlError: A program failed; that is never a value.
        """

    def close(self) -> None:
        """End what it has started."""


@dataclass(frozen=True)
class Rule:
    """A verifier that is a function of an output and what a field says.

    Attributes:
        name: As on the command line.
        read: From the field to what the rule needs. Raises ValueError for what it cannot use.
        rule: From that and an output to the value.
        fields: Where it looks, the first that is there; empty: it needs no field.
        whole: See `Verifier`.
    """

    name: str
    rule: Callable[[Any, str], float]
    read: Callable[[Any], Any] = lambda value: value
    fields: tuple[str, ...] = ()
    whole: bool = False

    def applies(self, record: Mapping[str, Any]) -> bool:
        """See `Verifier`."""
        return not self.fields or self._truth(record) is not None

    def values(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[str]
    ) -> list[float | None]:
        """See `Verifier`."""
        return [self._value(*pair) for pair in zip(records, outputs, strict=True)]

    def close(self) -> None:
        """Nothing to end."""

    def _value(self, record: Mapping[str, Any], output: str) -> float | None:
        truth = self._truth(record) if self.fields else None
        if self.fields and truth is None:
            return None
        try:
            return self.rule(truth, output)
        except (TimeoutError, ValueError) as error:
            raise _told(record, f"`{self.name}` {error}") from None

    def _truth(self, record: Mapping[str, Any]) -> Any:
        name = next((name for name in self.fields if record.get(name) is not None), None)
        if name is None:
            return None
        try:
            return self.read(record[name])
        except ValueError as error:
            raise _told(record, f"field `{name}`: `{self.name}` {error}") from None


def _told(record: Mapping[str, Any], what: str) -> RecordError:
    return RecordError(what, where=getattr(record, "where", None))


@dataclass(frozen=True)
class Spelled:
    """A verifier's name in its parts: `kind[:rest]`."""

    text: str
    kind: str = field(init=False)
    rest: str = field(init=False)

    def __post_init__(self) -> None:
        kind, _, rest = self.text.partition(":")
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "rest", rest)


def is_verifier(name: str) -> bool:
    """Whether a name is one of a verifier; what follows the colon is not looked at."""
    return Spelled(name).kind in NAMES


def has_truth(name: str) -> bool:
    """Whether a verifier compares with what a record says, so that it is not applicable to all."""
    spelled = Spelled(name)
    always = spelled.kind in ("exact", "gsm8k", "math", "command")
    return always or (spelled.kind in ("regex", "json-schema") and spelled.rest[:1] == "@")


def files_of(name: str) -> list[str]:
    """Files that the name of a verifier points to, whose contents decide its values."""
    spelled = Spelled(name)
    return [spelled.rest] if spelled.kind == "json-schema" and spelled.rest[:1] != "@" else []


def open_verifier(
    name: str, *, limits: Bounds | None = None, thinking_opened: bool = False
) -> Verifier:
    """A verifier from its name.

    Args:
        name: See the module.
        limits: For `math` and `command`; None: 10 seconds and 4 GiB.
        thinking_opened: Prompts end in `<think>`, so outputs begin inside that part.

    Raises:
        UsageError: No such name, or what follows it cannot be used.
        MissingError: A package is not installed.
    """
    from polarctl.verifiers import rules

    spelled, limits = Spelled(name), limits or Bounds()
    kind, rest = spelled.kind, spelled.rest
    if kind not in NAMES:
        raise UsageError(f"no verifier `{name}`", hint=f"one of: {', '.join(NAMES)}")
    fields = (rest,) if rest else DEFAULT_FIELDS
    if kind == "exact":
        return Rule(name, rules.exact, rules.texts, fields)
    if kind == "gsm8k":
        return Rule(name, rules.gsm8k, rules.numbers, fields)
    if kind == "think-format":
        _nothing_after(spelled)
        return Rule(
            name, rules.thinks_in_the_prompt if thinking_opened else rules.thinks, whole=True
        )
    if kind == "math":
        from polarctl.verifiers.math_pool import MathVerifier

        return MathVerifier(name, fields, limits)
    if not rest:
        raise UsageError(f"`{name}` says nothing after the colon", hint=_EXAMPLES[kind])
    if kind == "length":
        return Rule(name, rules.at_most(_count(name, rest)), whole=True)
    if kind == "regex":
        if rest.startswith("@"):
            return Rule(name, rules.found, rules.patterns, (rest[1:],))
        return Rule(name, _with(rules.found, _read(name, rules.patterns, rest)))
    if kind == "json-schema":
        try:
            import jsonschema  # noqa: F401
        except ImportError:
            raise need("jsonschema", "json") from None
        if rest.startswith("@"):
            return Rule(name, rules.fits, rules.schema, (rest[1:],))
        return Rule(name, _with(rules.fits, _read(name, rules.schema, _text_of(rest))))
    from polarctl.verifiers.command import CommandVerifier

    return CommandVerifier(name, rest, limits)


_EXAMPLES = {
    "length": "length:400",
    "regex": "regex:PATTERN, or regex:@FIELD",
    "json-schema": "json-schema:FILE, or json-schema:@FIELD",
    "command": "command:PROGRAM",
}


def _nothing_after(spelled: Spelled) -> None:
    if spelled.text != spelled.kind:
        raise UsageError(f"`{spelled.text}`: nothing follows `{spelled.kind}`", hint=spelled.kind)


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UsageError(f"`{name}`: not a number of characters", hint=_EXAMPLES["length"])
    return int(text)


def _read(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise UsageError(f"`{name}` {error}") from None


def _with(rule: Callable[[Any, str], float], truth: Any) -> Callable[[Any, str], float]:
    return lambda _, output: rule(truth, output)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: no UTF-8") from None
