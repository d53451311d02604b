"""Positions that depend on the length: a sequence's reward is the one that it has alone."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import transformers

from polarctl.model.forward import Packed, Padded, RowInput
from polarctl.model.packing import Span, pack, parts_of, span_of
from polarctl.model.positions import kind_of_length
from polarctl.model.reward_model import pad
from polarctl.training import losses

LIMIT = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 5.0, 9.0, 12.0],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
MODELS = {
    "phi3-longrope": {
        "max_position_embeddings": 8 * LIMIT,
        "original_max_position_embeddings": LIMIT,
        "rope_parameters": LONGROPE,
    },
    "phimoe-longrope": {
        "max_position_embeddings": 8 * LIMIT,
        "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
        "num_local_experts": 4,
    },
    "llama-dynamic": {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC},
    "gemma3_text-dynamic": {
        "max_position_embeddings": LIMIT,
        "head_dim": 8,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": DYNAMIC,
        },
    },
}
# Short, long and short; long ones of two lengths; a group on both sides of the limit.
SHAPES = [(5, (3, 4)), (30, (9, 2)), (4, (2, 7)), (20, (2, 11, 3, 30)), (23, (1, 1)), (24, (1, 1))]


def classifier(name):
    config = transformers.AutoConfig.for_model(
        name.partition("-")[0],
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **MODELS[name],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = transformers.AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(made.score.weight)
    return made.eval()


def groups_of(shapes, seed=0):
    draw = random.Random(seed)

    def ids(count):
        return [draw.randrange(3, 64) for _ in range(count)]

    made = []
    for shared, own in shapes:
        prefix = ids(shared)
        made.append([prefix + ids(count) for count in own])
    return made


def by_fresh_models(model, groups):
    """Each sequence by a copy that has seen nothing else, with nothing of ours around it."""
    found = []
    for candidates in groups:
        for ids in candidates:
            fresh = copy.deepcopy(model)
            states = fresh.base_model(input_ids=torch.tensor([ids]), use_cache=False)[0]
            found.append(fresh.score(states[0, -1]).squeeze())
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_library_alone_would_mix_them_up(name):
    model, groups = classifier(name), groups_of(SHAPES)
    with torch.no_grad():
        wanted = by_fresh_models(model, groups[:1])
        ids, mask = pad([*groups[0], *groups[1]], 0, "cpu")
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        found = model.score(states[torch.arange(4), mask.sum(1) - 1]).squeeze(-1)[:2]
    assert ((found - wanted).abs() > 1e-4).all()


@pytest.mark.parametrize("way", ["packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_each_gets_the_reward_and_the_gradient_that_it_has_alone(name, way):
    model, groups = classifier(name), groups_of(SHAPES)
    wanted = by_fresh_models(model, groups)
    sizes = [len(group) for group in groups]

    def slopes(rewards):
        per_group = rewards.split(sizes)
        loss = sum(losses.bradley_terry(r[:1].expand(len(r) - 1), r[1:]).mean() for r in per_group)
        model.zero_grad()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}

    # The plain formulation's gradient: the same weights, one sequence at a time.
    plain = torch.cat(
        [
            model.score(
                _library(model, ids).base_model(input_ids=torch.tensor([ids]), use_cache=False)[0][
                    :, -1
                ]
            )[0]
            for group in groups
            for ids in group
        ]
    )
    assert torch.allclose(plain, wanted, atol=1e-6)
    loss, expected = slopes(plain)
    if way == "padded":
        found = Padded(model)(*pad([ids for group in groups for ids in group], 0, "cpu"))
    else:
        module = Packed(model)
        (row,) = pack(groups, 10_000, module.kind)
        given = RowInput.of(row, "cpu")
        rewards = module(given.ids, given.positions, given.layout)
        parts = dict(zip(row.members, rewards.split([sizes[i] for i in row.members]), strict=True))
        found = torch.cat([parts[i] for i in range(len(groups))])
    assert torch.allclose(found, wanted, rtol=2e-6, atol=2e-6)
    again, gradients = slopes(found)
    assert again == pytest.approx(loss, rel=1e-5)
    for parameter, slope in expected.items():
        assert (gradients[parameter] - slope).norm() < 1e-4 * slope.norm() + 1e-6, parameter


def _library(model, ids):
    """The model with its rotary embedding as it was made."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = module.original_inv_freq
            module.max_seq_len_cached = module.original_max_seq_len
        if hasattr(module, "full_attention_original_inv_freq"):
            module.full_attention_inv_freq = module.full_attention_original_inv_freq
            module.full_attention_max_seq_len_cached = module.original_max_seq_len
    return model


@pytest.mark.parametrize("way", ["packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_scoring_gives_the_reward_that_a_candidate_has_alone(name, way):
    from polarctl.scoring.scorer import ModelScorer

    model, groups = classifier(name), groups_of(SHAPES)
    with torch.no_grad():
        wanted = by_fresh_models(model, groups)
    tokenizer = SimpleNamespace(pad_token_id=0)
    scorer = ModelScorer(SimpleNamespace(model=model, tokenizer=tokenizer, device="cpu"), 100)
    if way == "padded":
        if isinstance(scorer.module, Packed):
            scorer.module.restore()
        scorer.module = Padded(model)
    found = [reward for group in scorer.rewards_of(groups) for reward in group]
    assert found == pytest.approx(wanted.tolist(), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_training_and_validation_see_the_loss_of_sequences_alone(name, shared):
    import accelerate

    from polarctl.training.engine import PlainEngine
    from polarctl.training.loop import Hyperparameters, Trainer

    model = classifier(name)
    groups = [SimpleNamespace(ids=ids, margin=0.0) for ids in groups_of(SHAPES)]
    with torch.no_grad():
        alone = by_fresh_models(model, [group.ids for group in groups])
        per_group = alone.split([len(group.ids) for group in groups])
        wanted = sum(
            losses.bradley_terry(r[:1].expand(len(r) - 1), r[1:]).mean() for r in per_group
        ) / len(groups)
    module = Packed(model) if shared else Padded(model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    engine = PlainEngine(accelerate.Accelerator(cpu=True), module, optimizer, 1.0)
    plan = Hyperparameters(lr=1e-3, batch_size=len(groups), steps=1, batch_tokens=120)
    trainer = Trainer(engine, plan, 0)
    assert trainer.evaluate(groups)[0] == pytest.approx(wanted.item(), rel=1e-5)
    (log,) = trainer.train(iter(groups))
    assert log.loss == pytest.approx(wanted.item(), rel=1e-5)


def test_which_lengths_are_alike():
    kinds = {name: kind_of_length(classifier(name).config) for name in MODELS}
    for name in ("phi3-longrope", "phimoe-longrope"):
        found = [kinds[name](length) for length in (1, 24, 25, 90)]
        assert found[0] == found[1] != found[2] == found[3]
    for name in ("llama-dynamic", "gemma3_text-dynamic"):
        found = [kinds[name](length) for length in (1, 24, 25, 90)]
        assert found[0] == found[1] and len(set(found)) == 3
    assert kind_of_length(transformers.LlamaConfig()) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert kind_of_length(transformers.LlamaConfig(rope_parameters=yarn)) is None


def test_candidates_of_different_kinds_share_no_prefix():
    def kind(length):
        return length > 5

    group = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3]]
    (row,) = pack([group], 100, kind)
    assert row.spans == (Span(3, (1, 1)), Span(5, (1, 1)), Span(0, (3,)))
    assert row.ids == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert row.positions == [0, 1, 2, 3, 3, 0, 1, 2, 3, 4, 5, 5, 0, 1, 2]
    assert [span_of(part) for part in parts_of(group, kind)] == list(row.spans)
    assert parts_of(group) == [group]


def test_a_row_that_mixes_kinds_under_one_prefix_is_refused():
    model = classifier("llama-dynamic")
    module = Packed(model)
    (row,) = pack(groups_of([(20, (2, 11))]), 1000)
    given = RowInput.of(row, "cpu")
    with pytest.raises(ValueError, match="different kinds of length"):
        module(given.ids, given.positions, given.layout)
