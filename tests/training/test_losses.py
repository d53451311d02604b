"""The losses, against numbers worked out by hand."""

import math

import pytest
import torch

from polarctl.training.losses import PRESETS, Loss, barrier, bradley_terry, focal, l2


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


@pytest.mark.parametrize("function", [bradley_terry, focal])
def test_shapes_that_would_broadcast_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(3, 1\)"):
        function(torch.zeros(3), torch.zeros(3, 1))


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_focal_discounts_only_what_is_ranked_right() -> None:
    # d = ln 3: P = 3/4, weight (1 - 2 * 1/4)^2 = 1/4, loss 1/4 * ln(4/3).
    # d = -ln 3: P = 1/4 < 1/2, weight 1, loss ln 4. d = 0: weight 1, loss ln 2.
    chosen = doubles(math.log(3), -math.log(3), 0.0)
    expected = doubles(math.log(4 / 3) / 4, math.log(4), math.log(2))
    torch.testing.assert_close(focal(chosen, torch.zeros_like(chosen)), expected)


def test_focal_keeps_its_digits_where_the_pair_is_sure() -> None:
    # d = 20: P = 1 - e^-20 to first order, so weight (2 e^-20)^2 and loss 4 e^-60; as the
    # difference 1 - 2 (P - 1/2) a float32 would give 0.
    loss = focal(torch.tensor([20.0]), torch.tensor([0.0]))
    torch.testing.assert_close(loss, torch.tensor([4 * math.exp(-60)]), rtol=1e-5, atol=0)


def test_focal_has_the_right_slope_on_both_sides_of_one_half() -> None:
    chosen = doubles(-3.0, -0.7, 0.7, 3.0).requires_grad_()
    rejected = doubles(0.1, 0.0, 0.0, -0.1).requires_grad_()
    assert torch.autograd.gradcheck(focal, (chosen, rejected))
    # At d = -ln 3 the slope is that of Bradley-Terry, P - 1 = -3/4. At d = ln 3, with P = 3/4 and
    # Q = 1/4, d(-4 Q^2 log P) = 8 Q^2 P log P - 4 Q^3 = 3/8 ln(3/4) - 1/16.
    chosen = doubles(-math.log(3), math.log(3)).requires_grad_()
    focal(chosen, doubles(0.0, 0.0)).sum().backward()
    torch.testing.assert_close(chosen.grad, doubles(-0.75, 3 / 8 * math.log(3 / 4) - 1 / 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_focal_is_finite_at_any_difference(dtype) -> None:
    # bfloat16 has 10,000 as 9,984: the loss of a wrong pair is the difference itself.
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = focal(chosen, torch.zeros(2, dtype=dtype))
    loss.sum().backward()
    assert loss.tolist() == [0.0, -chosen[1].item()]
    assert chosen.grad is not None and chosen.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("rank", [bradley_terry, focal])
def test_a_margin_is_taken_off_the_difference(rank) -> None:
    # 2.5 - 1 - 1.5 = 0: as equal rewards, ln 2.
    for margin in (1.5, torch.tensor([1.5])):
        loss = rank(torch.tensor([2.5]), torch.tensor([1.0]), margin)
        torch.testing.assert_close(loss, torch.tensor([math.log(2)]))


def test_a_margin_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 1\) for rewards of \(3,\)"):
        bradley_terry(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))


def test_a_margin_of_another_type_changes_no_type() -> None:
    rewards = torch.zeros(1)
    assert bradley_terry(rewards, rewards, doubles(1.0)).dtype == torch.float32


def test_barrier_is_lowest_at_zero_and_stays_finite_beyond_its_limits() -> None:
    # -(ln 5 + ln 5) at 0; -(ln 9 + ln 1) at +-4; at and past +-5 as at 4.999:
    # -(ln 9.999 + ln 0.001).
    edge = -(math.log(9.999) + math.log(0.001))
    rewards = doubles(0.0, 4.0, -4.0, 5.0, 100.0, -1e4).requires_grad_()
    result = barrier(rewards)
    expected = doubles(-2 * math.log(5), -math.log(9), -math.log(9), edge, edge, edge)
    torch.testing.assert_close(result, expected)
    # Its slope, 1/(5 - x) - 1/(5 + x): at 4 it is 1 - 1/9. Clamped rewards feel none.
    result.sum().backward()
    torch.testing.assert_close(rewards.grad, doubles(0.0, 8 / 9, -8 / 9, 0.0, 0.0, 0.0))


def test_barrier_and_l2_compute_in_float32_at_least() -> None:
    # 4.999 is no bfloat16 and no float16: clamped there, the barrier would be infinite.
    for penalty in (barrier, l2):
        result = penalty(torch.tensor([6.0], dtype=torch.bfloat16))
        assert result.dtype == torch.float32 and result.isfinite().all()
        assert penalty(doubles(1.0)).dtype == torch.float64
    assert l2(torch.tensor([-3.0, 0.5])).tolist() == [9.0, 0.25]


def test_a_loss_adds_the_penalty_of_both_rewards_to_each_pair() -> None:
    # Rewards 2 and -1: ranking -log sigmoid(3) = ln(1 + e^-3); penalties 0.1 (4 + 1) = 0.5.
    loss = Loss(penalty="l2", penalty_weight=0.1)(doubles(2.0), doubles(-1.0))
    torch.testing.assert_close(loss, doubles(math.log1p(math.exp(-3)) + 0.5))


def test_the_margin_of_a_record_adds_to_the_constant_one() -> None:
    # Differences 3 and 1, margins 1 + 2 and 1 + 0: both at 0, ln 2 each.
    loss = Loss(margin=1.0)(doubles(3.0, 1.0), doubles(0.0, 0.0), doubles(2.0, 0.0))
    torch.testing.assert_close(loss, doubles(math.log(2), math.log(2)))


def test_presets_are_the_published_losses() -> None:
    # At rewards ln 3 and 0: P = 3/4, barrier b(x) = -(ln(5 + x) + ln(5 - x)).
    x = math.log(3)
    barriers = -(math.log(5 + x) + math.log(5 - x)) - 2 * math.log(5)
    ranked = math.log(4 / 3) / 4
    for name, expected in (
        ("polar", math.log(4 / 3)),
        ("internlm2", ranked + 0.02 * barriers),
        ("xtuner", ranked + 0.01 * barriers),
    ):
        torch.testing.assert_close(PRESETS[name](doubles(x), doubles(0.0)), doubles(expected))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranking": "hinge"}, "loss `hinge`: one of bradley-terry, focal"),
        ({"penalty": "l1"}, "penalty `l1`: one of none, barrier, l2"),
        ({"penalty_weight": -0.1}, "penalty weight -0.1: at least 0"),
    ],
)
def test_a_loss_that_does_not_exist_is_refused(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        Loss(**given)
