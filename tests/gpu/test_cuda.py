"""The CUDA path: one variable-length call a layer, against the calls by segment and the CPU."""

import random

import pytest
import torch
import transformers

from polarctl.model import attention
from polarctl.model.attention import Layout
from polarctl.model.forward import Packed, Padded, RowInput
from polarctl.model.packing import Span, pack
from polarctl.model.reward_model import pad
from polarctl.training import losses

pytestmark = pytest.mark.gpu

SPANS = (Span(40, (9, 17)), Span(0, (23,)), Span(5, (1, 1, 64)), Span(130, (31, 2)))


def states(heads, dtype, seed):
    tokens = sum(span.tokens for span in SPANS)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, 64, generator=generator).to("cuda", dtype)


def classifier(**more):
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    return model


def groups(seed, count=12):
    draw = random.Random(seed)

    def ids(low, high):
        return [draw.randrange(1, 128) for _ in range(draw.randint(low, high))]

    made = []
    for _ in range(count):
        prefix = ids(0, 90)
        made.append([prefix + ids(1, 40) for _ in range(draw.choice([2, 2, 3, 8]))])
    return made


def rewards_of(module, made, budget, device):
    found = [None] * len(made)
    for row in pack(made, budget):
        given = RowInput.of(row, device)
        out = module(given.ids, given.positions, given.layout)
        sizes = [len(made[i]) for i in row.members]
        for index, part in zip(row.members, out.split(sizes), strict=True):
            found[index] = part
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("at_rewards", [False, True])
def test_one_call_equals_the_calls_by_segment(at_rewards, window):
    layout = Layout(SPANS, "cuda")
    query, key, value = (states(h, torch.bfloat16, s) for h, s in ((8, 1), (4, 2), (4, 3)))
    if at_rewards:
        query = query[:, :, layout.ends]
    options = {"scaling": None, "dropout": 0.0, "window": window, "at_rewards": at_rewards}
    found = attention.attend(query, key, value, layout, **options)
    wanted = attention.attend(query.float(), key.float(), value.float(), layout, **options)
    # bfloat16 has 8 bits: relative steps of 1/256.
    assert (found.float() - wanted).abs().max() < 0.02


def test_gradients_of_one_call_equal_those_by_segment():
    layout = Layout(SPANS, "cuda")
    slopes = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [
            states(h, torch.bfloat16, s).to(dtype).requires_grad_()
            for h, s in ((8, 1), (4, 2), (4, 3))
        ]
        options = {"scaling": None, "dropout": 0.0, "window": None, "at_rewards": False}
        attention.attend(*inputs, layout, **options).float().square().sum().backward()
        slopes.append([x.grad.float() for x in inputs])
    for found, wanted in zip(*slopes, strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_float32_on_the_gpu_equals_the_cpu():
    made = groups(1)
    on_cpu = rewards_of(Packed(classifier()), made, 300, "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    on_gpu = rewards_of(Packed(classifier().to("cuda")), made, 300, "cuda").cpu()
    assert (on_gpu - on_cpu).abs().max() < 1e-4 * on_cpu.abs().max()


def test_bfloat16_shared_equals_bfloat16_alone_and_gradients_follow():
    made = groups(2)
    found = {}
    for kind in ("alone", "shared"):
        model = classifier().to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            if kind == "shared":
                out = rewards_of(Packed(model), made, 300, "cuda")
            else:
                plain = Padded(model)
                out = torch.cat([plain(*pad([ids], 0, "cuda")) for g in made for ids in g])
        losses.bradley_terry(out[::2], out[1::2]).sum().backward()
        slope = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[kind] = (out.detach(), slope)
    (alone, slope_alone), (shared, slope_shared) = found["alone"], found["shared"]
    assert (shared - alone).abs().max() < 0.05 * alone.abs().max()
    assert torch.nn.functional.cosine_similarity(slope_shared, slope_alone, dim=0) > 0.999


def test_the_backward_pass_gives_the_same_bits_twice(monkeypatch):
    # The fused kernel adds up in any order unless it is told not to; the repeated keys are ours.
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    made = groups(3)
    slopes = []
    for _ in range(2):
        model = classifier().to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            rewards_of(Packed(model), made, 300, "cuda").sum().backward()
        slopes.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_a_training_run_on_the_gpu_learns(tmp_path):
    import json

    from tiny import build_lm

    from polarctl.cli import run

    base = build_lm(tmp_path / "base", hidden_size=256, layers=2)
    rows = [
        {"prompt": f"q{i}", "reference": right, "chosen": right, "rejected": wrong}
        for i in range(64)
        for right, wrong in [("yes", "no") if i % 2 else ("no", "yes")]
    ]
    data = tmp_path / "triples.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "rm"
    arguments = ["pretrain", str(data), "-m", str(base), "-o", str(out), "--device", "cuda"]
    assert run([*arguments, "--lr", "1e-3", "--batch-size", "16", "--epochs", "15"]) == 0
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] > 0.9


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_in_half_precision_every_layer_is_one_call(way, monkeypatch):
    """Over float32 weights autocast leaves queries and keys float32: a dense kernel would run."""
    calls = []
    one_call = attention._in_one_call

    def counted(query, key, value, *rest):
        calls.append((query.dtype, key.dtype, value.dtype))
        return one_call(query, key, value, *rest)

    def dense(*_, **__):
        raise AssertionError("a dense kernel ran")

    module = Packed(classifier().to("cuda", torch.bfloat16 if way == "weights" else torch.float32))
    monkeypatch.setattr(attention, "_in_one_call", counted)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", dense)
    with torch.autocast("cuda", torch.bfloat16, enabled=way == "autocast"):
        out = rewards_of(module, groups(4), 100_000, "cuda")
    out.sum().backward()
    assert calls == [(torch.bfloat16,) * 3] * 3  # three layers, one row
    assert out.dtype == torch.float32
