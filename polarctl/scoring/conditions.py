r"""A system prompt per domain, before the reward model's input and nowhere else.

The conditional reward model of InternLM2 (arXiv 2403.17297) is told in a system prompt by which
preferences to score. A file maps the value of one field of a record to that prompt:

    math: Judge the final answer and every step.
    chat: Judge helpfulness and tone.

The system prompt becomes the first message of the prompt (a system message that is there is put
after it, in the same message). A chat template writes it as such; POLAR's template, which drops
roles, gets a line of its own for it. The record that is written keeps its own prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from polarctl.config import yaml_of
from polarctl.errors import RecordError, UsageError
from polarctl.model.template import content_text
from polarctl.records import Record

T = TypeVar("T")


class Conditions:
    """System prompts by the value of a field.

    Args:
        field: Field of a record, such as `category`.
        prompts: Its value to the system prompt; an empty text stands for none.
    """

    def __init__(self, field: str, prompts: Mapping[str, str]):
        self.field, self.prompts = field, dict(prompts)

    def of(self, record: Mapping[str, Any]) -> str:
        """The system prompt of a record.

        Raises:
            RecordError: The field is missing or is not a known condition.
        """
        if self.field not in record:
            raise RecordError(f"missing field `{self.field}`", hint="--condition-field names it")
        value = record[self.field]
        if not isinstance(value, str) or value not in self.prompts:
            known = ", ".join(sorted(self.prompts)[:8])
            raise RecordError(
                f"field `{self.field}`: no condition for {value!r:.60}", hint=f"known: {known}"
            )
        return self.prompts[value]

    def verify(self, record: Record) -> None:
        """Raise RecordError for a record without a known condition; for a `Reader`."""
        self.of(record)

    def prompted(self, record: Record) -> Record:
        """The record with its system prompt before its prompt.

        Raises:
            RecordError: See `of`.
        """
        system = self.of(record)
        if not system:
            return record
        prompt = record["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if turns and turns[0]["role"] == "system":
            system += "\n" + content_text(turns[:1])
            turns = turns[1:]
        told = [{"role": "system", "content": system}, *turns]
        return Record({**record, "prompt": told}, record.where)

    def apply(
        self,
        records: Sequence[Record],
        score: Callable[[Sequence[Record]], Iterable[tuple[dict[str, Any], T]]],
    ) -> Iterator[tuple[dict[str, Any], T]]:
        """What `score` makes of the records with their system prompts, with their own prompts.

        Args:
            records: All with a known condition.
            score: Such as `polarctl.scoring.scorer.score_records` with a scorer: a pair per record.

        Raises:
            RecordError: See `of`.
        """
        scored = score([self.prompted(record) for record in records])
        for record, (fields, details) in zip(records, scored, strict=True):
            yield {**fields, "prompt": record["prompt"]}, details


def read(field: str, path: str) -> Conditions:
    """The conditions of a YAML or JSON file.

    Args:
        field: Field of the records whose value is looked up.
        path: A mapping of texts to texts.

    Raises:
        UsageError: Unreadable, or no such mapping.
    """
    found = yaml_of(path)
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{path}: must map values of `{field}` to system prompts")
    for value, system in found.items():
        if not isinstance(value, str) or not isinstance(system, str):
            raise UsageError(
                f"{path}: `{value}` must be a text with a text for it",
                hint="quote numbers, true and false",
            )
    return Conditions(field, found)
