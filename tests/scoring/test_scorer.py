"""Scoring: order, groups, batches under a budget, no silent failure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarctl.errors import PolarctlError, RecordError
from polarctl.records import Record, kind_of_scorable
from polarctl.scoring.scorer import Item, Scored, check_scorable, score_records, token_batches


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
    results = [fields for fields, _ in score_records(records, LengthScorer())]
    assert results[0]["reward"] == 2.0 and results[0]["mine"] == 1
    assert results[1]["rewards"] == [0.0, 1.0]
    assert results[2]["rewards"] == [3.0, 1.0]


def test_without_reference_every_reference_is_empty():
    record = Record({"prompt": "p", "reference": "long", "output": "abc"})
    ((fields, _),) = score_records([record], LengthScorer(), no_reference=True)
    assert fields["reward"] == 3.0
    with pytest.raises(RecordError, match="missing field `reference`"):
        check_scorable(Record({"prompt": "p", "output": "o"}), reference=True)


def test_the_kind_follows_the_fields():
    assert kind_of_scorable({"chosen": "", "rejected": ""}) == "triple"
    assert kind_of_scorable({"output": ""}) == "candidate"


def test_a_reward_that_is_not_finite_is_an_error(tiny_rm):
    from polarctl.model import reward_model
    from polarctl.scoring.scorer import ModelScorer

    made = reward_model.load(str(tiny_rm))
    made.model.score.weight.data.fill_(math.nan)
    with pytest.raises(PolarctlError, match="not finite"):
        ModelScorer(made).score([Item("p", "r", "o")])


def test_batch_budget_and_grouping_do_not_change_rewards(tiny_rm):
    from polarctl.model import reward_model
    from polarctl.scoring.scorer import ModelScorer

    made = reward_model.load(str(tiny_rm))
    items = [Item("q" * (i % 5 + 1), "ref", "x" * (i % 7)) for i in range(40)]
    large = [s.reward for s in ModelScorer(made, 4096).score(items)]
    small = [s.reward for s in ModelScorer(made, 1).score(items)]
    assert large == pytest.approx(small, abs=1e-5)


def test_threads_share_a_model_and_get_the_bits_that_one_gets(tiny_rm):
    from concurrent.futures import ThreadPoolExecutor

    from polarctl.model import reward_model
    from polarctl.scoring.scorer import ModelScorer

    scorer = ModelScorer(reward_model.load(str(tiny_rm)))
    windows = [[Item(f"q{w}", "ref", "x" * (i % 9)) for i in range(40)] for w in range(12)]
    alone = list(map(scorer.score, windows))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(scorer.score, windows)) == alone


def counted(scorer):
    """The scorer and a list that gets the tokens of every forward pass."""
    seen = []
    scorer.module.classifier.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def test_what_candidates_share_is_computed_once(tiny_rm):
    from polarctl.model import reward_model
    from polarctl.scoring.scorer import ModelScorer

    scorer = ModelScorer(reward_model.load(str(tiny_rm)), 4096)
    seen = counted(scorer)
    groups = [[[5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6, 4]], [[8, 7]]]
    together = scorer.rewards_of(groups)
    # 2 shared and 2 + 3 + 1 own tokens, and 2 of the other group.
    assert seen == [10]
    alone = [[scorer.rewards_of([[ids]])[0][0] for ids in group] for group in groups]
    assert [len(values) for values in together] == [3, 1]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_group_larger_than_a_row_is_cut_between_candidates(tiny_rm):
    from polarctl.model import reward_model
    from polarctl.scoring.scorer import ModelScorer

    scorer = ModelScorer(reward_model.load(str(tiny_rm)), 12)
    seen = counted(scorer)
    group = [[5, 6, 7, 8, k, k + 1, k + 2] for k in range(10, 40, 3)]
    rewards = scorer.rewards_of([group])
    # 4 shared tokens and 3 own ones: two candidates a row of at most 12 (4 + 3 + 3 = 10).
    assert seen == [10] * 5
    scorer.batch_tokens = 4096
    assert rewards[0] == pytest.approx(scorer.rewards_of([group])[0], abs=1e-5)


def test_a_model_that_cannot_share_scores_padded_batches_and_says_so(tiny_rm, capfd):
    import torch
    import transformers

    from polarctl.model import reward_model
    from polarctl.scoring.scorer import ModelScorer

    made = reward_model.load(str(tiny_rm))
    config = transformers.Gemma2Config(
        vocab_size=made.model.config.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_labels=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made.model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    large = ModelScorer(made, 4096)
    assert "attention: whole sequences, padded (a `gemma2` model" in capfd.readouterr().err
    items = [Item("q" * (i % 3 + 1), "ref", "x" * i) for i in range(9)]
    rewards = [s.reward for s in large.score(items)]
    assert rewards == pytest.approx([s.reward for s in ModelScorer(made, 1).score(items)], abs=1e-5)
    assert len(set(rewards)) > 5
