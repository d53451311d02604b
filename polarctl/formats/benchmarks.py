"""Public reward-model benchmarks in their published rows, each row a group of candidates.

A record has `id`, `prompt`, `candidates` (each with a label, mostly with a name), `benchmark` and
`subset` where the benchmark has subsets; what else a row holds is in `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polarctl.errors import RecordError
from polarctl.formats.groups import Fields, candidate, without
from polarctl.formats.published import read_helpsteer
from polarctl.formats.rows import Answer, need, number, short

_STYLES = ("concise", "detailed-plain", "detailed-markdown")


def _case(
    name: str,
    row: Mapping[str, Any],
    made: Sequence[Fields],
    *,
    used: Sequence[str],
    asked: str = "prompt",
    id_field: str = "id",
    subset_field: str = "subset",
) -> Fields:
    """A record of a benchmark's row.

    Args:
        name: The benchmark.
        row: The row.
        made: Its candidates.
        used: Fields that the candidates hold.
        asked: Field of the prompt.
        id_field: Field of the identity.
        subset_field: Field of the subset.
    """
    case: Fields = {"prompt": need(row, asked, (str, list)), "candidates": list(made)}
    if "reference" in row:
        case["reference"] = row["reference"]
    if row.get(id_field) is not None:
        case["id"] = str(row[id_field])
    case["benchmark"] = name
    if row.get(subset_field) is not None:
        case["subset"] = str(row[subset_field])
    meta = without(row, *used, asked, id_field, subset_field, "reference")
    return {**case, **({"meta": meta} if meta else {})}


def read_rewardbench(row: Mapping[str, Any], answer: Answer) -> Fields:
    """RewardBench and M-RewardBench: a chosen and a rejected answer with their models.

    The subset's column is `subset`, and `source` in the multilingual one.
    """
    several = "subset" not in row
    pair = [
        candidate(need(row, field, str), label, row.get(f"{field}_model"))
        for field, label in (("chosen", 1), ("rejected", 0))
    ]
    return _case(
        "m-rewardbench" if several else "rewardbench",
        row,
        pair,
        used=("chosen", "rejected", "chosen_model", "rejected_model"),
        subset_field="source" if several else "subset",
    )


def read_rewardbench2(row: Mapping[str, Any], answer: Answer) -> Fields:
    """RewardBench 2: the correct answers, then the others, with the models of all."""
    made = _right_and_wrong(row)
    models = row.get("models")
    used = ["chosen", "rejected"]
    if isinstance(models, list) and len(models) == len(made):
        made = [{"name": str(name), **one} for name, one in zip(models, made, strict=True)]
        used.append("models")
    return _case("rewardbench2", row, made, used=used)


def read_rm_bench(row: Mapping[str, Any], answer: Answer) -> Fields:
    """RM-Bench: three chosen and three rejected answers, each in the order of the styles."""
    made = _right_and_wrong(row)
    if len(made) != 2 * len(_STYLES) or sum(one["label"] for one in made) != len(_STYLES):
        raise RecordError("`chosen` and `rejected` must hold three answers each")
    names = [f"{field}-{style}" for field in ("chosen", "rejected") for style in _STYLES]
    made = [{"name": name, **one} for name, one in zip(names, made, strict=True)]
    return _case("rm-bench", row, made, used=("chosen", "rejected"), subset_field="domain")


def _right_and_wrong(row: Mapping[str, Any]) -> list[Fields]:
    made = []
    for field, label in (("chosen", 1), ("rejected", 0)):
        for text in need(row, field, list):
            if not isinstance(text, str):
                raise RecordError(f"field `{field}`: unexpected {short(text)}: must hold texts")
            made.append(candidate(text, label))
    return made


def read_judgebench(row: Mapping[str, Any], answer: Answer) -> Fields:
    """JudgeBench: `response_A`, `response_B` and the label `A>B` or `B>A`."""
    label = row.get("label")
    if label not in ("A>B", "B>A"):
        raise RecordError(f"field `label`: unexpected {short(label)}: `A>B` or `B>A`")
    fields = ("response_A", "response_B")
    made = [candidate(need(row, field, str), int(label[0] == field[-1]), field) for field in fields]
    return _case(
        "judgebench",
        row,
        made,
        used=(*fields, "label"),
        asked="question",
        id_field="pair_id",
        subset_field="source",
    )


def read_helpsteer3(row: Mapping[str, Any], answer: Answer) -> Fields:
    """HelpSteer3's preferences; both labels are 0.5 where neither answer is preferred."""
    need(row, "response1", str)
    group = read_helpsteer(row, answer)
    made = [{"name": f"response{place}", **one} for place, one in enumerate(group["candidates"], 1)]
    used = ("response1", "response2", "overall_preference", "context")
    record = _case(
        "helpsteer3", {**row, "prompt": group["prompt"]}, made, used=used, subset_field="domain"
    )
    return record


def read_rmb(row: Mapping[str, Any], answer: Answer) -> Fields:
    """RMB: a pair (`chosen`, `reject`), or the best of several (`bon_best`, `loser_list`)."""
    best_of = "bon_best" in row
    best, losers = ("bon_best", "loser_list") if best_of else ("chosen", "reject")
    entries = [need(row, best, dict)]
    entries += need(row, losers, list) if best_of else [need(row, losers, dict)]
    made = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("answer"), str):
            raise RecordError(f"fields `{best}`, `{losers}`: no `answer` in {short(entry)}")
        made.append(candidate(entry["answer"], int(place == 0), entry.get("llm_name")))
    return _case(
        "rmb",
        row,
        made,
        used=(best, losers),
        asked="conversation_input",
        id_field="bon_uid" if best_of else "pair_uid",
        subset_field="category_path",
    )


def read_ppe(row: Mapping[str, Any], answer: Answer) -> Fields:
    """PPE correctness: `response_1` ... `response_K` with `scores`."""
    names = sorted(
        (name for name in row if re.fullmatch(r"response_\d+", name)),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    texts = [need(row, name, str) for name in names]
    scores = need(row, "scores", list)
    if len(scores) != len(texts):
        raise RecordError(f"{len(texts)} responses and {len(scores)} `scores`")
    made = [
        candidate(text, int(score) if isinstance(score, bool) else number(score), name)
        for name, text, score in zip(names, texts, scores, strict=True)
    ]
    return _case("ppe", row, made, used=(*names, "scores"), id_field="question_id")


def read_rewardmath(row: Mapping[str, Any], answer: Answer) -> Fields:
    """RewardMATH: one solution of a problem, chosen or rejected.

    `--join problem_id` makes a group of a problem's solutions.
    """
    kind = row.get("solution_type")
    if kind not in ("chosen", "rejected"):
        raise RecordError(f"field `solution_type`: unexpected {short(kind)}: chosen or rejected")
    case = _case(
        "rewardmath",
        row,
        [],
        used=("eval_solution", "solution_type", "id"),
        asked="problem",
        id_field="problem_id",
    )
    text = need(row, "eval_solution", (str, list))
    if isinstance(text, list):  # a step each
        text = "\n".join(map(str, text))
    said = {"output": text, "label": int(kind == "chosen")}
    return {**without(case, "candidates"), **said}
