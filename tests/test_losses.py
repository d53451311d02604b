"""The Bradley-Terry loss and the accuracy, against numbers worked out by hand."""

import math

import pytest
import torch

from polarctl.losses import accuracy, bradley_terry


def test_equal_rewards_cost_ln_2_per_pair() -> None:
    # -log sigmoid(0) = -log(1/2) = ln 2: the first loss of a zero-initialised head.
    loss = bradley_terry(torch.zeros(3), torch.zeros(3))
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)))


def test_loss_is_the_negative_log_probability_of_the_chosen() -> None:
    # A difference of ln 3: sigmoid = 3 / (3 + 1) = 0.75, loss = ln(4/3) = 0.287682.
    # A difference of -ln 3: sigmoid = 1 / (1 + 3) = 0.25, loss = ln 4 = 1.386294.
    chosen = torch.tensor([math.log(3) - 5, -5.0])
    rejected = torch.tensor([-5.0, math.log(3) - 5])
    torch.testing.assert_close(bradley_terry(chosen, rejected), torch.tensor([0.287682, 1.386294]))


def test_loss_stays_finite_and_keeps_its_slope_far_from_zero() -> None:
    # For a difference d << 0 the loss is -d and its derivative by the chosen reward is -1.
    chosen = torch.tensor([-1000.0], requires_grad=True)
    loss = bradley_terry(chosen, torch.tensor([1000.0]))
    loss.sum().backward()
    assert loss.item() == 2000.0
    assert chosen.grad is not None and chosen.grad.item() == -1.0


def test_gradient_is_sigmoid_minus_one() -> None:
    # d/dc -log sigmoid(c - r) = sigmoid(c - r) - 1; at a difference of ln 3 it is 0.75 - 1.
    chosen = torch.tensor([math.log(3)], dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    bradley_terry(chosen, rejected).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.25], dtype=torch.float64))
    torch.testing.assert_close(rejected.grad, torch.tensor([0.25], dtype=torch.float64))


def test_half_precision_rewards_are_subtracted_in_float32() -> None:
    # Near 8 the bfloat16 step is 1/16 and near 0.03 it is finer than 1/4096, so 8 + 1/64 does not
    # fit into bfloat16 (it rounds to 8) while float32 keeps it: d = 8 + 1/64.
    chosen = torch.tensor([8.0], dtype=torch.bfloat16)
    rejected = torch.tensor([-1 / 64], dtype=torch.bfloat16)
    loss = bradley_terry(chosen, rejected)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-(8 + 1 / 64)))]))


def test_double_precision_is_kept() -> None:
    zeros = torch.zeros(1, dtype=torch.float64)
    assert bradley_terry(zeros, zeros).dtype == torch.float64


def test_accuracy_counts_a_tie_and_a_nan_as_wrong() -> None:
    # Right, tie, wrong, NaN: 1 of 4.
    chosen = torch.tensor([1.0, 2.0, -3.0, math.nan])
    rejected = torch.tensor([0.5, 2.0, -2.0, 0.0])
    result = accuracy(chosen, rejected)
    assert result.shape == ()
    assert result.item() == 0.25


@pytest.mark.parametrize("function", [bradley_terry, accuracy])
def test_shapes_that_would_broadcast_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(3, 1\)"):
        function(torch.zeros(3), torch.zeros(3, 1))
