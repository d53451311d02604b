"""Rows of public benchmarks in their published columns, made by us, and the groups they become."""

import pytest

from polarctl.errors import RecordError
from polarctl.formats.table import FORMATS, detect
from polarctl.stages.convert import Config, to_native


def group(*candidates):
    names = ("name", "output", "label")
    return [dict(zip(names[3 - len(one) :], one, strict=True)) for one in candidates]


SHAPES = {
    "rewardbench": (
        {
            "prompt": "Q",
            "chosen": "a",
            "chosen_model": "m1",
            "rejected": "b",
            "rejected_model": "m2",
            "subset": "hep-go",
            "id": 7,
        },
        {
            "prompt": "Q",
            "candidates": group(("m1", "a", 1), ("m2", "b", 0)),
            "id": "7",
            "benchmark": "rewardbench",
            "subset": "hep-go",
        },
    ),
    "m-rewardbench": (
        {
            "id": 8,
            "prompt": "Q",
            "chosen": "a",
            "rejected": "b",
            "language": "deu_Latn",
            "source": "donotanswer",
            "chosen_model": "m1",
            "rejected_model": "m2",
            "category": "Safety",
        },
        {
            "prompt": "Q",
            "candidates": group(("m1", "a", 1), ("m2", "b", 0)),
            "id": "8",
            "benchmark": "m-rewardbench",
            "subset": "donotanswer",
            "meta": {"language": "deu_Latn", "category": "Safety"},
        },
    ),
    "rewardbench2": (
        {
            "id": "tied:3",
            "prompt": "Q",
            "chosen": ["a", "b"],
            "rejected": ["c"],
            "num_correct": 2,
            "num_incorrect": 1,
            "total_completions": 3,
            "models": ["m1", "m2", "m3"],
            "subset": "Ties",
            "additional_metadata": None,
        },
        {
            "prompt": "Q",
            "candidates": group(("m1", "a", 1), ("m2", "b", 1), ("m3", "c", 0)),
            "id": "tied:3",
            "benchmark": "rewardbench2",
            "subset": "Ties",
            "meta": {
                "num_correct": 2,
                "num_incorrect": 1,
                "total_completions": 3,
                "additional_metadata": None,
            },
        },
    ),
    "rm-bench": (
        {
            "id": 1,
            "prompt": "Q",
            "chosen": ["a1", "a2", "a3"],
            "rejected": ["b1", "b2", "b3"],
            "domain": "safety-refuse",
        },
        {
            "prompt": "Q",
            "candidates": group(
                ("chosen-concise", "a1", 1),
                ("chosen-detailed-plain", "a2", 1),
                ("chosen-detailed-markdown", "a3", 1),
                ("rejected-concise", "b1", 0),
                ("rejected-detailed-plain", "b2", 0),
                ("rejected-detailed-markdown", "b3", 0),
            ),
            "id": "1",
            "benchmark": "rm-bench",
            "subset": "safety-refuse",
        },
    ),
    "judgebench": (
        {
            "pair_id": "p",
            "original_id": "o",
            "source": "mmlu-pro-law",
            "question": "Q",
            "response_model": "m",
            "response_A": "a",
            "response_B": "b",
            "label": "B>A",
        },
        {
            "prompt": "Q",
            "candidates": group(("response_A", "a", 0), ("response_B", "b", 1)),
            "id": "p",
            "benchmark": "judgebench",
            "subset": "mmlu-pro-law",
            "meta": {"original_id": "o", "response_model": "m"},
        },
    ),
    "rewardmath": (
        {
            "id": "x",
            "problem_id": 5,
            "problem": "Q",
            "answer": "42",
            "eval_solution": "so 42",
            "solution_type": "chosen",
        },
        {
            "prompt": "Q",
            "output": "so 42",
            "label": 1,
            "id": "5",
            "benchmark": "rewardmath",
            "meta": {"answer": "42"},
        },
    ),
    "rmb pair": (
        {
            "pair_uid": "p",
            "conversation_input": [{"role": "user", "content": "Q"}],
            "chosen": {"llm_name": "m1", "answer": "a"},
            "reject": {"llm_name": "m2", "answer": "b"},
            "category_path": "Pairwise_set/Helpfulness/QA",
        },
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "candidates": group(("m1", "a", 1), ("m2", "b", 0)),
            "id": "p",
            "benchmark": "rmb",
            "subset": "Pairwise_set/Helpfulness/QA",
        },
    ),
    "rmb best of n": (
        {
            "bon_uid": "p",
            "conversation_input": [{"role": "user", "content": "Q"}],
            "bon_best": {"llm_name": "m1", "answer": "a"},
            "loser_list": [{"llm_name": n, "answer": n} for n in ("m2", "m3")],
            "category_path": "BoN_set/Harmlessness",
        },
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "candidates": group(("m1", "a", 1), ("m2", "m2", 0), ("m3", "m3", 0)),
            "id": "p",
            "benchmark": "rmb",
            "subset": "BoN_set/Harmlessness",
        },
    ),
    "ppe": (
        {
            "question_id": "q",
            "prompt": "Q",
            "response_1": "a",
            "response_2": "b",
            "response_10": "c",
            "scores": [True, False, True],
            "sampled_conflict_pairs": [[0, 1]],
        },
        {
            "prompt": "Q",
            "candidates": group(
                ("response_1", "a", 1), ("response_2", "b", 0), ("response_10", "c", 1)
            ),
            "id": "q",
            "benchmark": "ppe",
            "meta": {"sampled_conflict_pairs": [[0, 1]]},
        },
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_benchmarks_row_is_a_group(shape):
    row, expected = SHAPES[shape]
    name = "rewardbench" if shape.startswith("m-") else shape.partition(" ")[0]
    record, found, _ = to_native(row, Config(from_format=name))
    assert (record, found) == (expected, name)
    if name != "rm-bench":  # has no field of its own
        assert detect(row)[0] == name
        assert to_native(row, Config())[0] == expected
    with_reference = {**row, "reference": "R"}
    assert to_native(with_reference, Config(from_format=name))[0]["reference"] == "R"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rewardbench", {"prompt": "Q", "chosen": "a", "subset": "x"}, "missing field `rejected`"),
        ("rewardbench2", {"prompt": "Q", "chosen": [1], "rejected": ["b"]}, "`chosen`: unexpected"),
        ("rm-bench", {"prompt": "Q", "chosen": ["a"], "rejected": ["b"]}, "three answers each"),
        ("judgebench", {"question": "Q", "label": "A=B"}, "`A>B` or `B>A`"),
        ("rewardmath", {"problem": "Q", "solution_type": "x"}, "chosen or rejected"),
        ("rmb", {"conversation_input": [], "bon_best": {}, "loser_list": [1]}, "no `answer`"),
        ("ppe", {"prompt": "Q", "response_1": "a", "scores": [True, False]}, "1 responses and 2"),
        ("ppe", {"prompt": "Q", "response_1": "a"}, "missing field `scores`"),
    ],
)
def test_a_broken_row_says_what_it_lacks(name, row, message):
    with pytest.raises(RecordError, match=message):
        FORMATS[name].read(row, "reference")
