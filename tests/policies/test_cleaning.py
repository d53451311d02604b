import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarctl.policies.cleaning import clean, cut_incomplete, cut_loop

# Written by hand before the rules: text, what ended it, what is to be left and to be said.
CASES = [json.loads(line) for line in Path(__file__).with_name("cleaning.jsonl").open("rb")]
# What a language model of two layers wrote greedily after 60 and 200 steps of training on maths
# problems: loops, and lines that come again and are none.
REAL = [json.loads(line) for line in Path(__file__).with_name("loops.jsonl").open("rb")]
SENTENCE = "The dog barks at the moon. "  # 27 characters


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        # 4 x 27 = 108 >= 100 characters: a loop, kept once.
        ("It is late. " + SENTENCE * 4, "It is late. The dog barks at the moon."),
        # The limit cut the last round; the periodic part starts at the full stop before it.
        ("I am. " + "I like cats. " * 9 + "I like", "I am. I like cats."),
        ("a is a cat" + " is a cat" * 20, "a is a cat"),
        ("code:\n" + "    x = 1\n" * 12 + "    x", "code:\n    x = 1"),
        ("猫が好き。" * 30, "猫が好き。"),
        ("so" + "\n" * 200, "so"),
        ("=" * 100, "="),
        # The loop ends with a line break of its own.
        ("Ends. " + SENTENCE * 5 + "\n", "Ends. The dog barks at the moon."),
        # A unit of 135 characters is a loop at three rounds.
        ("A. " + (SENTENCE[:-2] + ", and " + "x" * 103 + ". ") * 3, None),
    ],
)
def test_a_loop_is_cut_and_its_unit_kept_once(text, kept):
    if kept is None:
        kept = text[: 3 + (len(text) - 3) // 3].rstrip()
    assert cut_loop(text) == (kept, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is late. " + SENTENCE * 3,  # three rounds of a short unit
        "ha " * 20,  # 60 characters
        "-" * 80,  # a ruler
        SENTENCE * 5 + "Then it slept.",  # the loop was left
        "\n".join(f"{n}. item" for n in range(60)),
        "no." + "\n" * 20,
    ],
)
def test_what_is_no_loop_stays(text):
    assert cut_loop(text) == (text, False)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two is 3.14 and", "One."),
        ('He said "go." Then she', 'He said "go."'),
        ("Really?! I doubt", "Really?!"),
        ("日本です。東京は", "日本です。"),
        ("他说：“好。”然后", "他说：“好。”"),
        ("A title without a stop\n\nAnd so", "A title without a stop"),
        # The sentence end would drop more than half: whole lines count.
        ("Fruit. " + "- apples and pears\n" * 3 + "- pl", "Fruit. " + "- apples and pears\n" * 3),
        ("Items:\n1. one\n2. tw", "Items:\n1. one"),
        # In code a full stop ends nothing.
        ("Ok. So:\n```py\nx = 1. \ny =", "Ok. So:\n```py\nx = 1."),
        ("no stop but wor", "no stop but"),
    ],
)
def test_an_incomplete_ending_goes_back_to_the_last_whole_sentence(text, kept):
    assert cut_incomplete(text, "length") == (kept.rstrip(), True)


@pytest.mark.parametrize(
    "text",
    ["", "  ", "word", "It ends here.", "It ends here. ", "終わり。", "- a line\n", "Yes (it is.)"],
)
def test_a_complete_ending_stays(text):
    assert cut_incomplete(text, "length") == (text, False)


def test_what_the_policy_ended_itself_is_not_incomplete():
    assert clean("no stop but wor", "stop") == ("no stop but wor", [])
    assert clean("no stop but wor", "length") == ("no stop but", ["incomplete"])


def test_a_looping_text_is_cut_at_the_loop_alone():
    assert clean("It rains " + "and rains " * 30, "length") == ("It rains and", ["loop"])


def test_every_case_written_by_hand_and_every_loop_of_a_small_model():
    assert len(CASES) >= 200 and len(REAL) >= 10
    wrong = {}
    for case in CASES + REAL:
        got = clean(case["input"], case["finish_reason"])
        if got != (case["expected"], case["marks"]):
            wrong[case["about"]] = got
    assert wrong == {}


def test_cleaning_again_changes_nothing():
    for case in CASES:
        marks = [mark for mark in case["marks"] if mark == "refusal"]
        assert clean(case["expected"], "stop") == (case["expected"], marks)


@settings(deadline=None, max_examples=80)
@given(st.text("ab. \n。`1", max_size=300), st.sampled_from(["stop", "length"]))
def test_cleaning_only_ever_cuts_the_end(text, finish_reason):
    kept, marks = clean(text, finish_reason)
    assert text.startswith(kept)
    assert bool(marks) == (kept != text)


@settings(deadline=None, max_examples=50)
@given(st.text("abc ", min_size=1, max_size=40), st.integers(0, 39))
def test_every_loop_of_a_hundred_characters_is_found(unit, extra):
    rounds = 100 // len(unit) + 4
    kept, looped = cut_loop("#" + unit * rounds + unit[: extra % len(unit)])
    assert looped
    assert len(kept) <= 1 + 2 * len(unit)


@pytest.mark.parametrize(
    "text",
    [
        "ab" * 20_000 + "x",
        "a" * 40_000,
        "ab " * 13_000,
        "x. " * 13_000,
        *(unit * (40_000 // len(unit)) + "y" for unit in ("Dr. ", "`a", "$$a", "Dr. `a` ", "A:\n")),
        "".join(f"{n}. A: {n}\n" for n in range(4_000)),
        "".join(f"```\n{n}. X\n" for n in range(3_001)),
        "".join(f"a{n}. b\n" for n in range(6_000)),
    ],
)
def test_time_is_linear(text):
    start = time.process_time()
    clean(text, "length")
    assert time.process_time() - start < 1  # measured: 0.03 s; the square would take minutes
