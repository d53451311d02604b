"""The training loop: schedule, order of data, exactness of the loss, what it learns."""

import math

import pytest
import torch

from polarctl import model
from polarctl.errors import PolarctlError
from polarctl.training import Hyperparameters, Trainer, batch_indices


def fresh(tiny_lm, seed=0):
    return model.create(config_path=str(tiny_lm), seed=seed)


def pairs_of(made, count, swap=False):
    """Pairs in which the chosen candidate repeats the reference."""
    result = []
    for i in range(count):
        words = ("yes", "no") if i % 2 else ("no", "yes")
        chosen, rejected = made.encoder.encode_pair(f"q{i}", words[0], words[0], words[1])
        result.append((rejected, chosen) if swap else (chosen, rejected))
    return result


def test_the_rate_rises_then_follows_a_cosine_to_a_tenth():
    plan = Hyperparameters(lr=1.0, batch_size=1, warmup=0.1)
    # 100 steps: 10 of warm-up (1/10 .. 10/10), then 0.1 + 0.9 * (1 + cos(pi * d / 90)) / 2
    assert plan.rate(0, 100) == pytest.approx(0.1)
    assert plan.rate(9, 100) == pytest.approx(1.0)
    assert plan.rate(10, 100) == pytest.approx(1.0)
    assert plan.rate(55, 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert plan.rate(99, 100) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))


def test_every_epoch_sees_every_triple_once_in_another_order():
    plan = Hyperparameters(lr=1.0, batch_size=4, epochs=2, seed=3)
    assert plan.steps(10) == 5
    seen = [i for step in range(5) for i in batch_indices(step, 10, plan)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_batch_may_be_larger_than_the_data():
    plan = Hyperparameters(lr=1.0, batch_size=7, max_steps=2)
    seen = [i for step in range(2) for i in batch_indices(step, 3, plan)]
    assert len(seen) == 14
    assert sorted(seen[:3]) == sorted(seen[3:6]) == [0, 1, 2]


def test_the_first_loss_is_ln_2(tiny_lm):
    made = fresh(tiny_lm)
    trainer = Trainer(made, Hyperparameters(lr=1e-3, batch_size=4, max_steps=1), 4)
    (log,) = trainer.train(pairs_of(made, 4))
    assert log.loss == pytest.approx(math.log(2))
    assert log.accuracy == 0.0  # equal rewards: a tie is wrong


@pytest.mark.parametrize("swap", [False, True])
def test_one_pair_can_be_overfitted_either_way(tiny_lm, swap):
    made = fresh(tiny_lm)
    pairs = pairs_of(made, 1, swap)
    trainer = Trainer(made, Hyperparameters(lr=3e-3, batch_size=1, max_steps=40), 1)
    *_, last = trainer.train(pairs)
    assert last.accuracy == 1.0 and last.loss < 0.05
    chosen, rejected = pairs_of(made, 1)[0]
    right, wrong = model.rewards(made.model, *model.pad([chosen, rejected], 0, "cpu")).tolist()
    assert (right > wrong) is not swap


def test_how_a_batch_is_cut_does_not_change_the_step(tiny_lm):
    weights = []
    for budget in (1, 100_000):
        made = fresh(tiny_lm)
        made.model.double()
        torch.nn.init.normal_(made.model.score.weight, generator=torch.manual_seed(5))
        plan = Hyperparameters(lr=1e-2, batch_size=8, max_steps=2, batch_tokens=budget)
        trainer = Trainer(made, plan, 8)
        losses = [log.loss for log in trainer.train(pairs_of(made, 8))]
        weights.append((losses, torch.cat([p.flatten() for p in made.model.parameters()])))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-6)
    assert torch.allclose(weights[0][1], weights[1][1], rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny_lm):
    made = fresh(tiny_lm)
    trainer = Trainer(made, Hyperparameters(lr=1e-3, batch_size=2, max_steps=3), 2)
    run = trainer.train(pairs_of(made, 2))
    next(run)
    with torch.no_grad():
        made.model.score.weight[0, 0] = math.nan
    before = [p.clone() for p in made.model.parameters()]
    with pytest.raises(PolarctlError, match="not finite"):
        next(run)
    after = list(made.model.parameters())
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(before, after, strict=True)
    )
