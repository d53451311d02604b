import math
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarctl.evaluation.metrics import (
    baseline_verdict,
    best_of_n,
    bootstrap_interval,
    kendall_tau_b,
    ndcg,
    pairs_of_group,
    quantiles,
    text_length,
    unigram_f1,
    verdict,
)

MARKS = st.sampled_from([0.0, 0.5, 1.0])
CASES = st.lists(st.tuples(MARKS, st.integers(0, 6)), min_size=1, max_size=40)
WORDS = st.text("aBé 7._我", max_size=12)
FAST = settings(max_examples=50, deadline=None)


def test_a_tie_is_wrong_for_the_model_and_half_right_for_a_baseline():
    assert [verdict(2, 1), verdict(1, 1), verdict(1, 2)] == [1.0, 0.0, 0.0]
    assert [baseline_verdict(2, 1), baseline_verdict(1, 1), baseline_verdict(1, 2)] == [1, 0.5, 0]


@FAST
@given(CASES, st.integers(0, 2**32))
def test_the_interval_contains_the_mean_and_lies_in_the_unit_interval(cases, seed):
    marks, keys = zip(*cases, strict=True)
    interval = bootstrap_interval(marks, keys, seed=seed, resamples=60)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.value == pytest.approx(sum(marks) / len(marks))
    assert interval.low < interval.high
    assert (interval.n, interval.clusters) == (len(marks), len(set(keys)))


@FAST
@given(CASES, st.randoms(use_true_random=False))
def test_order_and_cluster_names_change_nothing_and_a_seed_reproduces(cases, shuffler):
    first = bootstrap_interval(*zip(*cases, strict=True), seed=3, resamples=60)
    moved = [(mark, f"prompt {key}") for mark, key in cases]
    shuffler.shuffle(moved)
    assert bootstrap_interval(*zip(*moved, strict=True), seed=3, resamples=60) == first


def test_another_seed_gives_another_interval():
    marks, keys = [0.0, 0.5, 1.0, 1.0] * 10, list(range(40))
    seeds = [bootstrap_interval(marks, keys, seed=seed, resamples=50) for seed in range(5)]
    assert len(set(seeds)) > 1


def test_clusters_of_one_case_agree_with_the_plain_bootstrap():
    import numpy as np

    rng = np.random.default_rng(0)
    marks = rng.choice([0.0, 0.5, 1.0], size=120, p=[0.2, 0.2, 0.6])
    means = rng.choice(marks, size=(20_000, 120)).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    interval = bootstrap_interval(marks.tolist(), range(120), seed=1, resamples=20_000)
    # A case is worth 1/120 = 0.0083; the ends of two runs differ by less than one case.
    assert interval.low == pytest.approx(low, abs=0.006)
    assert interval.high == pytest.approx(high, abs=0.006)


def test_unequal_clusters_agree_with_a_loop_that_draws_whole_clusters():
    rng = random.Random(0)
    groups = [[float(rng.random() < 0.6)] * rng.randint(1, 6) for _ in range(30)]
    cases = [(mark, i) for i, group in enumerate(groups) for mark in group]
    means = []
    for _ in range(4000):
        drawn = [mark for group in rng.choices(groups, k=30) for mark in group]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    interval = bootstrap_interval(*zip(*cases, strict=True), seed=0, resamples=4000)
    assert interval.low == pytest.approx(means[100], abs=0.02)
    assert interval.high == pytest.approx(means[3899], abs=0.02)


def test_cases_that_share_a_prompt_widen_the_interval():
    marks = ([1.0] * 10 + [0.0] * 10) * 5
    alone = bootstrap_interval(marks, range(100), seed=0)
    shared = bootstrap_interval(marks, [i // 10 for i in range(100)], seed=0)
    # Ten effective cases instead of a hundred: wider by about sqrt(10) = 3.2.
    assert 2.5 < (shared.high - shared.low) / (alone.high - alone.low) < 4
    assert (shared.n, shared.clusters) == (100, 10)


def test_all_right_falls_back_to_wilson_on_the_number_of_prompts():
    # 30 cases of 10 prompts, all right: Wilson for 10 of 10, low end 0.722467 as above.
    interval = bootstrap_interval([1.0] * 30, [i // 3 for i in range(30)], seed=0)
    assert interval.low == pytest.approx(0.722467, abs=1e-6)
    assert (interval.value, interval.high) == (1.0, 1.0)
    wrong = bootstrap_interval([0.0] * 30, [i // 3 for i in range(30)], seed=0)
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1 - 0.722467, abs=1e-6))


def test_one_large_prompt_counts_for_little_more_than_one_trial():
    # sizes 9 and 1: (9 + 1)^2 / (81 + 1) = 100/82 = 1.219512 trials;
    # low end 1.219512 / (1.219512 + 3.841459) = 0.240964
    interval = bootstrap_interval([1.0] * 10, ["big"] * 9 + ["small"], seed=0)
    assert interval.low == pytest.approx(0.240964, abs=1e-6)
    assert interval.clusters == 2


def test_one_prompt_only_gives_a_wide_interval_and_not_a_point():
    interval = bootstrap_interval([1.0, 0.0], ["p", "p"], seed=0)
    # p = 0.5, one trial: half-width z sqrt(1/4 + z^2/4) / (1 + z^2) = z / (2 sqrt(1 + z^2))
    #  = 1.959964 / (2 * 2.200332) = 0.445379
    assert interval.low == pytest.approx(0.5 - 0.445379, abs=1e-5)
    assert interval.high == pytest.approx(0.5 + 0.445379, abs=1e-5)


@pytest.mark.parametrize(
    ("correct", "clusters", "options"),
    [
        ([], [], {}),
        ([1.0], [], {}),
        ([1.5], ["p"], {}),
        ([math.nan], ["p"], {}),
        ([1.0], ["p"], {"resamples": 0}),
        ([1.0], ["p"], {"level": 1.0}),
    ],
)
def test_the_bootstrap_refuses_bad_arguments(correct, clusters, options):
    with pytest.raises(ValueError):
        bootstrap_interval(correct, clusters, seed=0, **options)


def test_unigram_f1_by_hand():
    # {the: 1, cat: 1, sat: 1} and {the: 2, cat: 1, ran: 1}: 2 in common, 2 * 2 / (3 + 4)
    assert unigram_f1("The cat sat.", "the cat, THE ran") == pytest.approx(4 / 7)


def test_single_digits_are_words():
    # {answer, 7} and {answer, 8}: 2 * 1 / 4
    assert unigram_f1("answer: 7", "answer: 8") == 0.5


def test_han_characters_are_words():
    # {我, 爱, 你, ok} and {我, 爱, 他}: 2 * 2 / 7
    assert unigram_f1("我爱你ok", "我爱他。") == pytest.approx(4 / 7)


def test_texts_without_words_and_lengths_in_characters():
    assert unigram_f1("", "...") == 1.0
    assert unigram_f1("", "word") == 0.0
    assert text_length("né 推") == 4


@FAST
@given(WORDS, WORDS)
def test_unigram_f1_is_symmetric_bounded_and_one_on_itself(a, b):
    assert unigram_f1(a, b) == unigram_f1(b, a)
    assert 0 <= unigram_f1(a, b) <= 1
    assert unigram_f1(a, a) == 1.0


def test_best_of_n_averages_over_ties():
    assert best_of_n([0.1, 0.9, 0.3], [1.0, 0.0, 1.0]) == 0.0
    # The two tops have labels 1 and 0.
    assert best_of_n([2.0, 2.0, 1.0], [1.0, 0.0, 1.0]) == 0.5


@pytest.mark.parametrize(("rewards", "labels"), [([], []), ([1.0], []), ([math.nan], [1.0])])
def test_best_of_n_refuses_bad_arguments(rewards, labels):
    with pytest.raises(ValueError):
        best_of_n(rewards, labels)


def test_pairs_of_group():
    assert pairs_of_group([1, 0, 2, 1]) == [(0, 1), (2, 0), (2, 1), (2, 3), (3, 1)]
    assert pairs_of_group([1, 1]) == []


def test_quantiles_by_hand():
    # Positions share * 4: p05 0.2 -> 0 + 0.2 * 10 = 2; p95 3.8 -> 30 + 0.8 * 10 = 38
    expected = {"min": 0, "p05": 2, "p25": 10, "p50": 20, "p75": 30, "p95": 38, "max": 40}
    assert quantiles([40, 10, 0, 30, 20]) == pytest.approx(expected)
    assert set(quantiles([1.5]).values()) == {1.5}


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf]])
def test_quantiles_refuse_bad_values(values):
    with pytest.raises(ValueError):
        quantiles(values)


def test_importing_the_numbers_and_the_report_imports_nothing_heavy():
    program = (
        "import sys; from polarctl.evaluation import metrics, page, plots;"
        "print([m for m in ('numpy', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_kendall_tau_b_by_hand():
    assert kendall_tau_b([1, 2, 3], [10, 20, 30]) == 1.0
    assert kendall_tau_b([3, 2, 1], [10, 20, 30]) == -1.0
    # Six pairs; labels tie in (0, 1), rewards in (2, 3). Of the others (0, 2) and (0, 3) agree,
    # (1, 2) and (1, 3) do not: (2 - 2) / sqrt(5 * 5) = 0.
    assert kendall_tau_b([1, 3, 2, 2], [0, 0, 1, 2]) == 0.0
    # Rewards 1, 1, 2 against labels 1, 2, 3: (0, 1) is tied, the other two agree.
    assert kendall_tau_b([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    # Nothing told: no correlation, neither way.
    assert kendall_tau_b([4, 4, 4], [1, 2, 3]) == 0.0


def test_ndcg_by_hand():
    assert ndcg([0.9, 0.5, 0.1], [3, 2, 0]) == 1.0
    # Order by reward: labels 0, 2, 3. Discounts 1, 1 / log2(3), 1 / 2.
    second = 1 / math.log2(3)
    worst = (2 * second + 3 / 2) / (3 + 2 * second)
    assert ndcg([0.1, 0.5, 0.9], [3, 2, 0]) == pytest.approx(worst)
    # Tied at ranks 1 and 2: both get the mean discount (1 + second) / 2, in whichever order.
    tied = (3 + 0) * (1 + second) / 2 / (3 + 0 * second)
    assert ndcg([1, 1], [3, 0]) == pytest.approx(tied)
    assert ndcg([1, 1], [0, 3]) == pytest.approx(tied)


RANKED = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=7).filter(
    lambda pairs: len({label for _, label in pairs}) > 1
)


@FAST
@given(RANKED)
def test_rank_figures_are_bounded_and_blind_to_the_order_of_candidates(pairs):
    rewards, labels = zip(*pairs, strict=True)
    turned = [side[::-1] for side in (rewards, labels)]
    assert -1 <= kendall_tau_b(rewards, labels) <= 1 and 0 < ndcg(rewards, labels) <= 1
    assert kendall_tau_b(*turned) == pytest.approx(kendall_tau_b(rewards, labels))
    assert ndcg(*turned) == pytest.approx(ndcg(rewards, labels))
    assert kendall_tau_b([-r for r in rewards], labels) == -kendall_tau_b(rewards, labels)
    assert kendall_tau_b(labels, labels) == pytest.approx(1)
    assert ndcg(labels, labels) == pytest.approx(1)
    if len({*rewards}) == len(rewards) and len({*labels}) == len(labels):
        # Without ties it is the accuracy over pairs, put onto [-1, 1].
        told = [verdict(rewards[i], rewards[j]) for i, j in pairs_of_group(labels)]
        assert kendall_tau_b(rewards, labels) == pytest.approx(2 * sum(told) / len(told) - 1)


@pytest.mark.parametrize("figure", [kendall_tau_b, ndcg])
@pytest.mark.parametrize(
    ("rewards", "labels"),
    [([], []), ([1.0], [1.0, 2.0]), ([1.0, 2.0], [3, 3]), ([math.nan, 1.0], [0, 1])],
)
def test_rank_figures_refuse_what_has_no_order(figure, rewards, labels):
    with pytest.raises(ValueError):
        figure(rewards, labels)


def test_ndcg_refuses_negative_labels():
    with pytest.raises(ValueError, match="negative"):
        ndcg([1, 2], [-1, 2])
