"""Verifiers without a program: what they accept, by hand-worked answers."""

import json

import pytest

from polarctl.errors import RecordError, UsageError
from polarctl.records import Record
from polarctl.verifiers.named import has_truth, open_verifier

# A solution as openai/gsm8k writes it.
GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


def value(name, record, output, **more):
    (found,) = open_verifier(name, **more).values([Record(record, "f.jsonl:7")], [output])
    return found


@pytest.mark.parametrize(
    ("record", "output", "wanted"),
    [
        ({"answer": "Paris"}, " Paris\n", 1),
        ({"answer": "Paris"}, "paris", 0),
        ({"answer": "Paris"}, "It is Paris", 0),
        ({"answer": ["Paris", "In Paris"]}, "In Paris", 1),
        ({"answer": 7}, "7", 1),
        ({"reference": "Rome", "answer": "Paris"}, "Rome", 0),  # `answer` goes first
        ({"reference": "Rome", "answer": None}, "Rome", 1),
        ({"reference": [{"role": "assistant", "content": "Rome"}]}, "Rome", 1),
        (
            {"reference": [{"role": "assistant", "content": [{"type": "text", "text": "Rome"}]}]},
            "Rome",
            1,
        ),
        ({"other": "Rome"}, "Rome", None),
    ],
)
def test_exact_compares_whole_texts(record, output, wanted):
    assert value("exact", record, output) == wanted


def test_a_field_can_be_named():
    record = {"answer": "a", "accept": ["b", "c"]}
    assert [value("exact:accept", record, text) for text in "abc"] == [0, 1, 1]


@pytest.mark.parametrize("bad", ["", "  ", [], ["a", ""], {"a": 1}, True, [None], [["a"]]])
def test_a_field_that_says_nothing_names_its_record(bad):
    with pytest.raises(RecordError, match=r"f.jsonl:7: field `answer`: `exact` takes"):
        value("exact", {"answer": bad}, "a")


def test_regex_is_searched_and_may_come_from_the_record():
    assert value(r"regex:\bParis\b", {}, "It is Paris.") == 1
    assert value(r"regex:^Paris$", {}, "It is Paris.") == 0
    assert value("regex:a:b", {}, "xa:bx") == 1  # only the first colon separates
    record = {"wanted": [r"\d{3}", "none"]}
    assert value("regex:@wanted", record, "room 101") == 1
    assert value("regex:@wanted", record, "room 10") == 0
    assert value("regex:@missing", record, "room 10") is None


def test_a_pattern_that_runs_away_is_an_error(monkeypatch):
    from polarctl.verifiers import rules

    monkeypatch.setattr(rules, "PATTERN_S", 0.2)
    with pytest.raises(RecordError, match=r"f.jsonl:7: .* took more than 0.2 s on an output of 60"):
        value(r"regex:(a|a)+(b|c|d)*x$", {}, "a" * 60)


@pytest.mark.parametrize(
    ("answer", "output", "wanted"),
    [
        (GSM8K, "48 + 24 = 72\n#### 72", 1),
        (GSM8K, "so the answer is 72.", 1),
        (GSM8K, "72 clips in May and 24 in April", 0),  # the last number is 24
        (GSM8K, "#### 70, not 72", 0),  # what follows the mark counts
        (GSM8K, "I cannot say", 0),
        (GSM8K, "the answer is 72 ####", 0),  # nothing follows the mark
        ("#### 1,234", "It costs $1,234.00", 1),
        ("#### 1,234", "1234", 1),
        ("#### -3", "#### \u22123", 1),
        ("#### 3", "10-3", 1),
        ("#### 0.5", "a share of .5", 1),
        ("#### 5", "a share of .5", 0),
        ("#### 3", "numbers 1,2,3", 1),
        (5, "5.0", 1),
        (["7", "8"], "8", 1),
    ],
)
def test_gsm8k_compares_numbers(answer, output, wanted):
    assert value("gsm8k", {"answer": answer}, output) == wanted


def test_gsm8k_wants_a_number_in_the_record():
    with pytest.raises(RecordError, match="`gsm8k` takes a text with a number"):
        value("gsm8k", {"answer": "seven"}, "7")


FORMS = [
    ("<think>so</think> yes", 1),
    ("  <think>\nso\n</think>\nyes", 1),
    ("<think>so</think>", 0),  # no answer
    ("<think>so</think>   ", 0),
    ("yes <think>so</think> yes", 0),
    ("<think>so yes", 0),
    ("so</think> yes", 0),
    ("<think>a<think>b</think> yes", 0),
    ("<think>a</think> yes <think>b</think>", 0),
    ("yes", 0),
]


@pytest.mark.parametrize(("output", "wanted"), FORMS)
def test_think_format_wants_one_thought_and_an_answer(output, wanted):
    assert value("think-format", {}, output) == wanted
    if output.startswith("<think>"):
        rest = output.removeprefix("<think>")
        assert value("think-format", {}, rest, thinking_opened=True) == wanted


def test_think_format_accepts_nothing_that_trl_refuses():
    from trl.rewards import think_format_reward

    theirs = think_format_reward([[{"content": text.strip()}] for text, _ in FORMS])
    assert all(ours <= his for (_, ours), his in zip(FORMS, theirs, strict=True))


def test_length_counts_characters():
    assert [value("length:4", {}, text) for text in ("abcd", "abcde", "\u00e9\u4e16\u754c!")] == [
        1,
        0,
        1,
    ]


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
}


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ('{"age": 3}', 1),
        (' {"age": 3.0}\n', 1),  # an integer, says JSON Schema
        ('{"age": -1}', 0),
        ('{"age": 3', 0),
        ('{"age": NaN}', 0),  # not JSON
        ('Sure: {"age": 3}', 0),
        ("[" * 5000, 0),
    ],
)
def test_json_schema_validates_the_output(output, wanted, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert value(f"json-schema:{path}", {}, output) == wanted
    assert value("json-schema:@schema", {"schema": SCHEMA}, output) == wanted
    assert value("json-schema:@schema", {"schema": json.dumps(SCHEMA)}, output) == wanted
    assert value("json-schema:@schema", {}, output) is None


def test_a_recursive_schema_has_an_end():
    nested = {
        "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
        "$ref": "#/$defs/n",
    }
    assert value("json-schema:@s", {"s": nested}, "[[], [[]]]") == 1
    assert value("json-schema:@s", {"s": nested}, "[" * 900 + "]" * 900) in (0, 1)


def test_a_schema_is_never_fetched():
    away = {"$ref": "http://127.0.0.1:9/schema.json"}
    with pytest.raises(RecordError, match="takes a schema that holds all it refers to"):
        value("json-schema:@s", {"s": away}, "{}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nonsense", "no verifier `nonsense`"),
        ("regex:(", "`regex:\\(` takes a pattern: missing \\)"),
        ("regex:", "says nothing after the colon"),
        ("length:no", "not a number of characters"),
        ("length:0", "not a number of characters"),
        ("think-format:x", "nothing follows"),
        ("json-schema:/nowhere.json", "/nowhere.json: No such file"),
        ("command:no-such-program-here", "no program `no-such-program-here`"),
        ("command:'", "No closing quotation"),
    ],
)
def test_a_wrong_name_is_a_usage_error(name, text):
    with pytest.raises(UsageError, match=text):
        open_verifier(name)


def test_a_wrong_schema_is_named(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "number", "minimum": "a"}')
    with pytest.raises(UsageError, match="takes a JSON Schema: 'a' is not of type 'number'"):
        open_verifier(f"json-schema:{path}")
    path.write_text("{")
    with pytest.raises(UsageError, match="takes a JSON Schema"):
        open_verifier(f"json-schema:{path}")


def test_which_verifiers_compare_with_the_record():
    with_truth = ["exact", "exact:x", "gsm8k", "math", "command:c", "regex:@x", "json-schema:@x"]
    without = ["regex:x", "think-format", "length:3", "json-schema:x", "polar"]
    assert [has_truth(name) for name in with_truth] == [True] * len(with_truth)
    assert [has_truth(name) for name in without] == [False] * len(without)
