"""From token ids to rewards: a row of groups with shared prefixes, or plain padded sequences.

The head reads one token of a candidate. So the last layer, which no other layer reads, computes
queries, output projection and MLP at those tokens alone; and no language-model head is ever built.

Shapes: T tokens of a row, R candidates, E width of the model.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from polarctl import console
from polarctl.errors import PolarctlError
from polarctl.model import attention, miniature
from polarctl.model.attention import Layout
from polarctl.model.head import head
from polarctl.model.last_layer import TYPES, at_rewards
from polarctl.model.packing import Row, alone, pack
from polarctl.model.positions import Kind, kind_of_length, of_own_length
from polarctl.model.reward_model import first_line, rewards

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


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


class CannotShare(PolarctlError):
    """A model's rewards change when prefixes are shared."""


class Packed(nn.Module):
    """Rewards of a row's candidates. The classifier's attention is exchanged for as long as it is.

    Args:
        classifier: A `...ForSequenceClassification` with one label.
        reward_only: Compute the last layer at reward tokens alone, where its type is known.
        checked: First compare with the plain formulation, on a miniature of the model.

    Raises:
        CannotShare: Its attention cannot be exchanged, or gives something else then.
    """

    def __init__(self, classifier: Any, *, reward_only: bool = True, checked: bool = True):
        super().__init__()
        transformers.AttentionInterface.register(attention.NAME, attention.shared_prefix_attention)
        self.classifier = classifier
        if classifier.config._attn_implementation == attention.NAME:  # exchanged before
            classifier.set_attn_implementation("sdpa")
            for layer in getattr(classifier.base_model, "layers", ()):
                layer.__dict__.pop("forward", None)
        self._before = classifier.config._attn_implementation
        # In a tuple, or it would count as a part of this module once more.
        self._last: tuple[Any, ...] = ()
        if reward_only and classifier.config.model_type in TYPES:
            self._last = (classifier.base_model.layers[-1],)
        if checked and (why := _difference(classifier, reward_only)):
            kind = classifier.config.model_type
            raise CannotShare(f"a `{kind}` model cannot share prefixes: {why}")
        try:
            classifier.set_attn_implementation(attention.NAME)
        except (ValueError, TypeError, AttributeError) as error:
            raise CannotShare(str(error)) from error
        for layer in self._last:
            layer.forward = partial(at_rewards, layer)

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


def module_of(classifier: Any, *, shared: bool = True) -> Packed | Padded:
    """The fastest way that gives a model's own rewards; what had to be left out is said.

    Args:
        classifier: A `...ForSequenceClassification` with one label.
        shared: Share prefixes, if its rewards stay what they are.
    """
    if not shared:
        return _padded(classifier)
    kind = classifier.config.model_type
    try:
        packed = Packed(classifier)
        if not packed.reward_only:
            reason = f"`{kind}` is not among the types that are tested without the other tokens"
            console.choice("last layer", "whole", reason)
        return packed
    except CannotShare as error:
        if kind in TYPES:
            try:
                packed = Packed(classifier, reward_only=False)
                console.choice("last layer", "whole", str(error))
                return packed
            except CannotShare as other:
                error = other
        console.choice("attention", "whole sequences, padded", str(error))
        return _padded(classifier)


def _padded(classifier: Any) -> Padded:
    """Whole sequences, by a kernel that does what the model's own code does.

    transformers lets some models run with a kernel that leaves out what it cannot do, such as the
    soft caps of Gemma 2.
    """
    before = classifier.config._attn_implementation
    if before == "sdpa" and (why := _difference_of_kernel(classifier, before)):
        classifier.set_attn_implementation("eager")
        console.choice("attention kernel", "eager", f"by `{before}` {why}")
    return Padded(classifier)


# -- the probe ------------------------------------------------------------------------------------
# Whatever a model does with positions, masks, windows or scales must show here: groups with and
# without a prefix, shorter and longer than a miniature's windows and context, and across the limit;
# every kind of seam.

_EXACT = 1e-9  # relative, in float64
_ON_WEIGHTS = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative; else 2e-2
_LONGEST = 2048  # tokens of a text for a model's own weights


def _groups(beyond: int) -> list[list[list[int]]]:
    """Random groups, the longest of which pass a number of tokens by far."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, miniature.VOCABULARY) for _ in range(count)]

    shapes = ((beyond + 9, (12, 9)), (5, (1, 3)), (0, (beyond // 2,)), (beyond - 3, (1, 2, 14)))
    return [[p + ids(n) for n in own] for shared, own in shapes for p in [ids(shared)]]


def _difference(classifier: Any, reward_only: bool) -> str:
    """Why a model's states change when prefixes are shared; empty if they do not."""
    others = set(getattr(classifier.config, "layer_types", None) or ()) - _ATTENTION
    if others:
        return f"it has layers of `{min(others)}`"
    groups = _groups(miniature.CONTEXT)
    with miniature.Exact():
        try:
            small = miniature.of(classifier)
            wanted = _plain_states(small, groups)
        except Exception as error:  # what it cannot compute by itself says nothing about sharing
            why = first_line(error)
        else:
            return _compared(small, groups, wanted, _EXACT, reward_only)
    return _difference_on_weights(classifier, reward_only, why)


def _difference_of_kernel(classifier: Any, name: str) -> str:
    """What is wrong with a kernel of the library, in words; empty if nothing is, or none knows."""
    groups = _groups(miniature.CONTEXT)
    with miniature.Exact():
        try:
            small = miniature.of(classifier)
            wanted = _plain_states(small, groups)
            small.set_attn_implementation(name)
            return _too_far(_plain_states(small, groups), wanted, _EXACT)
        except Exception:  # no miniature: the model stays as the library has made it
            return ""


def _difference_on_weights(classifier: Any, reward_only: bool, why: str) -> str:
    """The same with the model's own weights, for models that have no miniature."""
    text = classifier.config.get_text_config()
    beyond = miniature.CONTEXT
    for name in ("sliding_window", "attention_chunk_size"):
        beyond = max(beyond, getattr(text, name, None) or 0)
    if kind_of_length(text) is not None:
        beyond = max(beyond, text.max_position_embeddings)
    if beyond > _LONGEST:
        return f"no miniature ({why}), and texts longer than {beyond:,} tokens are too long to try"
    tolerance = _ON_WEIGHTS.get(classifier.dtype, 2e-2)
    console.choice(
        "check of sharing", f"own weights, to {tolerance:g}", f"the model has no miniature: {why}"
    )
    training, before = classifier.training, classifier.config._attn_implementation
    groups = _groups(beyond)
    try:
        classifier.eval()
        return _compared(
            classifier, groups, _plain_states(classifier, groups), tolerance, reward_only
        )
    except Exception as error:  # a model that cannot read these texts is not shared
        return first_line(error)
    finally:
        classifier.set_attn_implementation(before)
        classifier.train(training)


def _compared(
    classifier: Any, groups: Any, wanted: Tensor, tolerance: float, reward_only: bool
) -> str:
    """What is wrong with the states of a packed row, in words; empty if nothing is."""
    try:
        packed = Packed(classifier, reward_only=reward_only, checked=False)
        try:
            found = _packed_states(packed, groups)
        finally:
            packed.restore()
    except Exception as error:  # a model's own code, fed with what it does not expect
        return first_line(error)
    return _too_far(found, wanted, tolerance)


def _too_far(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    """How far states are from those that are wanted, in words; empty within a tolerance."""
    difference = float((found - wanted).double().norm() / wanted.double().norm())
    if difference < tolerance:
        return ""
    return f"its values change by {difference:.1e} (relative; at most {tolerance:g})"


@torch.no_grad()
def _plain_states(classifier: Any, groups: Any) -> Tensor:
    """States at reward tokens, each sequence alone. Shape: (R, E)."""
    found = []
    for (ids,) in alone(groups):
        given = torch.tensor([ids], device=classifier.device)
        kind = kind_of_length(classifier.config)
        # In a batch of one this only forgets the sequences before it.
        own = nullcontext() if kind is None else of_own_length(classifier, [0], 0 * given)
        with own:
            states = classifier.base_model(input_ids=given, use_cache=False)[0]
        found.append(states[0, -1])
    return torch.stack(found)


@torch.no_grad()
def _packed_states(packed: Packed, groups: Any) -> Tensor:
    """The same from one row. Shape: (R, E)."""
    classifier = packed.classifier
    (row,) = pack(groups, sum(len(ids) for group in groups for ids in group), packed.kind)
    given = RowInput.of(row, classifier.device)
    found = _states(classifier, given.ids, given.positions, given.layout)
    parts = found.split([len(groups[index]) for index in row.members])
    return torch.cat([parts[row.members.index(index)] for index in range(len(groups))])
