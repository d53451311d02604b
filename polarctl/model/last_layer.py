"""The last layer at reward tokens alone, for types whose layers are built like Llama's.

The head reads one token of a candidate, and no other layer reads the last one. So its queries,
output projection and MLP are computed at those tokens, and its keys and values at all of them. That
is the layer written a second time: a type is only in the list when it has been tried.

Shapes: T tokens of a row, R candidates, E width of the model.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from polarctl.model import attention
from polarctl.model.attention import Layout

# Types that `tests/test_architectures.py` has tried.
# Dropout between its parts must not be one of its options.
TYPES = frozenset(
    ["arcee", "gemma", "helium", "llama", "ministral", "mistral", "mixtral"]
    + ["qwen2", "qwen3", "qwen3_moe"]
)


def at_rewards(
    layer: Any,
    hidden: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    polar_layout: Layout,
    **_: Any,
) -> Tensor:
    """The last layer at reward tokens alone: keys and values of all, everything else of those.

    Args:
        layer: A decoder layer of the Llama kind (pre-norm, gated MLP or any other).
        hidden: Shape: (1, T, E).
        position_embeddings: Cosines and sines of the rotary embedding.
        polar_layout: The row's layout.

    Returns:
        Shape: (1, R, E).
    """
    own, ends = layer.self_attn, polar_layout.ends
    normed = layer.input_layernorm(hidden)

    def heads(states: Tensor, norm: str) -> Tensor:
        states = states.view(*states.shape[:2], -1, own.head_dim)
        return (getattr(own, norm)(states) if hasattr(own, norm) else states).transpose(1, 2)

    query = heads(own.q_proj(normed[:, ends]), "q_norm")
    key = heads(own.k_proj(normed), "k_norm")
    value = heads(own.v_proj(normed), "")
    rotate = sys.modules[type(own).__module__].apply_rotary_pos_emb
    cos, sin = position_embeddings
    query = rotate(query, query, cos[:, ends], sin[:, ends])[0]
    key = rotate(key, key, cos, sin)[1]
    found = attention.attend(
        query,
        key,
        value,
        polar_layout,
        scaling=own.scaling,
        dropout=own.attention_dropout if layer.training else 0.0,
        window=getattr(own, "sliding_window", getattr(own.config, "sliding_window", None)),
        at_rewards=True,
    )
    picked = hidden[:, ends] + own.o_proj(found.transpose(1, 2).flatten(2))
    out: Tensor = picked + layer.mlp(layer.post_attention_layernorm(picked))
    return out
