"""What a judge has said, read strictly: a judgement of all candidates, or the reason for none.

    <think>model-2 gives the units, model-1 does not.</think>
    {"scores": {"model-1": 2, "model-2": 4}, "best-to-worst": ["model-2", "model-1"]}

There may be text or a code fence around the JSON. Nothing is repaired: a repaired reply is a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCORES, RANKING = "scores", "best-to-worst"
LOWEST, HIGHEST = 1, 5
_OBJECT = re.compile(r"\{(?=\s*[\"}])")


@dataclass(frozen=True)
class Reply:
    """What a judge wrote.

    Attributes:
        text: Its answer.
        reasoning: Its thinking, where a server hands that over apart.
        finished: False when the answer was cut by a length limit.
    """

    text: str
    reasoning: str = ""
    finished: bool = True


@dataclass(frozen=True)
class Judgement:
    """A reply that could be read.

    Attributes:
        scores: Masked name to score, from 1 to 5.
        ranking: Masked names, best to worst.
        reasoning: The think part, or an empty text.
    """

    scores: dict[str, float]
    ranking: list[str]
    reasoning: str

    @property
    def contradicts_itself(self) -> bool:
        """Whether somebody stands in the ranking before another one with a higher score."""
        values = [self.scores[name] for name in self.ranking]
        return any(later > earlier for earlier, later in zip(values, values[1:], strict=False))


@dataclass(frozen=True)
class Failure:
    """No judgement, and why."""

    reason: str


class _Bad(ValueError):
    """The reason for which a reply is not a judgement."""


def parse(reply: Reply, names: Sequence[str]) -> Judgement | Failure:
    """Read a judge's reply.

    Args:
        reply: What it wrote.
        names: The masked names that it was shown.
    """
    try:
        return _parse(reply, names)
    except _Bad as bad:
        return Failure(str(bad))


def _parse(reply: Reply, names: Sequence[str]) -> Judgement:
    if not reply.finished:
        raise _Bad("the reply was cut at the length limit")
    # Thinking may quote `</think>` from a candidate, what follows the last one may not.
    thinking, closed, answer = reply.text.rpartition("</think>")
    if "<think>" in answer:
        raise _Bad("the thinking has no end")
    found = [value for value in _objects(answer) if SCORES in value or RANKING in value]
    if not found:
        raise _Bad(f"no JSON object with `{SCORES}` and `{RANKING}`")
    if len(found) > 1:
        raise _Bad("more than one answer")
    thoughts = thinking.partition("<think>")[2] if "<think>" in thinking else thinking
    return Judgement(
        _scores(found[0], names),
        _ranking(found[0], names),
        (thoughts if closed else reply.reasoning).strip(),
    )


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, outermost ones. What begins like one must be one."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
    found = []
    start = _OBJECT.search(text)
    while start:
        try:
            value, end = decoder.raw_decode(text, start.start())
        except _Bad:
            raise
        except json.JSONDecodeError as error:
            raise _Bad(f"not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, deep nesting
            raise _Bad("not valid JSON: out of bounds") from None
        found.append(value)
        start = _OBJECT.search(text, end)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Bad(f"`{_short(twice)}` is there twice")
    return found


def _no_constant(name: str) -> None:
    raise _Bad(f"`{name}` is no JSON")


def _scores(answer: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    scores = answer.get(SCORES)
    if not isinstance(scores, dict):
        raise _Bad(f"`{SCORES}` is missing or no object")
    _same_names(list(scores), names, SCORES)
    for name, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise _Bad(f"the score of `{name}` is no number")
        if not LOWEST <= score <= HIGHEST:
            raise _Bad(f"the score of `{name}` is not between {LOWEST} and {HIGHEST}")
    return {name: float(scores[name]) for name in names}


def _ranking(answer: dict[str, Any], names: Sequence[str]) -> list[str]:
    ranking = answer.get(RANKING)
    if not isinstance(ranking, list) or not all(isinstance(name, str) for name in ranking):
        raise _Bad(f"`{RANKING}` is missing or no list of names")
    _same_names(ranking, names, RANKING)
    return ranking


def _same_names(found: list[str], wanted: Sequence[str], where: str) -> None:
    for name in found:
        if name not in wanted:
            raise _Bad(f"`{where}` has `{_short(name)}`, which was not asked about")
    for name in wanted:
        if found.count(name) != 1:
            how = "twice" if name in found else "not"
            raise _Bad(f"`{where}` does not have each name once: `{name}` is {how} there")


def _short(text: str) -> str:
    """A key that a judge has made up, fit for one line of a message."""
    return " ".join(text.split())[:40]
