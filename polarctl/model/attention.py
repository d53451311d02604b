"""Attention over rows of groups: every candidate sees its group's prefix and itself.

One function, registered with transformers' `AttentionInterface`, so that it serves every decoder
whose attention can be exchanged there. Over a prefix attention is causal; a candidate's tokens
attend to the prefix's keys and their own, causal from the bottom right. On a GPU in half precision
that is one variable-length call a layer; elsewhere one call a segment. There is no dense mask over
the row: it would cost what the sharing saves.

Shapes: T tokens of the row, R candidates of the row, H heads, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polarctl.model.packing import Span

NAME = "polarctl_shared_prefix"


class Layout:
    """Where the groups of a row lie, as the attention needs it.

    Args:
        spans: The row's groups, in order.
        device: Where the row is.

    Attributes:
        sizes: Tokens of every segment, prefixes and candidates, in order.
        ends: Index of every candidate's last token, where its reward is read. Shape: (R,).
    """

    def __init__(self, spans: Sequence[Span], device: Any = "cpu"):
        self.spans, self.device = tuple(spans), device
        self.sizes = [n for span in spans for n in (span.prefix, *span.branches) if n]
        ends, at = [], 0
        for span in self.spans:
            at += span.prefix
            for branch in span.branches:
                at += branch
                ends.append(at - 1)
        self.ends = torch.tensor(ends, device=device)
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._cumulative: dict[bool, tuple[Tensor, Tensor, int, int]] = {}

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What the last `queries` of `keys` tokens may see, for adding to scores.

        Shape: (queries, keys), 0 or minus infinity.
        """
        shape = (queries, keys, window, dtype)
        if shape not in self._masks:
            row = torch.arange(keys - queries, keys, device=self.device)[:, None]
            column = torch.arange(keys, device=self.device)
            hidden = column > row
            if window is not None:
                hidden |= column <= row - window
            mask = torch.zeros(queries, keys, dtype=dtype, device=self.device)
            self._masks[shape] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[shape]

    def cumulative(self, at_rewards: bool) -> tuple[Tensor, Tensor, int, int]:
        """Cumulative lengths of queries and keys, and the longest of each, for one call.

        Args:
            at_rewards: Each candidate's last token alone asks.
        """
        if at_rewards not in self._cumulative:
            queries: list[int] = []
            keys: list[int] = []
            for span in self.spans:
                if span.prefix and not at_rewards:
                    queries.append(span.prefix)
                    keys.append(span.prefix)
                for branch in span.branches:
                    queries.append(1 if at_rewards else branch)
                    keys.append(span.prefix + branch)
            sums = [
                F.pad(torch.tensor(n).cumsum(0, dtype=torch.int32), (1, 0)).to(self.device)
                for n in (queries, keys)
            ]
            self._cumulative[at_rewards] = (sums[0], sums[1], max(queries), max(keys))
        return self._cumulative[at_rewards]


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    polar_layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a row, with the signature that transformers calls.

    Args:
        module: The attention layer (unused).
        query: Shape: (1, H, T, D).
        key: Shape: (1, H_kv, T, D), H a multiple of H_kv.
        value: Shape: (1, H_kv, T, D).
        attention_mask: None, since none is made for this function.
        scaling: Factor of the scores.
        dropout: Share of the weights that is dropped.
        polar_layout: The row's layout.
        sliding_window: Tokens that a token sees at most, itself included.
        **kwargs: What else a model passes. Soft caps and sinks are refused.

    Returns:
        Shape: (1, T, H, D), and None in place of the weights.

    Raises:
        NotImplementedError: The model asks for something that is not done here.
    """
    if polar_layout is None:
        raise NotImplementedError("the model does not hand the row's layout to its attention")
    if attention_mask is not None:
        raise NotImplementedError("the model gives its attention a mask")
    for name in ("softcap", "s_aux", "attention_sinks"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the model's attention needs `{name}`")
    out = attend(
        query,
        key,
        value,
        polar_layout,
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        at_rewards=False,
    )
    return out.transpose(1, 2).contiguous(), None  # some models take views of it


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    at_rewards: bool,
) -> Tensor:
    """Attention of a row, of all its tokens or of its candidates' last ones alone.

    Args:
        query: Shape: (1, H, T, D), or (1, H, R, D) with `at_rewards`.
        key: Shape: (1, H_kv, T, D).
        value: Shape: (1, H_kv, T, D).
        layout: The row's layout.
        scaling: Factor of the scores; None: 1 / sqrt(D).
        dropout: Share of the weights that is dropped.
        window: Tokens that a token sees at most, itself included, or None.
        at_rewards: The queries are the candidates' last tokens.

    Returns:
        The shape of `query`.
    """
    longest = max(span.prefix + max(span.branches) for span in layout.spans)
    if window is not None and window >= longest:
        window = None
    query, key, value = _of_one_dtype(query, key, value)
    if not dropout and has_one_call(query, value):
        return _in_one_call(query, key, value, layout, scaling, window, at_rewards)
    keys, values = key.split(layout.sizes, dim=2), value.split(layout.sizes, dim=2)
    asked = [1] * len(layout.ends) if at_rewards else layout.sizes
    queries = iter(query.split(asked, dim=2))
    segments = iter(zip(keys, values, strict=True))
    grouped = query.shape[1] != key.shape[1]
    found = []

    def one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
        found.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=grouped
            )
        )

    def causal_mask(q: Tensor, k: Tensor) -> Tensor:
        return layout.mask(q.shape[2], k.shape[2], window, q.dtype)

    for span in layout.spans:
        if span.prefix:
            prefix_key, prefix_value = next(segments)
            if not at_rewards:
                q = next(queries)
                mask = None if window is None else causal_mask(q, prefix_key)
                one(q, prefix_key, prefix_value, mask, mask is None)
        for _ in span.branches:
            k, v = next(segments)
            q = next(queries)
            if span.prefix:
                k, v = torch.cat([prefix_key, k], 2), torch.cat([prefix_value, v], 2)
            if window is None and q.shape[2] in (1, k.shape[2]):
                one(q, k, v, None, q.shape[2] > 1)
            else:
                one(q, k, v, causal_mask(q, k), False)
    return torch.cat(found, dim=2)


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the precision that the kernel is to compute in.

    Over float32 weights autocast gives values in half precision, but queries and keys that a
    rotary embedding or a norm in float32 has made float32 again: kernels want one precision.
    """
    kind = query.device.type
    dtype = value.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def has_one_call(query: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernel computes this: half precision, on a GPU from Ampere on.

    Args:
        query: Shape: (1, H, T, D).
        value: Shape: (1, H_kv, T, D_v).
    """
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _in_one_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    at_rewards: bool,
) -> Tensor:
    """`attend` by one variable-length call, which repeats each prefix's keys per candidate.

    Split and cat repeat them: their backward adds in a fixed order, that of an index does not.
    """
    from torch.nn.attention.varlen import varlen_attn

    cu_q, cu_k, max_q, max_k = layout.cumulative(at_rewards)
    out = varlen_attn(
        query[0].transpose(0, 1),
        _repeated(key[0].transpose(0, 1), layout, at_rewards),
        _repeated(value[0].transpose(0, 1), layout, at_rewards),
        cu_q,
        cu_k,
        max_q,
        max_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _repeated(states: Tensor, layout: Layout, at_rewards: bool) -> Tensor:
    """Keys or values in the order of the call: prefix, then prefix and candidate for each.

    Args:
        states: Shape: (T, H_kv, D).
        layout: The row's layout.
        at_rewards: The prefixes do not ask for themselves.
    """
    parts = iter(states.split(layout.sizes))
    ordered: list[Tensor] = []
    for span in layout.spans:
        prefix = [next(parts)] if span.prefix else []
        if not at_rewards:
            ordered += prefix
        for _ in span.branches:
            ordered += [*prefix, next(parts)]
    return torch.cat(ordered)
