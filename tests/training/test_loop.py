"""The training loop: schedule, exactness of the loss, what it learns."""

import itertools
import math
from dataclasses import dataclass

import accelerate
import pytest
import torch

from polarctl.model import reward_model
from polarctl.model.forward import Packed, Padded
from polarctl.training import losses
from polarctl.training.engine import PlainEngine
from polarctl.training.loop import Hyperparameters, NotFinite, Trainer, share_before, steps_of


@dataclass(frozen=True)
class Group:
    ids: tuple
    margin: float = 0.0


def groups_of(made, count, negatives=1, swap=False):
    """Groups in which the chosen candidate repeats the reference."""
    result = []
    for i in range(count):
        right, wrong = ("yes", "no") if i % 2 else ("no", "yes")
        others = [wrong, "perhaps", "never " * (i % 3 + 1)][:negatives]
        found = [e.ids for e in made.encoder.report_group(f"q{i}", right, [right, *others])]
        result.append(Group(tuple(found[::-1] if swap else found)))
    return result


def trainer_of(tiny_lm, plan, *, double=False, head=None):
    made = reward_model.create(config_path=str(tiny_lm))
    if double:
        made.model.double()
    if head is not None:
        torch.nn.init.normal_(made.model.score.weight, generator=torch.manual_seed(head))
    module = Packed(made.model) if plan.shared else Padded(made.model)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay
    )
    engine = PlainEngine(accelerate.Accelerator(cpu=True), module, optimizer, plan.clip)
    return made, Trainer(engine, plan, made.tokenizer.pad_token_id)


def test_the_rate_rises_then_follows_a_cosine_to_a_tenth():
    plan = Hyperparameters(lr=1.0, batch_size=1, warmup=0.1, steps=100)
    # 100 steps: 10 of warm-up (1/10 .. 10/10), then 0.1 + 0.9 * (1 + cos(pi * d / 90)) / 2
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(9) == pytest.approx(1.0)
    assert plan.rate(10) == pytest.approx(1.0)
    assert plan.rate(55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert plan.rate(99) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))


def test_steps_fill_the_last_batch_up():
    assert steps_of(10, 2, 4) == 5
    assert steps_of(10, 1, 4) == 3  # 12 groups: the last two from the next epoch
    assert steps_of(3, 0.1, 8) == 1


def test_processes_take_turns_and_use_every_group_once():
    for processes, size in ((1, 4), (2, 4), (3, 5), (4, 6)):
        for step in range(5):
            shares = [
                share_before(step + 1, size, processes, rank)
                - share_before(step, size, processes, rank)
                for rank in range(processes)
            ]
            assert sum(shares) == size and max(shares) - min(shares) <= 1
    # Positions 0..4 and 5..9 dealt to two: 0 2 4 | 1 3, then 6 8 | 5 7 9.
    assert [share_before(s, 5, 2, 0) for s in range(3)] == [0, 3, 5]
    assert [share_before(s, 5, 2, 1) for s in range(3)] == [0, 2, 5]


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_loss_is_ln_2(tiny_lm, shared):
    plan = Hyperparameters(lr=1e-3, batch_size=4, steps=1, shared=shared)
    made, trainer = trainer_of(tiny_lm, plan)
    (log,) = trainer.train(iter(groups_of(made, 4)))
    assert log.loss == pytest.approx(math.log(2))
    assert log.accuracy == 0.0  # equal rewards: a tie is wrong


@pytest.mark.parametrize("swap", [False, True])
def test_one_pair_can_be_overfitted_either_way(tiny_lm, swap):
    plan = Hyperparameters(lr=3e-3, batch_size=1, steps=40)
    made, trainer = trainer_of(tiny_lm, plan)
    *_, last = trainer.train(itertools.cycle(groups_of(made, 1, swap=swap)))
    assert last.accuracy == 1.0 and last.loss < 0.05
    trainer.engine.module.restore()
    ((chosen, rejected),) = [group.ids for group in groups_of(made, 1)]
    right, wrong = reward_model.rewards(
        made.model, *reward_model.pad([chosen, rejected], 0, "cpu")
    ).tolist()
    assert (right > wrong) is not swap


@pytest.mark.parametrize("negatives", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_how_a_batch_is_cut_and_shared_does_not_change_the_steps(tiny_lm, negatives):
    found = []
    for budget, shared in ((1, True), (60, True), (100_000, True), (1, False), (200, False)):
        plan = Hyperparameters(lr=1e-3, batch_size=8, steps=2, batch_tokens=budget, shared=shared)
        made, trainer = trainer_of(tiny_lm, plan, double=True, head=5)
        logs = list(trainer.train(itertools.cycle(groups_of(made, 8, negatives))))
        figures = [(log.loss, log.grad_norm, log.tokens) for log in logs]
        found.append((figures, torch.cat([p.flatten() for p in made.model.parameters()])))
    for figures, weights in found[1:]:
        for ours, first in zip(figures, found[0][0], strict=True):
            assert ours == pytest.approx(first, rel=1e-5)  # norms compute in float32
        assert torch.allclose(weights, found[0][1], rtol=0, atol=1e-5)


def test_several_negatives_count_by_the_mean_of_their_pairs(tiny_lm):
    plan = Hyperparameters(lr=1e-3, batch_size=2, steps=1)
    made, trainer = trainer_of(tiny_lm, plan, double=True, head=5)
    groups = groups_of(made, 2, negatives=3)
    trainer.engine.module.restore()
    wanted = 0.0
    for group in groups:
        r = reward_model.rewards(made.model, *reward_model.pad(group.ids, 0, "cpu")).detach()
        wanted += sum(losses.bradley_terry(r[:1], r[k : k + 1]).item() for k in (1, 2, 3)) / 3 / 2
    _, again = trainer_of(tiny_lm, plan, double=True, head=5)
    (log,) = again.train(iter(groups))
    assert log.loss == pytest.approx(wanted, rel=1e-9)


def test_tokens_are_counted_as_sequences_and_as_computed(tiny_lm):
    plan = Hyperparameters(lr=1e-3, batch_size=2, steps=1)
    _, trainer = trainer_of(tiny_lm, plan)
    groups = [Group(([1, 2, 3, 4], [1, 2, 5])), Group(([6, 7], [8, 9]))]
    (log,) = trainer.train(iter(groups))
    assert (log.tokens, log.computed) == (4 + 3 + 2 + 2, 2 + 2 + 1 + 4)


def test_a_records_margin_is_added(tiny_lm):
    plan = Hyperparameters(lr=1e-3, batch_size=1, steps=1, loss=losses.Loss(margin=0.5))
    made, trainer = trainer_of(tiny_lm, plan)
    ids = groups_of(made, 1)[0].ids
    (log,) = trainer.train(iter([Group(ids, margin=1.5)]))
    # Equal rewards: -log sigmoid(0 - 2) = log(1 + e^2)
    assert log.loss == pytest.approx(math.log(1 + math.exp(2)))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny_lm):
    plan = Hyperparameters(lr=1e-3, batch_size=2, steps=3)
    made, trainer = trainer_of(tiny_lm, plan)
    run = trainer.train(itertools.cycle(groups_of(made, 2)))
    next(run)
    with torch.no_grad():
        made.model.score.weight[0, 0] = math.nan
    before = [p.clone() for p in made.model.parameters()]
    with pytest.raises(NotFinite, match="step 2: loss nan") as caught:
        next(run)
    assert caught.value.figures["loss"] == "nan"
    for a, b in zip(before, made.model.parameters(), strict=True):
        assert torch.equal(a, b) or b.isnan().any()


def test_evaluation_measures_and_changes_nothing(tiny_lm):
    plan = Hyperparameters(lr=3e-3, batch_size=4, steps=30)
    made, trainer = trainer_of(tiny_lm, plan)
    groups = groups_of(made, 4)
    assert trainer.evaluate(groups) == (pytest.approx(math.log(2)), 0.0)
    *_, last = trainer.train(itertools.cycle(groups))
    before = [p.clone() for p in made.model.parameters()]
    loss, accuracy = trainer.evaluate(groups)
    assert accuracy == 1.0 and loss < last.loss < math.log(2)
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
