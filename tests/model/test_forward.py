"""Shared prefixes and packing change nothing: rewards, loss and gradients of every architecture."""

import functools
import random

import pytest
import torch
import transformers

from polarctl.model import attention
from polarctl.model.forward import CannotShare, Packed, Padded, RowInput
from polarctl.model.packing import Span, alone, pack
from polarctl.model.reward_model import pad
from polarctl.training import losses

ARCHITECTURES = {
    "llama": {},
    "llama-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    },
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 6},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
}


def classifier(name, dtype=torch.float64, **more):
    kind = name.partition("-")[0]
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=0,
        **{**ARCHITECTURES[name], **more},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = transformers.AutoModelForSequenceClassification.from_config(config).to(dtype)
        torch.nn.init.normal_(made.score.weight)
    if dtype is torch.float64:
        for module in made.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = functools.partial(double_norm, module)
    return made.eval()


def double_norm(module, states):
    """The library's norms compute in float32 whatever the weights are; these do not."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    scale = module.weight + ("Gemma" in type(module).__name__)
    return scale * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)


def random_groups(seed, count=7):
    """Groups of 1 to 5 candidates; prefixes of any length, none too; candidates of 1 token too."""
    draw = random.Random(seed)

    def ids(low, high):
        return [draw.randrange(1, 64) for _ in range(draw.randint(low, high))]

    groups = []
    for _ in range(count):
        prefix = ids(0, 20) if draw.random() < 0.8 else []
        groups.append([prefix + ids(1, 9) for _ in range(draw.choice([1, 2, 2, 3, 5]))])
    return groups


def objective(per_group):
    """A loss over all rewards: Bradley-Terry against each rejected one, squares for those alone."""
    total = torch.zeros((), dtype=torch.float64)
    for rewards in per_group:
        if len(rewards) == 1:
            total = total + rewards[0].double() ** 2
            continue
        chosen = rewards[0].repeat(len(rewards) - 1)
        total = total + losses.bradley_terry(chosen, rewards[1:]).double().mean()
    return total / len(per_group)


def one_at_a_time(model, groups):
    """The plain formulation: every sequence alone, through the library's own attention."""
    own = Padded(model)
    return [torch.cat([own(*pad([ids], 0, "cpu")) for ids in group]) for group in groups]


def packed(model, groups, budget, **options):
    """Rewards of every group from rows of at most `budget` tokens."""
    module = Packed(model, **options)
    found = [None] * len(groups)
    for row in pack(groups, budget):
        given = RowInput.of(row, "cpu")
        rewards = module(given.ids, given.positions, given.layout)
        sizes = [len(groups[index]) for index in row.members]
        for index, part in zip(row.members, rewards.split(sizes), strict=True):
            found[index] = part
    return module, found


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_and_packed_equals_one_sequence_at_a_time(name, seed):
    model = classifier(name)
    groups = random_groups(seed)
    wanted = one_at_a_time(model, groups)
    loss = objective(wanted)
    slopes = gradients(model, loss)
    for budget in (1, 60, 10_000):
        _, found = packed(model, groups, budget)
        assert torch.allclose(torch.cat(found), torch.cat(wanted), rtol=1e-12, atol=1e-12)
        again = objective(found)
        assert abs(again - loss) < 1e-12
        for slope_name, slope in gradients(model, again).items():
            bound = 1e-12 * max(1.0, float(slopes[slope_name].abs().max()))
            assert (slope - slopes[slope_name]).abs().max() < bound, slope_name
        model_restored(model)


def model_restored(model):
    """The model with the attention of the library again."""
    model.set_attn_implementation("sdpa")
    model.base_model.layers[-1].__dict__.pop("forward", None)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_in_single_precision_it_is_equal_to_1e5(name):
    model = classifier(name, torch.float32)
    groups = random_groups(11)
    wanted = one_at_a_time(model, groups)
    slopes = gradients(model, objective(wanted))
    _, found = packed(model, groups, 80)
    scale = torch.cat(wanted).abs().max()
    assert (torch.cat(found) - torch.cat(wanted)).abs().max() < 1e-5 * scale
    for slope_name, slope in gradients(model, objective(found)).items():
        before = slopes[slope_name]
        assert (slope - before).norm() < 1e-5 * before.norm().clamp(min=1.0), slope_name


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_the_last_layer_at_reward_tokens_alone_is_exact(name):
    model = classifier(name)
    groups = random_groups(5)
    module, trick = packed(model, groups, 60)
    assert module.reward_only
    slopes = gradients(model, objective(trick))
    module.restore()
    module, whole = packed(model, groups, 60, reward_only=False)
    assert not module.reward_only
    assert torch.allclose(torch.cat(trick), torch.cat(whole), rtol=1e-12, atol=1e-12)
    for slope_name, slope in gradients(model, objective(whole)).items():
        assert torch.allclose(slope, slopes[slope_name], rtol=1e-10, atol=1e-12), slope_name


def test_the_last_layer_does_no_work_for_other_tokens():
    model = classifier("llama")
    seen = []
    model.base_model.layers[-1].mlp.register_forward_hook(
        lambda module, given, out: seen.append(given[0].shape[1])
    )
    groups = [[[1, 2, 3, 4, 5], [1, 2, 3, 6]], [[7, 8, 9]]]
    module, _ = packed(model, groups, 100)
    assert seen[-1] == 3  # candidates, of a row of 3 + 2 + 1 + 3 = 9 tokens


def test_gradient_checkpointing_changes_nothing():
    model = classifier("llama")
    groups = random_groups(3)
    model.train()
    _, plain = packed(model, groups, 60)
    slopes = gradients(model, objective(plain))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model_restored(model)
    _, again = packed(model, groups, 60)
    assert torch.equal(torch.cat(plain), torch.cat(again))
    for slope_name, slope in gradients(model, objective(again)).items():
        assert torch.equal(slope, slopes[slope_name]), slope_name


def test_restarted_positions_do_not_cut_candidates_off_from_their_prefix():
    """Positions that restart make the library's own attention see a new document there."""
    model = classifier("llama")
    groups = [[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9]]]
    (row,) = pack(groups, 100)
    given = RowInput.of(row, "cpu")
    with torch.no_grad():
        hidden = model.base_model(
            input_ids=given.ids, position_ids=given.positions, use_cache=False
        )[0][0]
        trapped = model.score(hidden[given.layout.ends]).squeeze(-1)
        wanted = torch.cat(one_at_a_time(model, groups))
        _, found = packed(model, groups, 100)
    assert abs(trapped[1] - wanted[1]) > 1e-3  # the trap is real
    assert torch.allclose(torch.cat(found), wanted, rtol=0, atol=1e-12)


def test_the_prefix_is_read_by_every_candidate():
    model = classifier("llama")
    _, before = packed(model, [[[1, 2, 3, 4], [1, 2, 3, 5]]], 100)
    model_restored(model)
    _, after = packed(model, [[[9, 2, 3, 4], [9, 2, 3, 5]]], 100)
    assert ((before[0] - after[0]).abs() > 1e-3).all()


def test_a_candidate_does_not_see_its_neighbours():
    model = classifier("llama")
    _, before = packed(model, [[[1, 2, 3, 4], [1, 2, 5, 6]], [[8, 9]]], 100)
    model_restored(model)
    _, after = packed(model, [[[1, 2, 3, 4], [1, 2, 7, 7]], [[3, 9]]], 100)
    assert abs(before[0][0] - after[0][0]) < 1e-12
    assert abs(before[0][1] - after[0][1]) > 1e-3


def test_a_model_with_soft_caps_is_refused_and_left_as_it_was():
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_labels=1,
        pad_token_id=0,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(CannotShare, match="`gemma2` model cannot share prefixes.*softcap"):
        Packed(model)
    assert model.config._attn_implementation == before
    assert Padded(model)(*pad([[1, 2, 3]], 0, "cpu")).shape == (1,)


def test_a_model_whose_values_would_change_is_refused(monkeypatch):
    """The probe before training is a real comparison: a wrong attention does not pass it."""
    right = attention.attend

    def without_prefix(query, key, value, layout, **options):
        bare = [Span(0, (n,)) for span in layout.spans for n in (span.prefix, *span.branches) if n]
        other = attention.Layout(bare)
        if options["at_rewards"]:
            return right(query, key, value, layout, **options)
        return right(query, key, value, other, **options)

    monkeypatch.setattr(attention, "attend", without_prefix)
    with pytest.raises(CannotShare, match="its values change"):
        Packed(classifier("llama"))


def test_the_attention_refuses_to_run_without_a_layout():
    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(NotImplementedError, match="layout"):
        attention.shared_prefix_attention(None, states, states, states, None)


def test_nothing_is_shared_between_candidates_alone():
    model = classifier("qwen2")
    groups = random_groups(9)
    _, shared = packed(model, groups, 60)
    model_restored(model)
    _, bare = packed(model, alone(groups), 60)
    assert torch.allclose(torch.cat(shared), torch.cat(bare), rtol=1e-12, atol=1e-12)


def test_a_model_can_be_packed_again():
    model = classifier("llama")
    groups = random_groups(4)
    _, first = packed(model, groups, 60)
    module, second = packed(model, groups, 60, reward_only=False)
    assert torch.allclose(torch.cat(first), torch.cat(second), rtol=1e-12, atol=1e-12)
    module.restore()
    assert model.config._attn_implementation == "sdpa"


AUTOCAST = ["llama", "qwen2", "qwen3", "gemma", "gemma3_text"]


@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast_the_kernel_gets_one_precision(name, monkeypatch):
    """Rotary embeddings and norms make queries and keys float32 again; values are bfloat16."""
    model = classifier(name, torch.float32)
    module = Packed(model)
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *rest, **options):
        seen.append((query.dtype, key.dtype, value.dtype))
        return kernel(query, key, value, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    (row,) = pack(random_groups(2), 10_000)
    given = RowInput.of(row, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        module(given.ids, given.positions, given.layout).sum().backward()
    assert set(seen) == {(torch.bfloat16,) * 3}
    seen.clear()
    module(given.ids, given.positions, given.layout)
    assert set(seen) == {(torch.float32,) * 3}


@pytest.mark.parametrize("way", ["packed", "padded"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_the_head_is_float32_in_a_half_precision_model(way, how):
    """In bfloat16 rewards lie on a grid: between 8 and 16 it has steps of 1/16."""
    model = classifier("llama", torch.float32)
    if how == "weights":
        model.bfloat16()
    draw = random.Random(1)
    sequences = [[draw.randrange(1, 64) for _ in range(9)] for _ in range(300)]
    states = []
    model.score.register_forward_pre_hook(lambda module, given: states.append(given[0].clone()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        if way == "packed":
            found = packed(model, [[ids] for ids in sequences], 10_000)[1]
        else:
            found = [Padded(model)(*pad(sequences, 0, "cpu"))]
    found = torch.cat(found)
    by_hand = torch.cat(states).double() @ model.score.weight[0].double()
    assert found.dtype == torch.float32
    assert (found - by_hand).abs().max() < 1e-5
    assert len(found.unique()) > 295 > len(found.bfloat16().unique())
