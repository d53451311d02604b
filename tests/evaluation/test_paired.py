"""Paired comparisons against exact arithmetic and plain loops."""

import math
import random
from fractions import Fraction

import pytest

from polarctl.evaluation.paired import (
    Sheet,
    difference,
    matched,
    mcnemar,
    sign,
    unmatched,
    unpaired,
)
from polarctl.records import Record


def test_mcnemar_by_hand():
    # 1 against 9: 2 (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    # 3 against 3: 2 (1 + 6 + 15 + 20) / 64 is above 1
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)


@pytest.mark.parametrize(("a", "b"), [(7, 30), (400, 500), (900, 1400)])
def test_mcnemar_of_many_items_is_exact(a, b):
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    exact = min(Fraction(1), 2 * Fraction(tail, 2 ** (a + b)))
    assert mcnemar(a, b) == pytest.approx(float(exact), rel=1e-9)


def sheet(name, rights, **more):
    """One pair per prompt, right or wrong."""
    made = Sheet(name)
    for i, right in enumerate(rights):
        row = {"prompt": f"q{i}", "chosen": "a", "rejected": "b", "rewards": [int(right), 0.5]}
        made.add(Record({**row, **more}), "category")
    return made


def test_the_difference_and_its_interval_agree_with_a_loop_that_draws_prompts():
    rng = random.Random(0)
    first = [rng.random() < 0.6 for _ in range(200)]
    second = [right if rng.random() < 0.8 else rng.random() < 0.8 for right in first]
    a, b = sheet("a", first), sheet("b", second)
    found = difference(a, b, matched([a, b]), 0)
    steps = [y - x for x, y in zip(first, second, strict=True)]
    assert found["value"] == pytest.approx(sum(steps) / 200)
    assert (found["first_only"], found["second_only"]) == (steps.count(-1), steps.count(1))
    drawn = sorted(sum(rng.choices(steps, k=200)) / 200 for _ in range(4000))
    assert found["low"] == pytest.approx(drawn[100], abs=0.012)
    assert found["high"] == pytest.approx(drawn[3899], abs=0.012)
    assert found["p"] == mcnemar(steps.count(-1), steps.count(1))
    # Unpaired, the same two accuracies have a wider interval.
    alone = [sum(first) / 200, sum(second) / 200]
    error = math.sqrt(sum(p * (1 - p) / 200 for p in alone))
    assert found["high"] - found["low"] < 2 * 1.96 * error * 0.8


def test_two_that_agree_on_all_of_100_items_could_differ_on_3_6_percent():
    """1 - 0.025^(1/100) = 0.036217: a share of differing items that 100 miss once in 40."""
    a = sheet("a", [True, False] * 50)
    found = difference(a, sheet("b", [True, False] * 50), list(a.items), 0)
    assert (found["value"], found["p"]) == (0, 1)
    assert found["high"] == pytest.approx(0.036217, abs=1e-6) and found["low"] == -found["high"]


def test_four_of_twenty_that_differ_are_no_proof():
    """No draw of 20 misses all four with probability 0.8^20 = 1.2 %, so the interval is above 0.

    But four coins fall the same way with probability 2 / 16: no difference can be told.
    """
    a, b = sheet("a", [False] * 4 + [True] * 16), sheet("b", [True] * 20)
    found = difference(a, b, list(a.items), 0)
    assert found["low"] > 0 and found["p"] == 0.125 and sign(found) == 0
    six = sheet("c", [False] * 6 + [True] * 14)  # 2 / 64
    assert sign(difference(six, b, list(b.items), 0)) == 1
    assert sign(difference(b, six, list(b.items), 0)) == -1


def test_items_are_matched_by_id_and_content():
    def add(to, name, chosen, rewards=(1, 0)):
        row = {"id": name, "prompt": "q", "chosen": chosen, "rejected": "b", "rewards": rewards}
        to.add(Record(row), "category")

    a, b = Sheet("a"), Sheet("b")
    for name, chosen in (("1", "x"), ("2", "x"), ("3", "x"), ("4", "x"), ("4", "x")):
        add(a, name, chosen)
    for name, chosen in (("4", "x"), ("1", "x"), ("2", "other"), ("5", "x")):
        add(b, name, chosen)
    common = matched([a, b])
    # 1, and the first of the two equal ones of 4
    assert [key[0] for key in common] == ["1", "4"]
    # of a: 3 is absent; 2 and the second 4 have an id of b; of b: 5 is absent, 2 is changed
    assert unmatched([a, b], common) == [{"absent": 1, "content": 2}, {"absent": 1, "content": 1}]


def test_a_reference_may_differ_and_a_label_not():
    group = {
        "prompt": "q",
        "candidates": [{"output": "a", "label": 1}, {"output": "b", "label": 0}],
    }
    a, b, c = Sheet("a"), Sheet("b"), Sheet("c")
    a.add(Record({**group, "rewards": [1, 0]}), "x")
    b.add(Record({**group, "reference": "r", "rewards": [0, 1]}), "x")
    turned = [{"output": "a", "label": 0}, {"output": "b", "label": 1}]
    c.add(Record({**group, "candidates": turned, "rewards": [0, 1]}), "x")
    assert len(matched([a, b])) == 1 and matched([a, c]) == []


def test_two_separate_figures_by_newcombes_method():
    """His example: 56/70 against 48/80, Wilson's intervals: 0.6 - 0.8 by our order of subtraction.

    Newcombe's table II, method 10, case (a): 0.2 with limits 0.0524 and 0.3339.
    """
    first = {"value": 56 / 70, "low": 0.6916, "high": 0.8769}
    second = {"value": 48 / 80, "low": 0.4904, "high": 0.7004}
    low, high = unpaired(first, second)
    assert (-high, -low) == (pytest.approx(0.0524, abs=2e-4), pytest.approx(0.3339, abs=2e-4))
