"""What a run does where the user says nothing: worked out by hand for sizes of model and data."""

from dataclasses import replace

import pytest

from polarctl import console
from polarctl.errors import UsageError
from polarctl.stages.finetune import Config as Finetune
from polarctl.stages.pretrain import Config as Pretrain
from polarctl.training import recipe

PAPER = recipe.Facts(parameters=1_800_000_000, triples=150_000, triple_tokens=2000, processes=1)
SMALL = recipe.Facts(parameters=300_000, triples=300, triple_tokens=200, processes=1)


def chosen(stage, facts, **options):
    kind = Finetune if stage == "finetune" else Pretrain
    config = kind(input=("x.jsonl",), output="out", **options)
    found = recipe.resolve(stage, config, facts, 4096)
    return found.lr, found.batch_size, found.steps


def test_the_published_scale_gets_the_published_values():
    assert chosen("finetune", PAPER) == (1e-5, 320, 469)  # 150,000 / 320 = 468.75
    assert chosen("finetune", replace(PAPER, parameters=7_000_000_000)) == (2e-5, 320, 469)


@pytest.mark.parametrize(
    ("triples", "batch_size", "steps"),
    [
        (100, 8, 50),  # 13 steps of 8; four passes are the most
        (300, 8, 113),  # three passes, 900 / 8
        (800, 8, 100),
        (1_600, 16, 100),
        (10_000, 64, 157),  # 128 would be 78
        (32_000, 320, 100),
    ],
)
def test_few_data_get_small_batches_and_at_most_four_passes(triples, batch_size, steps):
    for stage in ("pretrain", "finetune"):
        _, *found = chosen(stage, replace(SMALL, triples=triples))
        assert found == [batch_size, steps]


@pytest.mark.parametrize(
    ("parameters", "lr"),
    # 1e-5 x (1.8e9 / N)^0.4
    [(300_000, 3.2e-4), (8_000_000, 8.7e-5), (500_000_000, 1.7e-5), (1_799_999_999, 1e-5)],
)
def test_a_smaller_model_has_a_higher_rate(parameters, lr):
    facts = replace(SMALL, parameters=parameters)
    for stage in ("pretrain", "finetune"):
        assert chosen(stage, facts)[0] == lr
        assert chosen(stage, facts, init_from_config="c")[0] == pytest.approx(10 * lr, rel=0.03)


def test_the_law_holds_where_it_was_fitted_or_asked_for(capsys):
    large = replace(PAPER, triples=1_000_000)  # 2e9 tokens
    lr, batch_size, steps = chosen("pretrain", large)
    # 0.0002306 x 1716.6^0.01125 x 2328.3^-0.66587 x 1.8626^0.33916, and 31.9032 x ...
    assert lr == pytest.approx(1.7736e-06, rel=1e-4) and batch_size == 74
    assert steps == 13_514
    asked = chosen("pretrain", SMALL, base_tokens="2.5T")
    assert asked[:2] == (pytest.approx(4.703e-08, rel=1e-3), 1)
    assert "extrapolated" in capsys.readouterr().err
    with pytest.raises(UsageError, match="does not know the tokens"):
        chosen("pretrain", replace(SMALL, triples=None), base_tokens="2.5T", max_steps=5)


def test_what_is_given_is_taken():
    assert chosen("finetune", SMALL, lr=3e-5, batch_size=16, epochs=2.0) == (3e-5, 16, 38)
    assert chosen("finetune", SMALL, epochs=1.0)[1:] == (8, 38)
    assert chosen("finetune", SMALL, batch_size=64)[1:] == (64, 19)  # 4 passes
    assert chosen("pretrain", replace(SMALL, triples=None), max_steps=7)[1:] == (32, 7)


def test_every_choice_is_said_with_its_reason_and_a_short_run_is_warned_of(capsys):
    chosen("finetune", SMALL)
    said = capsys.readouterr().err
    assert "lr: 0.00032 (1e-5 x (1.8e9 / N)^0.4 for N = 3e+05 weights" in said
    assert "batch size: 8 (300 triples; 320 as in POLAR's fine-tuning would be 1 steps)" in said
    assert "epochs: 3 (one pass would be 38 steps)" in said and "warning" not in said
    assert {"lr", "batch size", "epochs"} <= set(console.choices())
    chosen("finetune", replace(SMALL, triples=40))
    assert "only 20 optimiser" not in capsys.readouterr().err
    chosen("finetune", SMALL, max_steps=2)
    assert "only 2 optimiser steps: the model learns little or nothing" in capsys.readouterr().err
