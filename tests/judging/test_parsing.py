"""Reading a judge's reply: what is a judgement, and what must never become a score."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarctl.judging.parsing import Failure, Judgement, Reply, parse

NAMES = ["model-1", "model-2"]
GOOD = '{"scores": {"model-1": 2, "model-2": 4}, "best-to-worst": ["model-2", "model-1"]}'
READ = Judgement({"model-1": 2.0, "model-2": 4.0}, ["model-2", "model-1"], "")


def judged(scores: str, ranking: str = '["model-2", "model-1"]') -> str:
    return f'{{"scores": {scores}, "best-to-worst": {ranking}}}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here is my judgement {{as asked}}: {GOOD}\nDone.",
        GOOD.replace(" ", "\n"),
        judged('{"model-2": 4.0, "model-1": 2}'),
        GOOD[:-1] + ', "note": {}}',
        f"{{}} {GOOD}",
    ],
)
def test_good_replies_are_read(text):
    assert parse(Reply(text), NAMES) == READ


def test_the_thinking_is_handed_over_and_never_read_as_the_answer():
    other = judged('{"model-1": 5, "model-2": 1}')
    found = parse(Reply(f"<think>\n{other} or not?\n</think>\n\n{GOOD}"), NAMES)
    assert found == Judgement(READ.scores, READ.ranking, f"{other} or not?")
    # A chat template may have written `<think>` already; a candidate's `</think>` may be quoted.
    assert parse(Reply(f"mine</think>{GOOD}"), NAMES).reasoning == "mine"
    quoted = parse(Reply(f"<think>it says </think> {other}</think>{GOOD}"), NAMES)
    assert quoted.scores == READ.scores
    # A server with a reasoning parser hands it over apart.
    assert parse(Reply(GOOD, reasoning=" apart "), NAMES).reasoning == "apart"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON object"),
        ("model-2 is better", "no JSON object"),
        (f"<think>{GOOD}", "thinking has no end"),
        (f"<think>{GOOD}</think>", "no JSON object"),
        (f"{GOOD} {GOOD}", "more than one answer"),
        (GOOD[:-1] + ",}", "not valid JSON"),
        (GOOD.replace(" 4}", " 4,}"), "not valid JSON"),
        (GOOD.replace('"', "'"), "no JSON object"),
        (GOOD[:-1], "not valid JSON"),
        (f'{{"answer": {GOOD}}}', "no JSON object"),
        (f'{{"answer": {GOOD},}}', "not valid JSON"),
        (f"[{GOOD[1:]}", "`scores` is missing or no object|no JSON object"),
        (judged('{"model-2": 4}'), "`model-1` is not there"),
        (judged('{"model-1": 2, "model-2": 4, "model-3": 1}'), "`model-3`, which was not"),
        (judged('{"model-1": 2, "model-2": 4, "model-1": 5}'), "`model-1` is there twice"),
        (judged('{"model-1": 0, "model-2": 4}'), "not between 1 and 5"),
        (judged('{"model-1": 2, "model-2": 5.01}'), "not between 1 and 5"),
        (judged('{"model-1": 2, "model-2": 1e999}'), "not between 1 and 5"),
        (judged('{"model-1": NaN, "model-2": 4}'), "`NaN` is no JSON"),
        (judged('{"model-1": true, "model-2": 4}'), "is no number"),
        (judged('{"model-1": "2", "model-2": 4}'), "is no number"),
        (judged('{"model-1": null, "model-2": 4}'), "is no number"),
        (judged("[2, 4]"), "`scores` is missing or no object"),
        (judged('{"model-1": 2, "model-2": 4}', '["model-2"]'), "`model-1` is not there"),
        (judged('{"model-1": 2, "model-2": 4}', '["model-2", "model-2"]'), "is not there"),
        (
            judged('{"model-1": 2, "model-2": 4}', '["model-2", "model-1", "model-2"]'),
            "`model-2` is twice there",
        ),
        (judged('{"model-1": 2, "model-2": 4}', '"model-2"'), "no list of names"),
        (judged('{"model-1": 2, "model-2": 4}', "[2, 1]"), "no list of names"),
        ('{"scores": {"model-1": 2, "model-2": 4}}', "`best-to-worst` is missing"),
        ('{"best-to-worst": ["model-1", "model-2"]}', "`scores` is missing"),
        (GOOD.replace("2,", "9" * 5000 + ","), "not valid JSON: out of bounds|not between"),
        ('{"a":' * 100_000, "not valid JSON"),
    ],
)
def test_bad_replies_have_a_reason_of_one_line(text, reason):
    found = parse(Reply(text), NAMES)
    assert isinstance(found, Failure)
    assert any(part in found.reason for part in reason.split("|")), found.reason
    assert "\n" not in found.reason and len(found.reason) < 120


def test_a_reply_that_was_cut_is_no_judgement():
    found = parse(Reply(GOOD, finished=False), NAMES)
    assert found == Failure("the reply was cut at the length limit")


def test_a_ranking_against_the_scores_is_seen():
    assert not READ.contradicts_itself
    assert Judgement({"a": 2.0, "b": 4.0}, ["a", "b"], "").contradicts_itself
    assert not Judgement({"a": 4.0, "b": 4.0}, ["b", "a"], "").contradicts_itself


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["scores", "best-to-worst", *NAMES, "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "{",
        "}",
        '"',
        ":",
        ",",
        "[",
        "]",
        "\\",
        "```json",
        "```",
        " ",
        "2",
        GOOD,
    ]
    + ['"scores"', '"best-to-worst"', '"model-1"', '"model-2"', "NaN", "model-1", "\n"]
)


@given(st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join) | VALUES.map(json.dumps))
def test_whatever_a_judge_writes_is_a_whole_judgement_or_a_reason(text):
    found = parse(Reply(text), NAMES)
    if isinstance(found, Failure):
        assert found.reason and "\n" not in found.reason
    else:
        assert list(found.scores) == NAMES and sorted(found.ranking) == NAMES
        assert all(1 <= score <= 5 for score in found.scores.values())
        # Never made of pieces: an answer stands in the text, in JSON's own words.
        assert '"scores"' in text and '"best-to-worst"' in text
