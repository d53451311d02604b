"""Every decoder of the installed transformers: do shared prefixes give the model's own numbers?

    python tests/benchmarks/sweep_architectures.py            # writes docs/architectures.md
    python tests/benchmarks/sweep_architectures.py llama phi3 # prints these rows

A tiny model of each type is made in float64: as its config is by default, with a sliding window,
and with each kind of scaled positions that it takes. Its loss and the norm of its gradient are
computed one sequence at a time by the library alone, then as training and scoring do it. Sequences
are shorter and longer than windows and original context; where a type has layers of several kinds,
so has the tiny model.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from polarctl import console
from polarctl.model.forward import Packed, Padded, RowInput, module_of
from polarctl.model.miniature import Exact
from polarctl.model.packing import pack
from polarctl.model.reward_model import pad
from polarctl.training import losses

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
LIMIT, WINDOW, LAYERS = 20, 6, 4
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# What a type needs beside, to be tiny at all or to have all of its parts.
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_neox": {"num_attention_heads": 2, "head_dim": 16},  # a quarter of it is rotated
    "gptj": {"rotary_dim": 4},
    "olmo": {"clip_qkv": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phimoe": {"sliding_window": None},
    "qwen3_5_text": {"head_dim": 16},  # a quarter of it is rotated
    "qwen3_next": {"head_dim": 16},
    "stablelm": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 4},  # as published: the last of four has none
    "zamba2": {"num_hidden_layers": 6},
}
LIMITS = {"original_max_position_embeddings": LIMIT}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, **LIMITS},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LIMITS},
    "longrope": {"factor": 4.0, **LIMITS},
}
# Tokens that the candidates of a group share, and those of each candidate's own.
SHAPES = ((5, (3, 4)), (26, (9, 2)), (0, (7,)), (15, (2, 8, 12)), (19, (1, 1)))
TOLERANCE = 1e-6
OUTCOMES = {
    "reward tokens": "shared, the last layer at reward tokens alone",
    "shared": "shared",
    "whole": "whole sequences",
}


@dataclass(frozen=True)
class Found:
    """What came of a type in one variant.

    Attributes:
        outcome: One of `OUTCOMES`.
        loss: Relative error of the loss.
        norm: Relative error of the gradient's norm.
        reason: Why nothing is shared, or empty.
    """

    outcome: str
    loss: float
    norm: float
    reason: str


def decoders() -> list[str]:
    """Types that read their reward at the last token, and can be built."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = []
    for kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        if kind in causal and kind != "gpt-sw3":  # which is GPT-2
            try:
                with Exact():  # which refuses large tensors
                    made = model_of(kind, "default")
            except Exception:
                continue
            if hasattr(made, "score"):
                found.append(kind)
    return found


def config_of(kind: str, variant: str, frequencies: int = 4) -> Any:
    """The tiny config of a type.

    Args:
        kind: Model type.
        variant: `default`, `window` or a kind of scaled positions.
        frequencies: Frequencies of its rotary embedding.
    """
    given = dict(TINY)
    first = transformers.AutoConfig.for_model(kind)
    if hasattr(first, "kv_lora_rank"):
        given.update(LATENT)
    else:
        given["head_dim"] = 8
    given.update(OWN.get(kind, {}))
    if variant == "window":
        given.update(sliding_window=WINDOW, use_sliding_window=True, max_window_layers=2)
    elif hasattr(first, "sliding_window") and first.sliding_window:
        given["sliding_window"] = WINDOW
    if variant == "dynamic":
        given["max_position_embeddings"] = LIMIT
    elif variant == "longrope":
        given.update(LIMITS)
    config = transformers.AutoConfig.for_model(kind, **given)
    rope = copy.deepcopy(getattr(config, "rope_parameters", None) or {})
    own = rope if "rope_type" in rope else rope.get("full_attention", {})
    if variant in ROPES:
        own.update(rope_type=variant, **ROPES[variant])
        if kind == "phimoe":
            own.update(short_mscale=1.1, long_mscale=1.3, **LIMITS)
        if variant == "longrope":
            own["short_factor"] = [1 + 0.1 * i for i in range(frequencies)]
            own["long_factor"] = [1.5 + 2.0 * i for i in range(frequencies)]
    elif "original_max_position_embeddings" in own:
        own.update(LIMITS)
    if rope:
        config = transformers.AutoConfig.for_model(kind, **{**given, "rope_parameters": rope})
    return config


def model_of(kind: str, variant: str, frequencies: int = 4) -> Any:
    """A tiny classifier with random weights, none of them at its default."""
    config = config_of(kind, variant, frequencies)
    config._experts_implementation = "eager"  # the other one has no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = transformers.AutoModelForSequenceClassification.from_config(config).double().eval()
        for weight in made.parameters():
            noise = torch.randn_like(weight)
            weight.data = 0.3 * noise if weight.ndim > 1 else weight.data + 0.2 * noise
    return made


def variants_of(kind: str) -> Iterator[tuple[str, int]]:
    """(variant, frequencies of its rotary embedding) of a type."""
    yield "default", 4
    config = config_of(kind, "default")
    if hasattr(config, "sliding_window"):
        yield "window", 4
    rope = getattr(config, "rope_parameters", None) or {}
    if not any(name in rope for name in ("rope_type", "full_attention")):
        return
    with Exact():
        made = model_of(kind, "default")
    sizes = [b.numel() for n, b in made.named_buffers() if n.endswith("inv_freq")]
    if sizes:
        yield from ((name, sizes[0]) for name in ROPES)


def groups() -> list[list[list[int]]]:
    """Random token ids."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, 64) for _ in range(count)]

    return [[p + ids(n) for n in own] for shared, own in SHAPES for p in [ids(shared)]]


def objective(rewards: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry of each group's first against its others; squares of those alone."""
    total = rewards.new_zeros(())
    for own in rewards.split([len(c) for _, c in SHAPES]):
        chosen = own[:1].expand(len(own) - 1)
        pairs = losses.bradley_terry(chosen, own[1:]) if len(own) > 1 else own.square()
        total = total + pairs.mean()
    return total / len(SHAPES)


def slope(model: Any, loss: torch.Tensor) -> float:
    """Norm of the gradient."""
    model.zero_grad()
    loss.backward()
    slopes = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(slopes).norm())


def by_the_library(model: Any) -> torch.Tensor:
    """Rewards of the sequences, each alone, by the eager code of the model's own file."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    flat = [ids for group in groups() for ids in group]
    found = {}
    # In order of length, or dynamic positions would remember what was longer.
    for index in sorted(range(len(flat)), key=lambda i: len(flat[i])):
        states = model.base_model(input_ids=torch.tensor([flat[index]]), use_cache=False)[0]
        found[index] = model.score(states[0, -1]).squeeze()
    model.set_attn_implementation(before)
    return torch.stack([found[i] for i in range(len(flat))])


def by_us(module: Packed | Padded) -> torch.Tensor:
    """The same as training and scoring compute them."""
    if isinstance(module, Padded):
        return module(*pad([ids for group in groups() for ids in group], 0, "cpu"))
    (row,) = pack(groups(), 10_000, module.kind)
    given = RowInput.of(row, "cpu")
    found = module(given.ids, given.positions, given.layout)
    parts = found.split([len(SHAPES[i][1]) for i in row.members])
    return torch.cat([parts[row.members.index(i)] for i in range(len(SHAPES))])


def tried(kind: str, variant: str, frequencies: int) -> Found:
    """Compare one type in one variant."""
    before = console.snapshot()
    with Exact():
        model = model_of(kind, variant, frequencies)
        loss = objective(by_the_library(model))
        norm = slope(model, loss)
        console.configure(quiet=True, verbose=False, color=False, json_lines=False)
        module = module_of(model)
        choices = console.choices()
        console.restore(before)
        again = objective(by_us(module))
        norm_again = slope(model, again)
    if isinstance(module, Padded):
        outcome, reason = "whole", choices["attention"]["reason"]
    else:
        outcome, reason = ("reward tokens" if module.reward_only else "shared"), ""
    return Found(
        outcome,
        float((again - loss).detach().abs() / loss.detach().abs()),
        abs(norm_again - norm) / norm,
        reason,
    )


def sweep(
    kinds: list[str], variants: tuple[str, ...] | None = None
) -> Iterator[tuple[str, dict[str, Found]]]:
    """(type, {variant: what came of it}); a variant that the library cannot compute is left out."""
    for kind in kinds:
        found = {}
        for variant, frequencies in variants_of(kind):
            if variants is not None and variant not in variants:
                continue
            try:
                found[variant] = tried(kind, variant, frequencies)
            except Exception as error:
                print(f"{kind}, {variant}: {type(error).__name__}: {error}", file=sys.stderr)
        if found:
            yield kind, found


def cell(found: Found | None) -> str:
    """A variant in the table."""
    return "" if found is None else found.outcome


def page(results: list[tuple[str, dict[str, Found]]]) -> str:
    """docs/architectures.md."""
    names = ["default", "window", *ROPES]
    rows, reasons = [], []
    for kind, found in results:
        worst = max(max(one.loss, one.norm) for one in found.values())
        cells = [cell(found.get(name)) for name in names]
        rows.append(f"| `{kind}` | {' | '.join(cells)} | {worst:.0e} |")
        why = {one.reason: None for one in found.values() if one.reason}
        which = [name for name, one in found.items() if one.reason]
        where = "" if len(which) == len(found) else f" ({', '.join(which)})"
        reasons += [f"* `{kind}`{where}: {text.partition(': ')[2]}" for text in list(why)[:1]]
    return f"""# Architectures: what is shared, and that it changes nothing

Made by `python tests/benchmarks/sweep_architectures.py` with transformers
{transformers.__version__} and torch {torch.__version__.partition("+")[0]};
`tests/model/test_architectures.py` makes the rows again and compares.

Every decoder type of transformers that can be built tiny, {len(results)} of them, computes a loss
and its gradient in float64: one sequence at a time by the library alone, and as training and
scoring do it. The texts are shorter and longer than windows and original context, and lie in one
row or one batch. "error" is the largest relative difference of the loss and of the gradient's norm.

* `reward tokens`: prefixes are shared, and the last layer is computed at reward tokens alone.
* `shared`: prefixes are shared.
* `whole`: nothing is shared. Whole sequences are padded; the run says so, with its reason.

"window" is a sliding window; the columns after it are kinds of scaled positions (`rope_type`). An
empty cell is something that the type does not have, or that the library cannot compute.

Nothing is looked up in this table. Every run finds out for its own config: a miniature of the
model, with the same kinds of layers, computes in float64 with and without sharing, to 1e-9.

| type | {" | ".join(names)} | error |
{"|---" * (len(names) + 2)}|
{chr(10).join(rows)}

Why nothing is shared:

{chr(10).join(reasons)}
"""


def main(kinds: list[str]) -> None:
    """Print some types, or write the page of all."""
    results = []
    transformers.logging.set_verbosity_error()
    for kind, found in sweep(kinds or decoders()):
        results.append((kind, found))
        for variant, one in found.items():
            print(f"{kind} {variant}: {one.outcome} {one.loss:.0e} {one.norm:.0e} {one.reason}")
    if not kinds:
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
