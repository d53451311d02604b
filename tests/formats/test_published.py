"""Rows in the published forms of data sets and tools, made by us, and the records they become."""

import json

import pytest

from polarctl.errors import RecordError
from polarctl.formats.table import FORMATS, detect
from polarctl.records import Candidate, check
from polarctl.stages.convert import Config, to_native


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def auto(row, **options):
    record, name, _ = to_native(row, Config(**options))
    return record, name


def labels(record):
    return [(c.get("name"), c["output"], c["label"]) for c in record["candidates"]]


# Each: name of the format, a row in the published form, the record. The expected records are
# written by hand from the description of the data set, not from what a reader gave.
SHAPES = {
    "helpsteer2 rating": (
        "helpsteer",
        {
            "prompt": "Name a metal.",
            "response": "Iron.",
            "helpfulness": 3,
            "correctness": 4,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 0,
        },
        {
            "prompt": "Name a metal.",
            "output": "Iron.",
            "label": 3,
            "correctness": 4,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 0,
        },
    ),
    "helpsteer2 rating of several turns": (
        "helpsteer",
        {
            "prompt": "Name a metal.\n<extra_id_1>Assistant\nIron.\n<extra_id_1>User\nAnother.",
            "response": "Tin.",
            "helpfulness": 0,
        },
        {
            "prompt": [user("Name a metal."), said("Iron."), user("Another.")],
            "output": "Tin.",
            "label": 0,
        },
    ),
    "helpsteer2 preference": (  # above 0: the second answer is better
        "helpsteer",
        {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": 2}
        | {"split": "train", "preference_statement": "b is better"},
        {
            "prompt": "Q",
            "candidates": [{"output": "a", "label": 0}, {"output": "b", "label": 1}],
            "preference_strength": 2,
            "split": "train",
            "preference_statement": "b is better",
        },
    ),
    "helpsteer3 preference": (
        "helpsteer",
        {
            "domain": "code",
            "language": "python",
            "context": [user("Q")],
            "response1": "a",
            "response2": "b",
            "overall_preference": -1,
            "individual_preference": [{"score": -1}],
        },
        {
            "prompt": [user("Q")],
            "candidates": [{"output": "a", "label": 1}, {"output": "b", "label": 0}],
            "domain": "code",
            "language": "python",
            "overall_preference": -1,
            "individual_preference": [{"score": -1}],
        },
    ),
    "pku": (
        "pku-saferlhf",
        {
            "prompt": "Q",
            "response_0": "a",
            "response_1": "b",
            "prompt_source": "made",
            "response_0_source": "m0",
            "response_1_source": "m1",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        {
            "prompt": "Q",
            "candidates": [
                {"name": "m0", "output": "a", "label": 0},
                {"name": "m1", "output": "b", "label": 1},
            ],
            "prompt_source": "made",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
    ),
    "nectar": (
        "nectar",
        {
            "prompt": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant: ",
            "answers": [
                {"answer": "b", "model": "m2", "rank": 2.0},
                {"answer": "a", "model": "m1", "rank": 1.0},
                {"answer": "c", "model": "m3", "rank": 3.0},
            ],
            "turns": 2,
            "num_responses": 3,
            "source": ["made"],
            "good_natured": True,
        },
        {
            "prompt": [user("Q1"), said("A1"), user("Q2")],
            "candidates": [
                {"name": "m2", "output": "b", "label": 1},
                {"name": "m1", "output": "a", "label": 2},
                {"name": "m3", "output": "c", "label": 0},
            ],
            "turns": 2,
            "num_responses": 3,
            "source": ["made"],
            "good_natured": True,
        },
    ),
    "ultrafeedback": (
        "ultrafeedback",
        {
            "source": "made",
            "instruction": "Q",
            "models": ["m1", "m2"],
            "completions": [
                {
                    "annotations": {"helpfulness": {"Rating": "4"}},
                    "custom_system_prompt": "S",
                    "model": "m1",
                    "principle": "helpfulness",
                    "response": "a",
                    "fine-grained_score": 4.25,
                    "overall_score": 7.0,
                },
                {"model": "m2", "response": "b", "overall_score": 6.0},
            ],
            "correct_answers": ["None"],
        },
        {
            "prompt": "Q",
            "candidates": [
                {
                    "name": "m1",
                    "output": "a",
                    "label": 4.25,
                    "annotations": {"helpfulness": {"Rating": "4"}},
                    "custom_system_prompt": "S",
                    "principle": "helpfulness",
                    "fine-grained_score": 4.25,
                    "overall_score": 7.0,
                },
                {"name": "m2", "output": "b", "label": 6.0, "overall_score": 6.0},
            ],
            "source": "made",
            "models": ["m1", "m2"],
            "correct_answers": ["None"],
        },
    ),
    "arena conversations": (
        "arena",
        {
            "question_id": "x",
            "model_a": "m1",
            "model_b": "m2",
            "winner": "model_b",
            "conversation_a": [user("Q"), said("a"), user("more"), said("a2")],
            "conversation_b": [user("Q"), said("b"), user("more"), said("b2")],
            "turn": 2,
            "language": "English",
        },
        {
            "prompt": [user("Q")],
            "candidates": [
                {"name": "m1", "output": [said("a"), user("more"), said("a2")], "label": 0},
                {"name": "m2", "output": [said("b"), user("more"), said("b2")], "label": 1},
            ],
            "question_id": "x",
            "winner": "model_b",
            "turn": 2,
            "language": "English",
        },
    ),
    "arena cells": (  # the CSV of 55k battles: JSON lists in the cells
        "arena",
        {
            "id": "30192",
            "model_a": "m1",
            "model_b": "m2",
            "prompt": '["Q"]',
            "response_a": '["a"]',
            "response_b": '["b"]',
            "winner_model_a": "1",
            "winner_model_b": "0",
            "winner_tie": "0",
        },
        {
            "prompt": "Q",
            "candidates": [
                {"name": "m1", "output": "a", "label": 1},
                {"name": "m2", "output": "b", "label": 0},
            ],
            "id": "30192",
            "winner_model_a": "1",
            "winner_model_b": "0",
            "winner_tie": "0",
        },
    ),
    "ppe human preference": (
        "arena",
        {"prompt": "Q", "response_1": "a", "response_2": "b", "winner": "model_a"}
        | {"model_a": "m1", "model_b": "m2"},
        {
            "prompt": "Q",
            "candidates": [
                {"name": "m1", "output": "a", "label": 1},
                {"name": "m2", "output": "b", "label": 0},
            ],
            "winner": "model_a",
        },
    ),
    "orca dpo": (
        "trl",
        {"system": "S", "question": "Q", "chosen": "The one.", "rejected": "The other."},
        {
            "prompt": [system("S"), user("Q")],
            "candidates": [
                {"output": "The one.", "label": 1},
                {"output": "The other.", "label": 0},
            ],
        },
    ),
    "orca dpo of argilla, empty system": (
        "trl",
        {"system": "", "input": "Q", "chosen": "The one.", "rejected": "The other.", "rating": [9]},
        {
            "prompt": "Q",
            "candidates": [
                {"output": "The one.", "label": 1},
                {"output": "The other.", "label": 0},
            ],
            "rating": [9],
        },
    ),
    "hh-rlhf": (  # an answer's beginning that both share belongs to the answers
        "trl",
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: I will.",
            "rejected": "\n\nHuman: Q\n\nAssistant: I won't.",
        },
        {
            "prompt": [user("Q")],
            "candidates": [
                {"output": [said("I will.")], "label": 1},
                {"output": [said("I won't.")], "label": 0},
            ],
        },
    ),
    "several chosen and rejected": (
        "trl",
        {"prompt": "Q", "chosen": ["a", "b"], "rejected": ["c"]},
        {
            "prompt": "Q",
            "candidates": [
                {"output": "a", "label": 1},
                {"output": "b", "label": 1},
                {"output": "c", "label": 0},
            ],
        },
    ),
    "messages with two answers": (
        "trl",
        {"messages": [user("Q")], "chosen": said("a"), "rejected": said("b")},
        {
            "prompt": [user("Q")],
            "candidates": [
                {"output": [said("a")], "label": 1},
                {"output": [said("b")], "label": 0},
            ],
        },
    ),
    "pair whose export has empty columns": (
        "trl",
        {"prompt": None, "input": "Q", "chosen": "a", "rejected": "b", "conversation": []},
        {
            "prompt": "Q",
            "candidates": [{"output": "a", "label": 1}, {"output": "b", "label": 0}],
            "conversation": [],
        },
    ),
    "chat log": (
        "ms-swift",
        {"conversation_id": "x", "conversation": [user("Q"), said("A")], "model": "m"},
        {"prompt": [user("Q")], "reference": [said("A")], "conversation_id": "x", "model": "m"},
    ),
    "openai preference": (
        "openai",
        {
            "input": {"messages": [user("Q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [said("a")],
            "non_preferred_output": [said("b")],
        },
        {
            "prompt": [user("Q")],
            "candidates": [
                {"output": [said("a")], "label": 1},
                {"output": [said("b")], "label": 0},
            ],
            "tools": [],
            "parallel_tool_calls": True,
        },
    ),
    "ms-swift": (
        "ms-swift",
        {"messages": [system("S"), user("Q"), said("a")], "rejected_response": "b", "margin": 1},
        {
            "prompt": [system("S"), user("Q")],
            "candidates": [
                {"output": [said("a")], "label": 1},
                {"output": [said("b")], "label": 0},
            ],
            "margin": 1,
        },
    ),
    "ms-swift rejected messages": (
        "ms-swift",
        {"messages": [user("Q"), said("a")], "rejected_messages": [user("Q"), said("b")]},
        {
            "prompt": [user("Q")],
            "candidates": [
                {"output": [said("a")], "label": 1},
                {"output": [said("b")], "label": 0},
            ],
        },
    ),
    "ms-swift query": (
        "ms-swift",
        {"system": "S", "query": "Q2", "response": "a", "history": [["Q1", "A1"]]}
        | {"rejected_response": "b"},
        {
            "prompt": [system("S"), user("Q1"), said("A1"), user("Q2")],
            "candidates": [
                {"output": [said("a")], "label": 1},
                {"output": [said("b")], "label": 0},
            ],
        },
    ),
    "ms-swift rounds": (
        "ms-swift",
        {"system": "S", "conversation": [{"human": "Q", "assistant": "A"}]},
        {"prompt": [system("S"), user("Q")], "reference": [said("A")]},
    ),
    "llama-factory v1 pair": (
        "llama-factory-v1",
        {
            "chosen_messages": [
                {"role": "user", "content": [{"type": "text", "value": "Q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "a"}]},
            ],
            "rejected_messages": [
                {"role": "user", "content": [{"type": "text", "value": "Q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "b"}]},
            ],
        },
        {
            "prompt": [{"role": "user", "content": "Q", "loss_weight": 0.0}],
            "candidates": [
                {"output": [said("a")], "label": 1},
                {"output": [said("b")], "label": 0},
            ],
        },
    ),
    "llama-factory v1 conversation": (
        "openai",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "Q"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "A"}]},
            ]
        },
        {"prompt": [user("Q")], "reference": [said("A")]},
    ),
    "kto of ms-swift and llama-factory": (
        "openai",
        {"messages": [user("Q"), said("bad")], "label": False},
        {"prompt": [user("Q")], "output": [said("bad")], "label": False},
    ),
    "kto of llama-factory, sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "bad"}],
            "kto_tag": False,
        },
        {"prompt": [user("Q")], "output": [said("bad")], "label": False},
    ),
    "kto of llama-factory, alpaca": (
        "llama-factory",
        {"instruction": "Q", "input": "", "output": "bad", "kto_tag": False},
        {"prompt": "Q", "output": "bad", "label": False},
    ),
    "kto of trl": (
        "trl",
        {"prompt": "Q", "completion": "bad", "label": False},
        {"prompt": "Q", "output": "bad", "label": False},
    ),
    "verl": (
        "verl",
        {
            "data_source": "openai/gsm8k",
            "prompt": [user("Q")],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "72"},
            "extra_info": {"split": "train", "index": 0, "answer": "so 72"},
        },
        {
            "prompt": [user("Q")],
            "reference": "72",
            "data_source": "openai/gsm8k",
            "ability": "math",
            "reward_model": {"style": "rule"},
            "extra_info": {"split": "train", "index": 0, "answer": "so 72"},
        },
    ),
    "texts as candidates": (
        "native",
        {"prompt": "Q", "candidates": ["a", "b"]},
        {"prompt": "Q", "candidates": [{"output": "a"}, {"output": "b"}]},
    ),
    "texts as candidates with labels": (
        "native",
        {"prompt": "Q", "candidates": ["a", "b"], "labels": [1, 0]},
        {"prompt": "Q", "candidates": [{"output": "a", "label": 1}, {"output": "b", "label": 0}]},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_row_becomes_the_record_that_it_means(shape):
    name, row, expected = SHAPES[shape]
    before = json.dumps(row)
    assert detect(row)[0] == name
    assert auto(row) == (expected, name)
    assert auto(row, from_format=name) == (expected, name)
    assert json.dumps(row) == before, "the row itself is not changed"


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_a_tie_gives_both_candidates_the_same_label(winner):
    talk = {"conversation_a": [user("Q"), said("a")], "conversation_b": [user("Q"), said("b")]}
    assert labels(auto({**talk, "winner": winner})[0]) == [
        (None, [said("a")], 0.5),
        (None, [said("b")], 0.5),
    ]


def test_the_question_of_safety_is_a_map_away():
    row = SHAPES["pku"][1]
    record, _ = auto(row, map=("better_response_id=safer_response_id",))
    assert [label for *_, label in labels(record)] == [1, 0]


# Rows that hold answers which no record would: the message names them, the hint a remedy.
LEFT = [
    (
        {"prompt": "Q", "completions": ["step 1", "step 2"], "labels": [True, False]},
        "`completions` looks like an answer",
        "steps of one answer",
    ),
    ({"prompt": "Q", "response": "a", "grade": 3}, "`response` looks", "--map reference=response"),
    ({"prompt": "Q", "reference": "R", "response": "a"}, "`response`", "--map output=response"),
    ({"prompt": "Q", "responses": ["a", "b"]}, "`responses`", "--map candidates=responses"),
    ({"prompt": "Q", "answer_1": "a", "answer_2": "b"}, "`answer_1`, `answer_2` look", "--map ch"),
    ({"prompt": "Q", "response_0": "a", "response_1": "b"}, "`response_0`, `response_1`", "--map"),
    ({"prompt": "Q", "model_a": "x", "response_A": "a", "response_B": "b"}, "`response_A`", "--m"),
    ({"prompt": "Q", "generations": ["a"]}, "`generations`", "--to prompts leaves"),
    ({"prompt": "Q", "chosen-response": "a", "rejected-response": "b"}, "`chosen-r", "--map"),
    ({"prompt": "Q", "answer": "42"}, "`answer` looks like an answer", "--map reference=answer"),
    ({"messages": [user("Q")], "completion": "a"}, "`completion`", "--map"),
    (
        {"prompt": "Q", "output": "a", "rejected_response": "b"},
        "`rejected_response`",
        "--map chosen=output",
    ),
]


@pytest.mark.parametrize(("row", "message", "hint"), LEFT)
def test_answers_are_never_left_unused(row, message, hint):
    with pytest.raises(RecordError) as caught:
        to_native(row, Config())
    assert message in str(caught.value) and hint in caught.value.hint
    # Unless the user asks for prompts.
    to_native(row, Config(to_format="prompts"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "reference": "R", "answer": "42", "accept": ["42"]},  # for verifiers
        {"prompt": "Q", "response_length": 3, "answer": None, "model": "m", "responses": []},
        {"prompt": "Q", "num_responses": 4, "chosen_by": "me", "output_format": "json"},
        {"prompt": "Q", "output": "a", "responses": ["b"]},  # has its candidate
    ],
)
def test_other_fields_pass_through(row):
    assert to_native(row, Config())[0] == row


# One broken row for every reader.
BROKEN = [
    ("helpsteer", {"prompt": 3, "response": "a", "helpfulness": 1}, "field `prompt`"),
    ("helpsteer", {"prompt": "Q", "response_1": "a", "response_2": "b"}, "preference_strength"),
    ("pku-saferlhf", {"prompt": "Q", "response_0": "a", "response_1": "b"}, "better_response_id"),
    ("nectar", {"prompt": "Q", "answers": ["a"]}, r"`answers\[0\]`: no `answer`"),
    ("nectar", {"prompt": "Q", "answers": [{"answer": "a"}]}, r"`answers\[0\]`: no `rank`"),
    ("ultrafeedback", {"instruction": "Q", "completions": [{"response": "a"}]}, "no completion"),
    ("ultrafeedback", {"instruction": "Q", "completions": ["a"]}, r"completions\[0\]"),
    ("arena", {"prompt": "Q", "response_a": "a", "response_b": "b"}, "missing field `winner`"),
    (
        "arena",
        {"prompt": ["Q", "Q2"], "response_a": ["a"], "response_b": ["b"], "winner": "tie"},
        "number of turns",
    ),
    (
        "arena",
        {"conversation_a": [user("P")], "conversation_b": [user("Q")], "winner": "tie"},
        "share no beginning",
    ),
    (
        "arena",
        {"prompt": "Q", "response_1": "a", "winner": "model_a"},
        "missing field `response_2`",
    ),
    ("openai", {"preferred_output": [said("a")], "input": "Q"}, "field `input`"),
    ("ms-swift", {"messages": [user("Q")], "rejected_response": "b"}, "without a chosen one"),
    (
        "ms-swift",
        {"messages": [user("Q"), said("a")], "rejected_messages": [user("P"), said("b")]},
        "no other answer to the same",
    ),
    ("ms-swift", {"query": "Q", "response": "A", "history": ["x"]}, r"`history\[0\]`"),
    (
        "llama-factory-v1",
        {"chosen_messages": [user("Q")], "rejected_messages": [user("P")]},
        "share no beginning",
    ),
    ("verl", {"prompt": "Q", "reward_model": {"ground_truth": {"a": 1}}}, "ground_truth"),
    ("trl", {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q"}, "does not end"),
    ("trl", {"chosen": ["a"], "rejected": ["b"]}, "missing field `prompt`"),
]


@pytest.mark.parametrize(("name", "row", "message"), BROKEN)
def test_a_broken_row_says_what_it_lacks(name, row, message):
    with pytest.raises(RecordError, match=message):
        check(FORMATS[name].read(row, "reference"), Candidate)


def test_texts_as_candidates_have_a_label_each_or_none():
    with pytest.raises(RecordError, match="1 candidates and 2 `labels`"):
        auto({"prompt": "Q", "candidates": ["a"], "labels": [1, 0]})
    # Whatever the other fields are: here the row of a curated UltraFeedback.
    row = {"instruction": "Q", "generations": ["a", "b"], "ratings": ["4", "2.5"]}
    record, name = auto(row, map=("candidates=generations", "labels=ratings"))
    assert (name, record) == (
        "llama-factory",
        {"prompt": "Q", "candidates": [{"output": "a", "label": 4}, {"output": "b", "label": 2.5}]},
    )


def test_our_rows_come_back_from_verl_whole():
    record = {
        "prompt": [user("Q")],
        "reference": "R",
        "id": "q1",
        "category": "maths",
        "ability": "algebra",
        "split": "test",
        "wrapper": "pretrain",
        "x": [1],
    }
    (row,) = FORMATS["verl"].write(record)
    assert (row["ability"], row["extra_info"]["split"]) == ("algebra", "test")
    assert auto(row) == (record, "verl")
