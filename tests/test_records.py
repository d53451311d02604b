"""The records: schemas, examples and checks say the same."""

import json
import re
from pathlib import Path

import jsonschema
import msgspec
import pytest

from polarctl.errors import RecordError, UsageError
from polarctl.records import (
    KINDS,
    Triple,
    check,
    find_kind,
    kind_of,
    prompt_id,
)
from polarctl.schemas.examples import EXAMPLES
from polarctl.schemas.export import json_schema

FOLDER = Path(__file__).parent.parent / "schemas"
EVERY_EXAMPLE = [(name, example) for name in KINDS for example in EXAMPLES[name]]

# Rows that must be refused: (kind, fields, what the message must name).
BAD = [
    ("prompt", {}, "missing field `prompt`"),
    ("prompt", {"prompt": 3}, "field `prompt`: expected `str | array`, got `int`"),
    ("prompt", {"prompt": None}, "field `prompt`: expected `str | array`, got `null`"),
    ("prompt", {"prompt": [{"role": "user"}]}, "field `prompt[0]`: missing field `content`"),
    ("prompt", {"prompt": "a", "wrapper": "chat"}, "field `wrapper`: invalid enum value 'chat'"),
    ("prompt", {"prompt": "a", "id": 7}, "field `id`: expected `str`, got `int`"),
    ("triple", {"prompt": "", "reference": "", "chosen": ""}, "missing field `rejected`"),
    ("candidate", {"prompt": "a"}, "needs either `output` or `candidates`"),
    ("candidate", {"prompt": "a", "output": "b", "candidates": []}, "needs either `output` or"),
    ("candidate", {"prompt": "a", "candidates": []}, "`candidates` is empty"),
    ("candidate", {"prompt": "a", "candidates": [{"name": "b"}]}, "missing field `output`"),
    ("score", {"prompt": "a", "reward": "high"}, "field `reward`: expected `float`, got `str`"),
    ("pool", {"policy": "a", "model": "b", "temperature": 0}, "field `temperature`: expected"),
    ("pool", {"policy": "a", "model": "b", "top_p": 1.5}, "field `top_p`: expected"),
    ("trajectory", {"prompt": "a", "output": "b", "policy": "c", "sample": True}, "`sample`"),
]


@pytest.mark.parametrize(("name", "example"), EVERY_EXAMPLE)
def test_every_example_passes_the_check_and_its_json_schema(name, example):
    check(example, KINDS[name])
    jsonschema.Draft202012Validator(json_schema(name)).validate(example)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_examples_and_a_valid_schema(name):
    assert list(EXAMPLES[name])
    jsonschema.Draft202012Validator.check_schema(json_schema(name))


@pytest.mark.parametrize("name", KINDS)
def test_the_schema_files_are_up_to_date(name):
    stored = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    assert stored == json_schema(name), "stale: run `make reference`"


def test_there_is_no_other_schema_file():
    assert {p.name for p in FOLDER.glob("*.json")} == {f"{name}.schema.json" for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_every_field_has_a_description(name):
    schema = json_schema(name)
    for title, part in {name: schema, **schema.get("$defs", {})}.items():
        assert part["description"].strip(), title
        for field, value in part["properties"].items():
            assert value["description"].strip(), f"{title}.{field}"


@pytest.mark.parametrize(("name", "example"), EVERY_EXAMPLE)
def test_unknown_fields_pass_but_for_a_pool_whose_fields_are_options(name, example):
    extended = {**example, "extra": {"nested": [1, None, "x"]}, "x_y": 3}
    validator = jsonschema.Draft202012Validator(json_schema(name))
    if name == "pool":
        with pytest.raises(RecordError, match="unknown field `extra`"):
            check(extended, KINDS[name])
        assert not validator.is_valid(extended)
        return
    check(extended, KINDS[name])
    validator.validate(extended)


@pytest.mark.parametrize(("name", "fields", "message"), BAD)
def test_a_bad_record_is_refused_with_a_readable_message(name, fields, message):
    with pytest.raises(RecordError) as caught:
        check(fields, KINDS[name])
    assert message in str(caught.value)
    assert "$" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, fields, _ in BAD])
def test_the_json_schema_refuses_what_the_check_refuses(name, fields):
    # An object schema cannot say "one of the two, not both" and "at least one" as `check` does.
    if name == "candidate" and "candidates" in fields and not fields["candidates"]:
        return
    assert not jsonschema.Draft202012Validator(json_schema(name)).is_valid(fields)


@pytest.mark.parametrize(("name", "example"), EVERY_EXAMPLE)
def test_a_missing_required_field_is_named(name, example):
    required = json_schema(name).get("required", [])
    for field in required:
        rest = {key: value for key, value in example.items() if key != field}
        with pytest.raises(RecordError, match=f"missing field `{field}`"):
            check(rest, KINDS[name])


@pytest.mark.parametrize(
    ("name", "example"), [(n, e) for n, e in EVERY_EXAMPLE if n not in ("report", "manifest")]
)
def test_the_kind_of_an_example_is_told_from_its_fields(name, example):
    assert kind_of(example) == name


def test_an_object_of_no_kind_is_refused():
    with pytest.raises(RecordError, match="no known kind of record"):
        kind_of({"text": "hello"})


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        find_kind("tripel")
    assert str(caught.value) == "no schema named `tripel`"
    assert caught.value.hint == "did you mean `triple`?"
    with pytest.raises(UsageError) as caught:
        find_kind("zzz")
    assert caught.value.hint is not None and "prompt, trajectory, triple" in caught.value.hint


def test_texts_are_strings_or_lists_of_messages():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    check({"prompt": messages, "reference": "", "chosen": [], "rejected": "x"}, Triple)
    image = [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]
    with pytest.raises(RecordError, match="image_url"):
        check({"prompt": image, "reference": "", "chosen": "", "rejected": ""}, Triple)


def test_the_prompts_identity_is_its_id_or_a_hash_of_its_text():
    assert prompt_id({"prompt": "a", "id": "geo-1"}) == "geo-1"
    assert prompt_id({"prompt": "a"}) == prompt_id({"prompt": "a", "id": "", "more": 1})
    assert re.fullmatch("[0-9a-f]{16}", prompt_id({"prompt": "a"}))
    assert prompt_id({"prompt": "a"}) != prompt_id({"prompt": "b"})
    one = [{"role": "user", "content": "a"}]
    other = [{"content": "a", "role": "user"}]  # the order of keys says nothing
    assert prompt_id({"prompt": one}) == prompt_id({"prompt": other})


def test_required_fields_come_first_in_the_release_order():
    assert [field.name for field in msgspec.structs.fields(Triple)][:4] == [
        "prompt",
        "reference",
        "chosen",
        "rejected",
    ]


def test_what_is_nearly_a_record_names_the_way_to_one():
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    texts = {"prompt": "Q", "candidates": ["a", "b"]}
    for fields, kind, way in ((pair, "triple", "--no-reference"), (texts, "candidate", "convert")):
        with pytest.raises(RecordError) as caught:
            check(fields, find_kind(kind))
        assert way in caught.value.hint
