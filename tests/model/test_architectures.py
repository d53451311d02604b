"""Which models share prefixes: found out exactly, said, and as the table in the docs has it."""

import re

import pytest
import torch
import transformers
from benchmarks import sweep_architectures as sweep

from polarctl.model import forward, miniature
from polarctl.model.forward import Packed, Padded, module_of
from polarctl.model.reward_model import pad


def table():
    """{type: {variant: outcome}} from docs/architectures.md."""
    rows = {}
    for line in sweep.PAGE.read_text(encoding="utf-8").splitlines():
        kind = re.match(r"\| `([\w.-]+)` \|", line)
        cells = [cell.strip() for cell in line.split("|")[2:-2]]
        if kind:
            names = ["default", "window", *sweep.ROPES]
            rows[kind[1]] = {n: c for n, c in zip(names, cells, strict=True) if c}
    return rows


TABLE = table()
# The other kinds of scaled positions do not depend on the length: the script tries them too.
VARIANTS = ("default", "window", "dynamic", "longrope")


@pytest.mark.parametrize("kind", TABLE)
def test_a_type_gives_its_own_loss_and_gradient_in_the_way_that_the_table_says(kind):
    ((_, found),) = sweep.sweep([kind], VARIANTS)
    wanted = {variant: way for variant, way in TABLE[kind].items() if variant in VARIANTS}
    assert {variant: one.outcome for variant, one in found.items()} == wanted
    for variant, one in found.items():
        assert max(one.loss, one.norm) < sweep.TOLERANCE, variant
        assert (one.outcome == "whole") == bool(one.reason)


def test_the_table_has_every_decoder_that_can_be_built():
    assert sweep.decoders() == list(TABLE)
    assert len(TABLE) >= 35
    assert {kind for kind, row in TABLE.items() if "reward tokens" in row.values()} == forward.TYPES


def classifier(kind, **more):
    """A classifier of a published depth and pattern, with little width."""
    config = transformers.AutoConfig.for_model(kind)
    for name, value in {**sweep.TINY, "head_dim": 8, **more}.items():
        if name != "num_hidden_layers" and (name in more or hasattr(config, name)):
            setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        torch.nn.init.normal_(made.score.weight)
    return made


def miniature_of(model):
    with miniature.Exact():
        return miniature.of(model)


def test_a_miniature_has_every_kind_of_layer_and_the_last_one():
    """SmolLM3 has 36 layers; every fourth, and so the last, is without rotary embedding."""
    model = classifier("smollm3")
    assert model.config.num_hidden_layers == len(model.base_model.layers) == 36
    kept = [layer.self_attn.use_rope for layer in miniature_of(model).base_model.layers]
    assert kept == [1, 0, 0]  # the first, the fourth, the last
    # Gemma 3 has 26 layers; every sixth sees everything, and the last has a window.
    small = miniature_of(classifier("gemma3_text"))
    windows = [layer.self_attn.sliding_window for layer in small.base_model.layers]
    assert windows == [miniature.WINDOW, None, miniature.WINDOW]
    assert small.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_a_miniature_of_a_published_config_is_small_and_draws_no_random_numbers():
    config = transformers.LlamaConfig(num_hidden_layers=80, hidden_size=8192, num_labels=1)
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(config)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    small = miniature_of(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(small.base_model.layers) == 2  # the first and the last
    assert sum(weight.numel() for weight in small.parameters()) < 100_000
    assert {weight.dtype for weight in small.parameters()} == {torch.float64}
    assert config.hidden_size == 8192 and config.num_hidden_layers == 80


def test_inside_exact_the_librarys_norm_has_all_digits_of_float64():
    norm = miniature_of(classifier("llama")).base_model.norm
    states = torch.randn(3, len(norm.weight), dtype=torch.float64)
    mean = states.pow(2).mean(-1, keepdim=True)
    wanted = norm.weight * states / torch.sqrt(mean + norm.variance_epsilon)
    with torch.no_grad():
        rounded = norm(states)
        with miniature.Exact():
            found = norm(states)
    assert (found - wanted).abs().max() < 1e-14 < 1e-9 < (rounded - wanted).abs().max()


def test_a_size_that_is_not_known_does_not_take_all_memory():
    with pytest.raises(miniature.CannotShrink), miniature.Exact():
        torch.nn.Linear(100_000, 100_000)


def rewards_of(model, module, sequences):
    """Rewards by a module, and one at a time by the library."""
    given = [forward.RowInput.of(row, "cpu") for row in forward.pack([sequences], 9999)]
    with torch.no_grad():
        if isinstance(module, Padded):
            found = module(*pad(sequences, 0, "cpu"))
        else:
            found = module(given[0].ids, given[0].positions, given[0].layout)
            module.restore()
        alone = [model.base_model(input_ids=torch.tensor([ids]))[0][0, -1] for ids in sequences]
        return found, model.score(torch.stack(alone)).squeeze(-1)


SEQUENCES = [[*range(3, 40), 5, 7], [*range(3, 40), 9], [*range(3, 40), *range(3, 30)]]


@pytest.mark.parametrize(
    ("kind", "more", "shares"),
    [
        ("smollm3", {}, True),
        ("ministral3", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }}, True),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6,
                       "layer_types": ["sliding_attention"] * 24}, False),
        ("phimoe", {"sliding_window": 6}, False),
        ("gemma2", {"attn_logit_softcapping": 0.5}, False),
    ],
)  # fmt: skip
def test_published_patterns_give_the_rewards_of_sequences_alone(kind, more, shares, capfd):
    model = classifier(kind, **more)
    module = module_of(model)
    assert isinstance(module, Packed) is shares
    said = capfd.readouterr().err
    assert ("last layer: whole" if shares else "attention: whole sequences, padded (a `") in said
    found, wanted = rewards_of(model, module, SEQUENCES)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_type_whose_last_layer_turns_out_otherwise_shares_with_it_whole(monkeypatch, capfd):
    monkeypatch.setattr(forward, "TYPES", forward.TYPES | {"smollm3"})
    module = module_of(classifier("smollm3"))
    assert isinstance(module, Packed) and not module.reward_only
    said = capfd.readouterr().err
    assert re.search(r"last layer: whole \(a `smollm3` model cannot .*its values change by", said)


def test_a_kernel_that_leaves_something_out_is_exchanged_and_said(capfd):
    model = classifier("gemma2", attn_logit_softcapping=0.5)
    assert model.config._attn_implementation == "sdpa"  # which knows no soft caps
    module_of(model, shared=False)
    assert model.config._attn_implementation == "eager"
    assert "attention kernel: eager (by `sdpa` its values change" in capfd.readouterr().err
    llama = classifier("llama")
    module_of(llama, shared=False)
    assert llama.config._attn_implementation == "sdpa"


def test_a_model_without_a_miniature_is_tried_on_its_own_weights_and_says_so(capfd, monkeypatch):
    def refuse(config):
        raise miniature.CannotShrink("for this test")

    monkeypatch.setattr(miniature, "shrink", refuse)
    model = classifier("mistral", sliding_window=40)
    before = [weight.clone() for weight in model.parameters()]
    module = module_of(model.train())
    assert isinstance(module, Packed) and model.training
    said = capfd.readouterr().err
    assert "check of sharing: own weights, to 1e-05 (the model has no miniature: for this" in said
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # A window that is ignored shows there too, because the texts are longer.
    model = classifier("phimoe", sliding_window=40)
    assert isinstance(module_of(model), Padded)
    assert "its values change by" in capfd.readouterr().err
    # Texts of tens of thousands of tokens would take hours: nothing is tried then.
    assert isinstance(module_of(classifier("mistral", sliding_window=30_000)), Padded)
    assert "longer than 30,000 tokens are too long to try" in capfd.readouterr().err
