"""Groups of candidates with one prefix, several groups to a row.

Candidates of one prompt and reference differ only after a long common beginning. A row holds that
beginning once, then each candidate's own tokens:

    ids        [prefix of group 1 | candidate | candidate | prefix of group 2 | candidate | ...]
    positions  [0 ..... P-1       | P ..      | P ..      | 0 ...             | P ..      | ...]

so N candidates of P + c tokens take P + N c tokens in place of N (P + c). The prefix is that of the
token ids: a tokenizer that merges across the seam makes it shorter, never wrong. A row of groups of
one candidate each is the same thing without sharing.

In some models the positions depend on the length of a sequence (`polarctl.model.positions`). There
candidates share a prefix only with neighbours whose length is of the same kind: a group then lies
in the row as several spans.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

Ids = Sequence[int]
Kind = Callable[[int], Hashable]


@dataclass(frozen=True)
class Span:
    """A group of a row, or a part of one.

    `prefix` tokens are shared, then come each candidate's own, at least one.
    """

    prefix: int
    branches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return self.prefix + sum(self.branches)

    @property
    def unshared(self) -> int:
        """Tokens of its candidates as whole sequences."""
        return self.prefix * len(self.branches) + sum(self.branches)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Groups in one row.

    Attributes:
        members: Which groups, as indices into what was packed.
        ids: Token ids.
        positions: Position of every token in its own sequence.
        spans: The row's groups, in order; one of several kinds of length is several spans.
    """

    members: list[int]
    ids: list[int]
    positions: list[int]
    spans: tuple[Span, ...]


def common_prefix(sequences: Sequence[Ids]) -> int:
    """Length of the longest common beginning that leaves every sequence a token of its own.

    Args:
        sequences: Token ids of the candidates, none empty. One alone shares nothing: 0.
    """
    if len(sequences) < 2:
        return 0
    first, low, high = sequences[0], 0, min(map(len, sequences)) - 1
    while low < high:  # slices compare at the speed of C: bisection beats walking
        middle = (low + high + 1) // 2
        if all(other[low:middle] == first[low:middle] for other in sequences[1:]):
            low = middle
        else:
            high = middle - 1
    return low


def span_of(candidates: Sequence[Ids]) -> Span:
    """How a group lies in a row."""
    prefix = common_prefix(candidates)
    return Span(prefix, tuple(len(ids) - prefix for ids in candidates))


def parts_of(candidates: Sequence[Ids], kind: Kind | None = None) -> list[list[Ids]]:
    """A group cut between neighbours whose lengths are of different kinds.

    Args:
        candidates: Token ids of the candidates.
        kind: The kind of a length in tokens; None: there is one.
    """
    if kind is None:
        return [list(candidates)]
    return [list(part) for _, part in itertools.groupby(candidates, lambda ids: kind(len(ids)))]


def row_of(
    members: list[int], groups: Sequence[list[list[Ids]]], spans: Sequence[list[Span]]
) -> Row:
    """The row of some groups.

    Args:
        members: Indices into `groups`.
        groups: `parts_of` every group.
        spans: `span_of` every part of every group.
    """
    ids: list[int] = []
    positions: list[int] = []
    for index in members:
        for candidates, span in zip(groups[index], spans[index], strict=True):
            ids += candidates[0][: span.prefix]
            positions += range(span.prefix)
            for candidate in candidates:
                ids += candidate[span.prefix :]
                positions += range(span.prefix, len(candidate))
    return Row(
        members=members,
        ids=ids,
        positions=positions,
        spans=tuple(span for i in members for span in spans[i]),
    )


def pack(groups: Sequence[Sequence[Ids]], budget: int, kind: Kind | None = None) -> list[Row]:
    """Rows of at most `budget` tokens (or of one longer group), first-fit-decreasing.

    Args:
        groups: Token ids of the candidates of every group.
        budget: Tokens of one row.
        kind: The kind of a length in tokens: what candidates must have in common to share a
            prefix. None: all have.
    """
    cut = [parts_of(candidates, kind) for candidates in groups]
    spans = [[span_of(part) for part in parts] for parts in cut]
    bins = first_fit_decreasing([sum(span.tokens for span in found) for found in spans], budget)
    return [row_of(members, cut, spans) for members in bins]


def first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in bins of at most `budget`, the largest first, each into the first bin with room.

    At most 11/9 of the fewest bins, and 6/9 of one (Dosa 2007). Something larger than the budget
    goes alone.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        target = next((b for b, free in enumerate(room) if size <= free), None)
        if target is None:
            bins.append([index])
            room.append(budget - size)
        else:
            bins[target].append(index)
            room[target] -= size
    return bins


def portions(candidates: Sequence[Ids], budget: int) -> list[list[int]]:
    """A group's candidates, as indices, in portions that fit into a row with their prefix.

    Args:
        candidates: Token ids of the candidates.
        budget: Tokens of a row; a portion of one candidate may be longer.
    """
    span = span_of(candidates)
    found: list[list[int]] = []
    used = budget + 1
    for index, own in enumerate(span.branches):
        if used + own > budget:
            found.append([])
            used = span.prefix
        found[-1].append(index)
        used += own
    return found


def alone(groups: Iterable[Sequence[Ids]]) -> list[list[Ids]]:
    """Every candidate as a group of its own: nothing is shared."""
    return [[ids] for candidates in groups for ids in candidates]
