"""The micro-batches of a step: rows of groups with shared prefixes, or padded whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from polarctl.model.forward import RowInput
from polarctl.model.packing import Ids, Kind, Row, pack, span_of
from polarctl.model.reward_model import pad
from polarctl.training.losses import Loss


class Candidates(Protocol):
    """A training group: chosen first, then one or several rejected."""

    @property
    def ids(self) -> Sequence[Ids]:
        """Token ids of each candidate."""

    @property
    def margin(self) -> float:
        """The margin that the record asks for."""


@dataclass(frozen=True, kw_only=True)
class Micro:
    """What goes through the model at once.

    Attributes:
        groups: The groups, in the order of their rewards.
        row: The row that holds them; None: they go as a padded batch.
        pad_id: What fills the gaps of that.
        weight: 1, or 0 for a micro-batch that only keeps a process in step with the others.
    """

    groups: list[Candidates]
    row: Row | None
    pad_id: int
    weight: float = 1.0

    @property
    def computed(self) -> int:
        """Tokens that go through the model, padding included."""
        if self.row is not None:
            return len(self.row.ids)
        sequences = [ids for group in self.groups for ids in group.ids]
        return len(sequences) * max(map(len, sequences))

    def inputs(self, device: Any) -> tuple[Any, ...]:
        """Arguments of the module (`polarctl.model.forward.Packed` or `Padded`), on a device."""
        if self.row is not None:
            made = RowInput.of(self.row, device)
            return made.ids, made.positions, made.layout
        return pad([ids for group in self.groups for ids in group.ids], self.pad_id, device)


def micro_batches(
    groups: Sequence[Candidates],
    budget: int,
    *,
    shared: bool,
    pad_id: int,
    kind: Kind | None = None,
) -> list[Micro]:
    """Cut groups into micro-batches.

    Args:
        groups: The groups of this process's share of a step.
        budget: Tokens of a micro-batch, padding included; a larger group goes alone.
        shared: Rows with shared prefixes, else padded batches.
        pad_id: Token id of the padding.
        kind: The kind of a length, of models whose positions depend on it.
    """
    if shared:
        rows = pack([group.ids for group in groups], budget, kind)
        return [
            Micro(groups=[groups[i] for i in row.members], row=row, pad_id=pad_id) for row in rows
        ]
    # Neighbours by length, so that little is padded.
    order = sorted(groups, key=lambda group: max(map(len, group.ids)))
    result: list[list[Candidates]] = []
    for group in order:
        longest = max(map(len, group.ids))
        count = sum(len(g.ids) for g in result[-1]) if result else 0
        if not result or (count + len(group.ids)) * longest > budget:
            result.append([])
        result[-1].append(group)
    return [Micro(groups=part, row=None, pad_id=pad_id) for part in result]


def idle(
    groups: Sequence[Candidates], *, shared: bool, pad_id: int, kind: Kind | None = None
) -> Micro:
    """The cheapest micro-batch without weight, for a process that has fewer than the others."""
    least = min(groups, key=lambda group: span_of(group.ids).tokens)
    (micro,) = micro_batches([least], 1, shared=shared, pad_id=pad_id, kind=kind)
    return Micro(groups=micro.groups, row=micro.row, pad_id=pad_id, weight=0.0)


@dataclass(frozen=True)
class Terms:
    """Sums over the groups of a micro-batch.

    Attributes:
        loss: With gradient. Shape: ().
        figures: Loss, groups ranked right, margin of rewards; float64, no gradient. Shape: (3,).
    """

    loss: Tensor
    figures: Tensor


def terms(loss: Loss, rewards: Tensor, groups: Sequence[Candidates]) -> Terms:
    """The loss of some groups: of each the mean over its pairs.

    Args:
        loss: The loss of a pair.
        rewards: Candidate by candidate, in the order of the groups. Shape: (R,).
        groups: The groups.
    """
    chosen: list[int] = []
    rejected: list[int] = []
    share: list[float] = []
    margin: list[float] = []
    at = 0
    for group in groups:
        negatives = len(group.ids) - 1
        chosen += [at] * negatives
        rejected += range(at + 1, at + 1 + negatives)
        share += [1 / negatives] * negatives
        margin += [group.margin] * negatives
        at += 1 + negatives

    def moved(values: list[Any], dtype: Any) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=rewards.device)

    first, second = rewards[moved(chosen, torch.long)], rewards[moved(rejected, torch.long)]
    shares = moved(share, rewards.dtype)
    per_pair = loss(first, second, moved(margin, rewards.dtype) if any(margin) else None)
    total = (per_pair * shares).sum()
    gap = (first - second).detach().double()
    shares = shares.double()
    figures = [(per_pair.detach() * shares).sum(), ((gap > 0) * shares).sum(), (gap * shares).sum()]
    return Terms(total, torch.stack(figures))
