"""InternLM2's reward written out from the description of its architecture, one position at a time.

It reads the published weights as they are and knows nothing of transformers' Llama.
"""

import math

import torch


def frequencies(config: dict, length: int) -> torch.Tensor:
    """Angles per position of one head. Shape: (D / 2,).

    Dynamic NTK: base' = base (factor * length / longest - (factor - 1)) ** (D / (D - 2)), when the
    input is longer than `max_position_embeddings`.
    """
    dim = config["hidden_size"] // config["num_attention_heads"]
    base = float(config["rope_theta"])
    scaling, longest = config["rope_scaling"], config["max_position_embeddings"]
    if scaling and scaling["type"] == "dynamic" and length > longest:
        factor = scaling["factor"]
        base *= (factor * length / longest - (factor - 1)) ** (dim / (dim - 2))
    values = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)])
    return values / scaling["factor"] if scaling and scaling["type"] == "linear" else values


def turned(vector: torch.Tensor, position: int, angles: torch.Tensor) -> torch.Tensor:
    """A query or key turned by its position: number i and number i + D/2 are one plane."""
    first, second = vector.chunk(2)
    cos, sin = torch.cos(position * angles), torch.sin(position * angles)
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm. Shape: (T, E)."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def attention(x: torch.Tensor, state: dict, at: str, config: dict) -> torch.Tensor:
    """Causal attention of grouped heads. Shape: (T, E)."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, group = config["hidden_size"] // heads, heads // kv_heads
    fused = x @ state[at + "wqkv.weight"].T + state.get(at + "wqkv.bias", 0)
    angles = frequencies(config, len(x))
    result = torch.zeros(len(x), heads * dim)
    for kv in range(kv_heads):
        # The rows of one key-value head: its queries one after the other, its key, its value.
        start = kv * (group + 2) * dim
        block = [fused[:, start + i * dim : start + (i + 1) * dim] for i in range(group + 2)]
        keys = torch.stack([turned(key, p, angles) for p, key in enumerate(block[-2])])
        for number, queries in enumerate(block[:group]):
            head = kv * group + number
            for p, query in enumerate(queries):
                logits = keys[: p + 1] @ turned(query, p, angles) / math.sqrt(dim)
                result[p, head * dim : (head + 1) * dim] = logits.softmax(0) @ block[-1][: p + 1]
    return result @ state[at + "wo.weight"].T + state.get(at + "wo.bias", 0)


def feed_forward(x: torch.Tensor, state: dict, at: str) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x). Shape: (T, E)."""
    gate = x @ state[at + "w1.weight"].T
    up = x @ state[at + "w3.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ state[at + "w2.weight"].T


def reward(state: dict, config: dict, ids: list[int]) -> float:
    """The head's output on the last token of one sequence."""
    state = {name: tensor.float() for name, tensor in state.items()}
    eps = config["rms_norm_eps"]
    x = state["model.tok_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        x = x + attention(
            norm(x, state[at + "attention_norm.weight"], eps), state, at + "attention.", config
        )
        x = x + feed_forward(
            norm(x, state[at + "ffn_norm.weight"], eps), state, at + "feed_forward."
        )
    last = norm(x, state["model.norm.weight"], eps)[-1]
    return float(last @ state["v_head.weight"][0])
