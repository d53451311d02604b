import math

import numpy as np
import pytest
import torch

from polarctl.errors import PolarctlError
from polarctl.policies.decoding import draw, generate
from polarctl.policies.pool import Sampling
from polarctl.policies.uniforms import uniforms

PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12)
# Tokens 0 to 3 with probabilities 0.15, 0.5, 0.05 and 0.3.
LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


@pytest.fixture(scope="module")
def model(tiny_lm):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_lm).eval()


def seeds(n, start=1):
    return np.arange(start, start + n, dtype=np.uint64)


def test_uniforms_are_splitmix64():
    # The first three outputs from seed 0, as in Vigna's reference program.
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for step, value in enumerate(known):
        assert uniforms(np.array([0], dtype=np.uint64), step)[0] == (value >> 11) / 2**53


def test_uniforms_are_uniform_and_independent_between_neighbours():
    numbers = np.stack([uniforms(seeds(4000), step) for step in range(3)])
    assert abs(numbers.mean() - 0.5) < 5 / math.sqrt(12 * numbers.size)
    for other in (numbers[1], np.roll(numbers[0], 1)):
        assert abs(np.corrcoef(numbers[0], other)[0, 1]) < 5 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 0), (0.149, 0), (0.151, 1), (0.649, 1), (0.651, 2), (0.999, 3)]
)
def test_a_number_falls_into_the_cumulative_distribution_in_the_order_of_ids(number, token):
    # Cumulative: 0.15, 0.65, 0.70, 1.
    assert draw(LOGITS, np.array([number]), PLAIN).tolist() == [token]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_p=1.0, top_k=2), {1: 5 / 8, 3: 3 / 8}),
        (Sampling(top_p=0.79, top_k=0), {1: 5 / 8, 3: 3 / 8}),  # 0.5 + 0.3 reaches 0.79
        (Sampling(top_p=0.81, top_k=0), {0: 3 / 19, 1: 10 / 19, 3: 6 / 19}),
        (Sampling(top_p=0.01, top_k=0), {1: 1.0}),
        # Top-p counts what top-k left: 0.5 / 0.95 = 0.53 < 0.6, with 0.3 it is 0.84.
        (Sampling(top_p=0.6, top_k=3), {1: 5 / 8, 3: 3 / 8}),
        # Temperature 0.5 squares: 0.25 and 0.09 of 0.365.
        (Sampling(temperature=0.5, top_p=0.9, top_k=0), {1: 25 / 34, 3: 9 / 34}),
        (Sampling(top_p=1.0, top_k=99), {0: 0.15, 1: 0.5, 2: 0.05, 3: 0.3}),
    ],
)
def test_filters_keep_the_right_tokens_with_the_right_shares(sampling, kept):
    numbers = (np.arange(10_000) + 0.5) / 10_000
    drawn = draw(LOGITS.expand(10_000, 4), numbers, sampling)
    shares = np.bincount(drawn, minlength=4) / 10_000
    assert {i: share for i, share in enumerate(shares) if share} == pytest.approx(kept, abs=2e-4)


def test_draws_follow_the_filtered_distribution_of_a_model(model):
    """Chi-square against the warpers of transformers, which are independent of ours."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=50)
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 9, 17]])).logits[:, -1]
    warped = logits
    for warper in (TemperatureLogitsWarper(1.3), TopKLogitsWarper(50), TopPLogitsWarper(0.9)):
        warped = warper(None, warped)
    expected = 20_000 * warped.double().softmax(-1)[0].numpy()
    drawn = draw(logits.expand(20_000, -1), uniforms(seeds(20_000), 0), sampling)
    counts = np.bincount(drawn, minlength=len(expected))
    kept = expected > 0
    assert counts[~kept].sum() == 0
    degrees = kept.sum() - 1
    assert degrees > 5
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


def test_logits_that_are_not_finite_stop_the_run():
    for sampling in (PLAIN, Sampling(top_k=2)):
        with pytest.raises(PolarctlError, match="not finite"):
            draw(torch.tensor([[0.0, 1.0, 2.0, math.nan]]), np.array([0.5]), sampling)


PROMPTS = [[5, 9, 17], [30], [5, 9, 17], list(range(40, 70)), [7, 7], [80, 81, 82, 83]]
LIMITS = [12, 3, 12, 7, 1, 12]


def test_tokens_are_those_of_a_naive_loop_without_cache_and_padding(model):
    sampling = Sampling(max_new_tokens=12)
    stop = [11, 250]
    expected = []
    for prompt, seed, limit in zip(PROMPTS, seeds(6), LIMITS, strict=True):
        ids, ended = list(prompt), False
        for step in range(limit):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[:, -1]
            token = int(draw(logits, uniforms(np.array([seed]), step), sampling)[0])
            ended = token in stop
            if ended:
                break
            ids.append(token)
        expected.append((ids[len(prompt) :], ended))
    made = generate(model, PROMPTS, seeds(6), LIMITS, sampling=sampling, stop=stop)
    assert made == expected
    assert [len(tokens) for tokens, ended in made if not ended]  # some reach their limit


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_neighbours_and_batch_size_change_nothing(model, batch_size):
    def run(order, size):
        made = generate(
            model,
            [PROMPTS[i] for i in order],
            [int(seeds(6)[i]) for i in order],
            [LIMITS[i] for i in order],
            sampling=PLAIN,
            stop=list(range(0, 320, 9)),
            batch_size=size,
        )
        return dict(zip(order, made, strict=True))

    whole = run([0, 1, 2, 3, 4, 5], 6)
    assert any(ended for _, ended in whole.values())
    assert run([5, 3, 1, 0, 4, 2], batch_size) == whole
    assert run([2, 4], batch_size) == {i: whole[i] for i in (2, 4)}
