"""What a reply has to be to count as rewards, without a server: each shape by hand."""

import math

import pytest

from polarctl.parallel.http_client import Fault
from polarctl.scoring.server import rewards_in


def vllm(*values, order=None):
    places = order or range(len(values))
    rows = [{"index": place, "probs": [values[place]]} for place in places]
    return {"data": rows}


def lmdeploy(*values):
    return {"data": [{"index": place, "data": value} for place, value in enumerate(values)]}


def sglang(*values):
    return [{"embedding": [value]} for value in values]


SHAPES = {"vllm": vllm, "lmdeploy": lmdeploy, "sglang": sglang}


@pytest.mark.parametrize("kind", SHAPES)
def test_numbers_are_rewards(kind):
    assert rewards_in(kind, SHAPES[kind](1.5, -2, 0.0), 3) == [1.5, -2.0, 0.0]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "value",
    [True, False, None, "1.5", "", [], [1.0, 2.0], [[1.0]], {}, math.nan, math.inf, 10**400],
)
def test_what_is_no_reward_is_a_fault(kind, value):
    with pytest.raises(Fault):
        rewards_in(kind, SHAPES[kind](1.0, value), 2)


def test_the_index_says_which_reward_is_whose():
    assert rewards_in("vllm", vllm(0.5, 1.5, 2.5, order=[2, 0, 1]), 3) == [0.5, 1.5, 2.5]


@pytest.mark.parametrize("places", [[0, 0], [1, 2], [0, "1"], [False, True], [0, 1.0], [0, None]])
def test_an_index_that_does_not_name_each_input_once_is_a_fault(places):
    rows = [{"index": place, "probs": [1.0]} for place in places]
    with pytest.raises(Fault):
        rewards_in("vllm", {"data": rows}, 2)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_rewards_is_a_fault(kind, count):
    with pytest.raises(Fault):
        rewards_in(kind, SHAPES[kind](*[1.0] * count), 2)
