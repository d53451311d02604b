"""Scoring: order, groups, batches under a budget, no silent failure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarctl.errors import PolarctlError, RecordError
from polarctl.records import Record
from polarctl.scoring import (
    Item,
    Scored,
    kind_of_scorable,
    require_reference,
    score_records,
    token_batches,
)


class LengthScorer:
    """An engine whose reward can be computed by eye: length of output minus length of reference."""

    def score(self, items: list[Item]) -> list[Scored]:
        return [Scored(float(len(i.output) - len(i.reference)), 1, ()) for i in items]


@given(st.lists(st.integers(1, 50)), st.integers(1, 120))
def test_batches_hold_every_index_once_within_the_budget(lengths, budget):
    batches = list(token_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_single_candidates_groups_and_triples_keep_their_order_and_fields():
    records = [
        Record({"prompt": "p", "reference": "ab", "output": "abcd", "mine": 1}),
        Record(
            {"prompt": "p", "reference": "a", "candidates": [{"output": "a"}, {"output": "ab"}]}
        ),
        Record({"prompt": "p", "reference": "", "chosen": "abc", "rejected": "a"}),
    ]
    results = [fields for fields, _ in score_records(records, LengthScorer(), best=True)]
    assert results[0]["reward"] == 2.0 and results[0]["mine"] == 1
    assert results[1]["rewards"] == [0.0, 1.0] and results[1]["best"] == 1
    assert results[2]["rewards"] == [3.0, 1.0]


def test_without_reference_every_reference_is_empty():
    record = Record({"prompt": "p", "reference": "long", "output": "abc"})
    ((fields, _),) = score_records([record], LengthScorer(), no_reference=True)
    assert fields["reward"] == 3.0
    with pytest.raises(RecordError, match="missing field `reference`"):
        require_reference(Record({"prompt": "p", "output": "o"}))


def test_the_kind_follows_the_fields():
    assert kind_of_scorable({"chosen": "", "rejected": ""}) == "triple"
    assert kind_of_scorable({"output": ""}) == "candidate"


def test_a_reward_that_is_not_finite_is_an_error(tiny_rm):
    from polarctl import model
    from polarctl.scoring import ModelScorer

    made = model.load(str(tiny_rm))
    made.model.score.weight.data.fill_(math.nan)
    with pytest.raises(PolarctlError, match="not finite"):
        ModelScorer(made).score([Item("p", "r", "o")])


def test_batch_budget_and_grouping_do_not_change_rewards(tiny_rm):
    from polarctl import model
    from polarctl.scoring import ModelScorer

    made = model.load(str(tiny_rm))
    items = [Item("q" * (i % 5 + 1), "ref", "x" * (i % 7)) for i in range(40)]
    large = [s.reward for s in ModelScorer(made, 4096).score(items)]
    small = [s.reward for s in ModelScorer(made, 1).score(items)]
    assert large == pytest.approx(small, abs=1e-5)
