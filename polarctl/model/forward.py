"""From token ids to rewards: a row of groups with shared prefixes, or plain padded sequences.

The head reads one token of a candidate. So the last layer, which no other layer reads, computes
queries, output projection and MLP at those tokens alone; and no language-model head is ever built.

Shapes: T tokens of a row, R candidates, E width of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from polarctl.errors import UsageError
from polarctl.model import attention
from polarctl.model.attention import Layout
from polarctl.model.head import head
from polarctl.model.packing import Row, alone, pack
from polarctl.model.positions import Kind, kind_of_length, of_own_length
from polarctl.model.reward_model import rewards

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


@dataclass(frozen=True, kw_only=True)
class RowInput:
    """A row as the model takes it.

    Attributes:
        ids: Token ids. Shape: (1, T).
        positions: Positions. Shape: (1, T).
        layout: Where the groups lie.
    """

    ids: Tensor
    positions: Tensor
    layout: Layout

    @classmethod
    def of(cls, row: Row, device: Any) -> RowInput:
        """The input of a packed row, on a device."""
        return cls(
            ids=torch.tensor([row.ids], device=device),
            positions=torch.tensor([row.positions], device=device),
            layout=Layout(row.spans, device),
        )


class Packed(nn.Module):
    """Rewards of a row's candidates. The classifier's attention is exchanged for as long as it is.

    Args:
        classifier: A `...ForSequenceClassification` with one label.
        reward_only: Compute the last layer at reward tokens alone, where it is built for that.

    Raises:
        UsageError: Its attention cannot be exchanged, or gives something else then.
    """

    def __init__(self, classifier: Any, *, reward_only: bool = True):
        super().__init__()
        transformers.AttentionInterface.register(attention.NAME, attention.shared_prefix_attention)
        self.classifier = classifier
        if classifier.config._attn_implementation == attention.NAME:  # exchanged before
            classifier.set_attn_implementation("sdpa")
            for layer in _last_layer(classifier):
                layer.__dict__.pop("forward", None)
        self._before = classifier.config._attn_implementation
        # In a tuple, or it would count as a part of this module once more.
        self._last = _last_layer(classifier) if reward_only else ()
        training = classifier.training
        classifier.eval()
        try:
            wanted = _plain_states(classifier)
            self._exchange()
            why = "" if _close(_packed_states(classifier), wanted) else "its values change with it"
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            why = str(error)  # NotImplementedError, of our own attention, is a RuntimeError
        classifier.train(training)
        if why:
            self.restore()
            raise _unsupported(classifier, why)

    def _exchange(self) -> None:
        self.classifier.set_attn_implementation(attention.NAME)
        for layer in self._last:
            layer.forward = partial(_at_rewards, layer)

    def restore(self) -> None:
        """Give the classifier its own attention and last layer back."""
        self.classifier.set_attn_implementation(self._before)
        for layer in self._last:
            layer.__dict__.pop("forward", None)

    @property
    def kind(self) -> Kind | None:
        """What lengths must have in common to share a prefix; for `polarctl.model.packing`."""
        return kind_of_length(self.classifier.config)

    @property
    def reward_only(self) -> bool:
        """Whether the last layer is computed at reward tokens alone."""
        return bool(self._last)

    def forward(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Rewards in the order of the candidates. Shape: (R,), at least float32."""
        return head(self.classifier, _states(self.classifier, ids, positions, layout))


class Padded(nn.Module):
    """Rewards of whole sequences in a padded batch, by the model's own attention."""

    kind = None  # of length: nothing is shared

    def __init__(self, classifier: Any):
        super().__init__()
        self.classifier = classifier

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards of right-padded sequences; see `polarctl.model.reward_model.rewards`."""
        return rewards(self.classifier, ids, mask)


def _states(classifier: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Hidden states, after the final norm, where the rewards are read. Shape: (R, E)."""
    kind = kind_of_length(classifier.config)
    own: Any = nullcontext()
    if kind is not None:
        own = of_own_length(classifier, *_kinds(layout, kind))
    with own:
        hidden: Tensor = classifier.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, polar_layout=layout
        )[0][0]
    return hidden if len(hidden) == len(layout.ends) else hidden[layout.ends]


def _kinds(layout: Layout, kind: Kind) -> tuple[list[Hashable], Tensor]:
    """The kind of length of every span, and the span of every token. Shape: (1, T)."""
    found: list[Hashable] = []
    for span in layout.spans:
        own = {kind(span.prefix + branch) for branch in span.branches}
        if len(own) > 1:
            raise ValueError("sequences of different kinds of length share a prefix")
        found += own
    sizes = torch.tensor([span.tokens for span in layout.spans])
    return found, torch.arange(len(sizes)).repeat_interleave(sizes)[None]


# -- the last layer -------------------------------------------------------------------------------


def _last_layer(classifier: Any) -> tuple[Any, ...]:
    """The last layer, if it is built as `_at_rewards` computes it; else nothing."""
    layers = getattr(classifier.base_model, "layers", None)
    if not layers:
        return ()
    last = layers[-1]
    parts = {name for name, _ in last.named_children()}
    if parts != _LAYER or not {n for n, _ in last.self_attn.named_children()} <= _ATTENTION:
        return ()
    own, config = last.self_attn, classifier.config
    # Which layers have a window is only known where the layer says it, or all have one.
    told = hasattr(own, "sliding_window") or config.model_type == "mistral"
    return (last,) if told or getattr(config, "sliding_window", None) is None else ()


def _at_rewards(
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


# -- the probe ------------------------------------------------------------------------------------
# Two groups, so that every kind of seam is there: prefix to candidate, candidate to candidate,
# group to group. Whatever a model does with positions, masks or scales, it shows here.

_PROBE = [[[3, 1, 4, 1, 5, 9], [3, 1, 4, 2, 6]], [[2, 7, 1, 8, 2], [2, 7, 1, 8, 1, 8, 2]]]


@torch.no_grad()
def _plain_states(classifier: Any) -> Tensor:
    found = []
    for (ids,) in alone(_PROBE):
        states = classifier.base_model(
            input_ids=torch.tensor([ids], device=classifier.device), use_cache=False
        )[0]
        found.append(states[0, -1])
    return torch.stack(found)


@torch.no_grad()
def _packed_states(classifier: Any) -> Tensor:
    given = RowInput.of(pack(_PROBE, 64)[0], classifier.device)
    found = _states(classifier, given.ids, given.positions, given.layout)
    # First-fit-decreasing may have put the second group first.
    order = [row for index in pack(_PROBE, 64)[0].members for row in (2 * index, 2 * index + 1)]
    return found[torch.tensor(order, device=found.device).argsort()]


def _close(found: Tensor, wanted: Tensor) -> bool:
    exact = found.dtype in (torch.float32, torch.float64)
    difference = (found - wanted).double().norm() / wanted.double().norm()
    return bool(difference < (1e-3 if exact else 5e-2))


def _unsupported(classifier: Any, why: str) -> UsageError:
    kind = getattr(classifier.config, "model_type", type(classifier).__name__)
    return UsageError(
        f"a `{kind}` model cannot share prefixes: {why}",
        hint="--no-shared-prefix trains it on whole sequences",
    )
