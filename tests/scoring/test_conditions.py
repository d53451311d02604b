"""A system prompt per domain: before the reward model's input, and nowhere else."""

import pytest

from polarctl.errors import RecordError, UsageError
from polarctl.records import Record
from polarctl.scoring.conditions import Conditions, read

MATH = Record({"prompt": "1+1?", "output": "2", "domain": "math"}, "x:1")


@pytest.fixture
def conditions():
    return Conditions("domain", {"math": "Check each step.", "none": ""})


def test_the_system_prompt_is_the_first_message(conditions):
    told = conditions.prompted(MATH)
    assert told["prompt"] == [
        {"role": "system", "content": "Check each step."},
        {"role": "user", "content": "1+1?"},
    ]
    assert told.where == "x:1" and MATH["prompt"] == "1+1?"
    assert conditions.prompted(Record({"prompt": "p", "domain": "none"}))["prompt"] == "p"


def test_a_system_message_that_is_there_comes_after_it_in_the_same_message(conditions):
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    told = conditions.prompted(Record({"prompt": turns, "domain": "math"}))
    assert [turn["content"] for turn in told["prompt"]] == ["Check each step.\nBe short.", "Hi"]
    assert turns[0]["content"] == "Be short."


def test_a_polar_model_reads_the_system_prompt_before_the_prompt(conditions, tiny_rm):
    from polarctl.model import reward_model

    encoder = reward_model.load(str(tiny_rm)).encoder
    told = encoder.text(conditions.prompted(MATH)["prompt"], "two", "2")
    assert told == encoder.text("Check each step.\n1+1?", "two", "2")


def test_what_is_written_keeps_its_own_prompt(conditions):
    seen = []

    def score(records):
        seen.extend(record["prompt"][0]["content"] for record in records)
        return [({**record, "reward": 1.0}, ["details"]) for record in records]

    ((fields, details),) = conditions.apply([MATH], score)
    assert seen == ["Check each step."]
    assert fields == {**MATH, "reward": 1.0} and details == ["details"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "missing field `domain`"),
        ({"domain": "cooking"}, "no condition for 'cooking'"),
        ({"domain": 3}, "no condition for 3"),
        ({"domain": ["math"]}, "no condition"),
    ],
)
def test_an_unknown_condition_is_the_records_error(conditions, fields, message):
    with pytest.raises(RecordError, match=message):
        conditions.verify(Record({"prompt": "p", **fields}))


def test_conditions_are_read_from_yaml_and_json(tmp_path):
    for name, text in (("c.yaml", "math: Check.\nchat: ''\n"), ("c.json", '{"math": "Check."}')):
        (tmp_path / name).write_text(text)
        assert read("domain", str(tmp_path / name)).prompts["math"] == "Check."


@pytest.mark.parametrize(
    "text", ["", "- math", "math: 3", "true: Check.", "math: [a]", "{", "a: \x00"]
)
def test_a_file_that_is_no_mapping_of_texts_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match="c.yaml"):
        read("domain", str(tmp_path / "c.yaml"))
    with pytest.raises(UsageError, match="No such file"):
        read("domain", str(tmp_path / "absent.yaml"))
