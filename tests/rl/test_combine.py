"""Several rewards made one, by hand."""

import math

import pytest

from polarctl.errors import PolarctlError
from polarctl.rl.combine import combined, overlong_penalty
from polarctl.rl.rollouts import distinct

WEIGHTS = {"polar": 0.5, "exact": 2.0, "length:9": 1.0}
SETS = {"gates": frozenset({"exact"}), "models": frozenset({"polar"})}


def test_sum_weighs_what_applies():
    values = {"polar": [-4.0, -2.0], "exact": [0.0, 1.0], "length:9": [1.0, 0.0]}
    # 0.5 * -4 + 2 * 0 + 1 = -1;  0.5 * -2 + 2 * 1 + 0 = 1
    assert combined(values, WEIGHTS, "sum") == [-1.0, 1.0]
    values["exact"] = [None, None]
    assert combined(values, WEIGHTS, "sum") == [-1.0, -1.0]


def test_gate_takes_the_verifier_where_there_is_truth():
    values = {"polar": [-4.0, -2.0], "exact": [0.0, 1.0], "length:9": [1.0, 0.0]}
    # exact and the form, without the model: 2 * 0 + 1;  2 * 1 + 0
    assert combined(values, WEIGHTS, "gate", **SETS) == [1.0, 2.0]
    values["exact"] = [None, None]
    # the model and the form: 0.5 * -4 + 1;  0.5 * -2 + 0
    assert combined(values, WEIGHTS, "gate", **SETS) == [-1.0, -1.0]


def test_zsum_adds_distances_from_the_groups_mean():
    values = {"polar": [-4.0, -2.0, -3.0], "exact": [1.0, 0.0, 0.0], "length:9": [1.0, 1.0, 1.0]}
    # polar: mean -3, sd sqrt(2/3); exact: mean 1/3, sd sqrt(2)/3, so z = sqrt(2), -1/sqrt(2) twice
    wide, root = math.sqrt(1.5), math.sqrt(2)
    wanted = [-0.5 * wide + 2 * root, 0.5 * wide - root, -root]
    assert combined(values, WEIGHTS, "zsum") == pytest.approx(wanted)
    assert combined({"polar": [3.0]}, WEIGHTS, "zsum") == [0.0]


@pytest.mark.parametrize("how", ["sum", "gate", "zsum"])
def test_a_group_is_rewarded_by_one_source(how):
    values = {"polar": [-4.0, -2.0], "exact": [None, 1.0]}
    with pytest.raises(PolarctlError, match="`exact` applies to 1 of 2 rollouts of one prompt"):
        combined(values, WEIGHTS, how, **SETS)
    with pytest.raises(PolarctlError, match=r"none of the rewards applies \(polar, exact\)"):
        combined({"polar": [None] * 2, "exact": [None] * 2}, WEIGHTS, how, **SETS)


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(1, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)]
)
def test_the_overlong_penalty_is_dapos(tokens, wanted):
    from trl.rewards import get_soft_overlong_punishment

    assert overlong_penalty(tokens, 100, 20) == pytest.approx(wanted)
    (theirs,) = get_soft_overlong_punishment(100, 20)(completion_ids=[[0] * tokens])
    assert overlong_penalty(tokens, 100, 20) == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("text", "one", "two"),
    [
        ("a b c", 1, 1),
        ("a b a b", 2 / 4, 2 / 3),  # words a b; pairs ab ba ab
        ("think think think think", 1 / 4, 1 / 3),
        ("one", 1, None),
        (" \n", None, None),
    ],
)
def test_distinct_counts_different_words_and_pairs(text, one, two):
    assert distinct(text, 1) == one
    assert distinct(text, 2) == two
