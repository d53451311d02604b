"""References for benchmarks that have none: another correct answer, or one that a policy wrote.

`reference_from` of a record says where its references are from. A figure with references is that
of a model which has seen a good answer, so a table says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from polarctl.errors import RecordError
from polarctl.model.template import content_text, plain_text
from polarctl.records import Record, prompt_id
from polarctl.storage import atomic

FROM = "reference_from"
OTHER_CORRECT, GENERATE = "other-correct", "generate"
MOST = 3  # correct answers of a group that are references: each costs a reading of all candidates
WORDS = {
    "field": "references of the rows",
    OTHER_CORRECT: "references: other correct answers",
    GENERATE: "references written by a policy",
    "none": "no references",
}


def origin(record: Mapping[str, Any]) -> str:
    """Where the references of a record are from, a key of `WORDS`."""
    given = record.get(FROM)
    if given in WORDS:
        return str(given)
    return "field" if "reference" in record or "references" in record else "none"


def other_correct(records: Iterable[Record]) -> Iterator[Record | None]:
    """Each group with its first correct answers as `references`; None where there are not two.

    Correct are the candidates with the highest label, if that is above 0. `score` compares no
    candidate with itself: a correct one only with the others.
    """
    for record in records:
        labels = [float(c.get("label") or 0) for c in record.get("candidates", [])]
        good: dict[str, Any] = {}
        for candidate, label in zip(record.get("candidates", []), labels, strict=True):
            if label == max(labels) > 0:
                good.setdefault(plain_text(candidate["output"]), candidate["output"])
        if len(good) < 2:
            yield None
            continue
        rest = {name: value for name, value in record.items() if name != "reference"}
        references = list(good.values())[:MOST]
        yield Record({**rest, "references": references, FROM: OTHER_CORRECT}, record.where)


def generated(records: Iterable[Record], trajectories: Iterable[Record]) -> Iterator[Record | None]:
    """Each record with what a policy wrote for its prompt; None where it wrote nothing."""
    written = {prompt_id(made): made for made in trajectories}
    for record in records:
        made = written.get(prompt_id(record))
        if made is None or not content_text(made["output"]).strip():
            yield None
            continue
        rest = {name: value for name, value in record.items() if name != "references"}
        reference = {"reference": made["output"], "reference_policy": made["policy"]}
        yield Record({**rest, **reference, FROM: GENERATE}, record.where)


def write(path: str, records: Iterable[Record | None], why: str) -> tuple[int, int]:
    """Write those that there are as JSON lines.

    Returns:
        How many there are, and how many there are not.

    Raises:
        RecordError: There is none.
    """
    lines, without = [], 0
    for record in records:
        if record is None:
            without += 1
        else:
            lines.append(orjson.dumps(dict(record)))
    if not lines:
        raise RecordError(f"no row has a reference: {why}")
    atomic.write(path, b"\n".join(lines) + b"\n")
    return len(lines), without
