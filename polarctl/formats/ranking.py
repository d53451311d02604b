"""The best and the worst candidate of a group, by labels or by the rewards of `score`."""

from __future__ import annotations

from typing import Any, Literal

from polarctl.errors import RecordError
from polarctl.formats.groups import Fields, shape_of, without

By = Literal["label", "reward"]
# Lists beside `candidates` in what `score` writes: they mean nothing for one or two of them.
_BESIDE = "rewards normalized tokens truncated floored best ranking".split()


def values(record: Fields, by: By) -> list[float | None]:
    """The label or the reward of each candidate of a group; None where it is not known.

    Raises:
        RecordError: None of them is known, or one is no number.
    """
    candidates = record["candidates"]
    rewards = record.get("rewards")
    scored = isinstance(rewards, list) and len(rewards) == len(candidates)
    if by == "reward":
        if not scored:
            raise RecordError("has no reward for each candidate", hint="`polarctl score` adds them")
        assert isinstance(rewards, list)
        return [_number(value, "rewards", (int, float)) for value in rewards]
    found = [c.get("label") for c in candidates]
    if all(value is None for value in found):
        raise RecordError(
            "no candidate has a `label` to compare by",
            hint="--by reward pairs the best with the worst"
            if scored
            else "`polarctl score` adds rewards for `--by reward`",
        )
    return [_number(value, "label", (int, float, bool)) for value in found]


def _number(value: Any, field: str, kinds: tuple[type, ...]) -> float | None:
    if value is None:
        return None
    if type(value) not in kinds:
        raise RecordError(f"field `{field}`: a {type(value).__name__} where a number belongs")
    return float(value)


def best_and_worst(record: Fields, min_margin: float) -> Fields | None:
    """The candidates of the highest and the lowest reward as `chosen` and `rejected`.

    Their rewards are `score_chosen` and `score_rejected`.

    Args:
        record: A scored group.
        min_margin: By how much the first must exceed the second; 0: by anything.

    Returns:
        A triple, without a reference if the group has none; None if the margin is too small.
    """
    known = _known(record, "reward")
    (high, best), (low, worst) = known[0], known[-1]
    if high - low < min_margin or high == low:
        return None
    made = _prompt(record) | {"chosen": best["output"], "rejected": worst["output"]}
    for field, one in (("policy", best), ("rejected_policy", worst)):
        if "name" in one:
            made[field] = one["name"]
    return {**made, "score_chosen": high, "score_rejected": low, **_others(record, made)}


def best_of(record: Fields, by: By) -> Fields:
    """The group with its best candidate alone, as `output`; other records as they are.

    Of equal ones it is the first. Its reward is `reward`, its name `policy`.
    """
    if shape_of(record) != "group":
        return record
    value, best = _known(record, by)[0]
    made = _prompt(record) | {"output": best["output"]}
    if "name" in best:
        made["policy"] = best["name"]
    if by == "reward":
        made["reward"] = value
    return {**made, **_others(record, made)}


def _known(record: Fields, by: By) -> list[tuple[float, Fields]]:
    pairs = zip(values(record, by), record["candidates"], strict=True)
    known = [(value, one) for value, one in pairs if value is not None]
    if not known:
        raise RecordError(f"no candidate has a {by}")
    return sorted(known, key=lambda pair: -pair[0])


def _prompt(record: Fields) -> Fields:
    return {name: record[name] for name in ("prompt", "reference") if name in record}


def _others(record: Fields, made: Fields) -> dict[str, Any]:
    return without(record, "candidates", "label", *_BESIDE, *made)
