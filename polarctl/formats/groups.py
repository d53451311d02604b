"""Turning our own records into one another: groups of candidates, triples, prompts, splits.

Four shapes carry the same information to different stages: a **triple** (`chosen`, `rejected`), a
**group** (`candidates` with labels), a **single** candidate (`output`) and a **prompt** with or
without a reference. The functions are pure: a record in, records out, nothing kept between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from msgspec import Struct

from polarctl import seeding
from polarctl.errors import RecordError
from polarctl.evaluation.metrics import pairs_of_group
from polarctl.model.template import content_text, plain_text
from polarctl.records import Candidate, Prompt, Triple, check

Fields = dict[str, Any]
Shape = Literal["triple", "group", "single", "prompt"]
Ranked = Literal["all", "adjacent", "top"]
Part = Literal["train", "test"]

SCHEMA_OF: dict[Shape, type[Struct]] = {
    "triple": Triple,
    "group": Candidate,
    "single": Candidate,
    "prompt": Prompt,
}
# What belongs to a candidate or to a pair of them, not to the prompt.
_OF_CANDIDATES = "candidates output label chosen rejected policy rejected_policy".split()
_NO_REFERENCE = (
    "--map reference=FIELD names a good answer to compare with; pairs alone train a model too: "
    "--to trl, then `polarctl finetune --no-reference`"
)


def shape_of(record: Mapping[str, Any]) -> Shape:
    """The shape of a record, told from its fields."""
    if "chosen" in record or "rejected" in record:
        return "triple"
    if "candidates" in record:
        return "group"
    return "single" if "output" in record else "prompt"


def check_native(record: Fields) -> None:
    """Raise RecordError when the record breaks the schema of its shape."""
    check(record, SCHEMA_OF[shape_of(record)])


def without(record: Mapping[str, Any], *names: str) -> Fields:
    """The fields of a record but for some."""
    return {key: value for key, value in record.items() if key not in names}


def labelled(record: Mapping[str, Any]) -> list[Fields]:
    """The candidates of a group whose label is known."""
    return [c for c in record["candidates"] if c.get("label") is not None]


def _pair(record: Fields, better: Fields, worse: Fields, reference: Fields | None = None) -> Fields:
    made: Fields = {"prompt": record["prompt"]}
    if reference is not None:
        made["reference"] = reference["output"]
    elif "reference" in record:
        made["reference"] = record["reference"]
    made |= {"chosen": better["output"], "rejected": worse["output"]}
    for field, candidate in (("policy", better), ("rejected_policy", worse)):
        if "name" in candidate:
            made[field] = candidate["name"]
    return {**made, **without(record, "prompt", "reference", *_OF_CANDIDATES)}


def pairs(record: Fields) -> list[Fields]:
    """Every (better, worse) pair of a group as `chosen` and `rejected`; a triple as it is.

    Candidates without a label and pairs with equal labels are left out. The names of the two
    become `policy` and `rejected_policy`; the record's other fields are kept in every pair.

    Raises:
        RecordError: The record holds no two candidates to compare.
    """
    shape = shape_of(record)
    if shape == "triple":
        return [record]
    if shape != "group":
        ways = "--join FIELD makes groups of neighbouring rows; `polarctl pair`, triples of samples"
        raise RecordError(
            "neither `candidates` nor `chosen` and `rejected`",
            hint=ways if shape == "single" else None,
        )
    known = labelled(record)
    order = pairs_of_group([candidate["label"] for candidate in known])
    return [_pair(record, known[better], known[worse]) for better, worse in order]


def triples(record: Fields, ranked: Ranked = "all") -> list[Fields]:
    """The triples that a record holds.

    With a reference: one for every pair of candidates with different labels. Without: a ranking
    A > B > C gives the reference A, chosen B and rejected C, as in the paper's fine-tuning
    (arXiv 2507.05197), and `ranked` says which rankings of more than three to take.

    Args:
        record: A triple or a group.
        ranked: `all` A > B > C; `adjacent` ranks only; `top`: A is always of the first rank.

    Raises:
        RecordError: No candidates, or neither a reference nor three of them.
    """
    if shape_of(record) != "group" or "reference" in record:
        made = pairs(record)
        if made and "reference" not in made[0]:
            raise RecordError("missing field `reference`", hint=_NO_REFERENCE)
        return made
    if len(record["candidates"]) < 3:
        raise RecordError(
            "no `reference`, and fewer than three candidates to take one from", hint=_NO_REFERENCE
        )
    known = labelled(record)
    levels = sorted({candidate["label"] for candidate in known}, reverse=True)
    rank = {label: place for place, label in enumerate(levels)}
    known.sort(key=lambda candidate: rank[candidate["label"]])
    made = []
    for a, b, c in combinations(known, 3):
        x, y, z = (rank[candidate["label"]] for candidate in (a, b, c))
        if not x < y < z:
            continue
        if ranked == "adjacent" and (y, z) != (x + 1, x + 2) or ranked == "top" and x:
            continue
        made.append(_pair(record, b, c, reference=a))
    return made


def is_copy(triple: Fields) -> bool:
    """Whether the chosen text of a triple is its reference, whatever the space between words."""
    reference, chosen = (content_text(triple[name]).split() for name in ("reference", "chosen"))
    return reference == chosen


def group(record: Fields) -> Fields:
    """A triple as a group of two candidates, labels 1 and 0; groups and singles as they are.

    Raises:
        RecordError: The record holds no candidate.
    """
    shape = shape_of(record)
    if shape == "prompt":
        raise RecordError("no candidate: no `output`, `candidates`, or `chosen` and `rejected`")
    if shape != "triple":
        return record
    made: Fields = {"prompt": record["prompt"]}
    if "reference" in record:
        made["reference"] = record["reference"]
    made["candidates"] = [
        candidate(record["chosen"], 1, record.get("policy")),
        candidate(record["rejected"], 0, record.get("rejected_policy")),
    ]
    return {**made, **without(record, "prompt", "reference", *_OF_CANDIDATES)}


def merged(records: Sequence[Fields]) -> Fields:
    """Single candidates of one prompt as a group.

    What all of them share stays the group's; the rest goes to each candidate. A `policy` becomes
    the candidate's name, and a `reward` of each the group's `rewards`.

    Raises:
        RecordError: One is no single candidate, or they differ in the prompt or the reference.
    """
    first = records[0]
    for record in records:
        if shape_of(record) != "single":
            raise RecordError(
                "a row to join has no single answer", hint="--answer output makes it a candidate"
            )
        for name in ("prompt", "reference"):
            if record.get(name) != first.get(name):
                raise RecordError(f"rows to join differ in their `{name}`")
    rewards = [record.get("reward") for record in records]
    own = {"output", "label", "policy", *(("reward",) if None not in rewards else ())}
    shared = {
        name: value
        for name, value in first.items()
        if name not in own and all(name in r and r[name] == value for r in records)
    }
    made = []
    for record in records:
        named = {"name": record["policy"]} if "policy" in record else {}
        rest = without(record, "policy", "reward" if "reward" in own else "", *shared)
        made.append({**named, **rest})
    group = {"prompt": first["prompt"], **shared, "candidates": made}
    return {**group, "rewards": rewards} if "reward" in own else group


def candidate(output: Any, label: float | None, name: str | None = None) -> Fields:
    """One candidate of a group."""
    return {**({} if name is None else {"name": name}), "output": output, "label": label}


def prompt(record: Fields) -> Fields:
    """The prompt and the reference of a record, without its candidates."""
    return without(record, *_OF_CANDIDATES)


def part_of(record: Fields, test_share: float, seed: int) -> Part:
    """The part that a record belongs to when data are split by prompt.

    The prompt's text alone decides (white space folded, roles dropped), never its `id`, order or
    format, so that no prompt is in both parts however often and in whatever form it occurs.

    Args:
        record: Any of our records.
        test_share: Share of the prompts that go to the test part, in [0, 1].
        seed: Seed of the choice.
    """
    text = plain_text(record["prompt"])
    return "test" if seeding.derive(seed, "split", text) < test_share * 2**63 else "train"
