"""Which weight of a Llama is which part of an InternLM2's.

`wqkv` holds, for each key-value head, the queries that read it, then the key, then the value:
[q_1 .. q_G, k, v]. Nothing is computed: every number of one layout is a number of the other.

Shapes: V vocabulary, E hidden, F feed-forward, K key-value heads, G queries of each, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat

Shape = tuple[int, ...]
_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How attention is divided: `kv` heads of keys, `group` queries for each, `dim` numbers."""

    kv: int
    group: int
    dim: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """The division that a Llama config names."""
        kv = config.num_key_value_heads
        return cls(kv=kv, group=config.num_attention_heads // kv, dim=config.head_dim)


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a weight is made: from which weights of the other layout, and its shape."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    shape: Shape


def split(wqkv: Tensor, which: str, heads: Heads) -> Tensor:
    """The queries, keys or values of a fused weight or bias.

    Args:
        wqkv: Shape: (K * (G + 2) * D, E) or (K * (G + 2) * D,).
        which: "q", "k" or "v".
        heads: The division.

    Returns:
        Shape: (K * G * D, ...) for "q", else (K * D, ...).
    """
    rest = wqkv.shape[1:]
    grouped = wqkv.reshape(heads.kv, heads.group + 2, heads.dim, *rest)
    start, stop = {"q": (0, -2), "k": (-2, -1), "v": (-1, None)}[which]
    return grouped[:, start:stop].reshape(-1, *rest)


def fuse(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """The fused weight or bias: `split` undone."""
    rest = q.shape[1:]
    parts = [part.reshape(heads.kv, -1, heads.dim, *rest) for part in (q, k, v)]
    return cat(parts, dim=1).reshape(-1, *rest)


def llama_weights(config: Any, *, head: bool) -> dict[str, Made]:
    """Every weight of the Llama: which weight of InternLM2's holds it.

    Args:
        config: A `LlamaConfig`.
        head: Whether there is a reward head.
    """
    heads = Heads.of(config)
    weights: dict[str, Made] = {}

    def same(llama: str, released: str, *shape: int) -> None:
        weights[llama] = Made(sources=(released,), make=lambda x: x, shape=shape)

    hidden, ffn = config.hidden_size, config.intermediate_size
    same("model.embed_tokens.weight", "model.tok_embeddings.weight", config.vocab_size, hidden)
    shapes = {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
    shapes["mlp.down_proj.weight"] = (hidden, ffn)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for llama, released in _LAYER.items():
            same(at + llama, at + released, *shapes.get(llama, (hidden,)))
        kinds: dict[str, Shape] = {"weight": (hidden,), "bias": ()}
        for kind, rest in kinds.items():
            if kind == "bias" and not config.attention_bias:
                continue
            for which in "qkv":
                rows = heads.kv * heads.dim * (heads.group if which == "q" else 1)
                weights[f"{at}self_attn.{which}_proj.{kind}"] = Made(
                    sources=(f"{at}attention.wqkv.{kind}",),
                    make=lambda x, which=which: split(x, which, heads),
                    shape=(rows, *rest),
                )
            same(f"{at}self_attn.o_proj.{kind}", f"{at}attention.wo.{kind}", hidden, *rest)
    same("model.norm.weight", "model.norm.weight", hidden)
    if head:
        same("score.weight", "v_head.weight", 1, hidden)
    return weights


def internlm2_weights(config: Any) -> dict[str, Made]:
    """Every weight of InternLM2's reward model: which weights of the Llama make it."""
    heads = Heads.of(config)
    weights: dict[str, Made] = {}
    for llama, made in llama_weights(config, head=True).items():
        name = made.sources[0]
        if ".wqkv." not in name:
            weights[name] = Made(sources=(llama,), make=made.make, shape=made.shape)
        elif name not in weights:
            rows = heads.kv * (heads.group + 2) * heads.dim
            weights[name] = Made(
                sources=tuple(llama.replace(".q_proj.", f".{x}_proj.") for x in "qkv"),
                make=lambda q, k, v: fuse(q, k, v, heads),
                shape=(rows, *made.shape[1:]),
            )
    return weights


def sources(weights: Mapping[str, Made]) -> set[str]:
    """All weights of the other layout that are read."""
    return {name for made in weights.values() for name in made.sources}
