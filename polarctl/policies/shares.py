"""Which policies answer which prompts, and the units of work that this makes.

A policy without a `weight` answers every prompt, in windows of consecutive ones. Policies with one
draw lots for each prompt, those of a kind (base, chat) among themselves. So with 131 base policies
of weight 2/131 each prompt has two of them, as in POLAR's recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from polarctl import console, seeding
from polarctl.policies.pool import Policy
from polarctl.policies.prompts import Prompts
from polarctl.policies.uniforms import uniforms
from polarctl.records import Record

Bools: TypeAlias = NDArray[np.bool_]
_SHARE = "share"
_NEAR_WHOLE = 1e-3  # what users' decimals of 2/131 add up to


def lots(ids: Sequence[str], policies: Sequence[Policy], seed: int) -> Bools:
    """Which of some policies with weights answer which prompts.

    Systematic sampling in a random order: for each prompt the policies are put in an order of their
    own, their weights end to end on a line, and a comb with a tooth at every whole number is laid
    on it at a random place. A policy is drawn with a probability of its weight, and the number of
    policies of a prompt is the sum of the weights, rounded up or down. It depends on the seed, the
    prompt's id and the policies' names and weights alone.

    Args:
        ids: Of the prompts.
        policies: With weights in (0, 1].
        seed: The run's seed.

    Returns:
        Shape: (prompts, policies).
    """
    own = np.array([seeding.derive(seed, _SHARE, id) for id in ids], dtype=np.uint64)
    names = [seeding.derive(seed, _SHARE, "policy", policy.name) for policy in policies]
    weights = np.array([policy.weight for policy in policies])
    keys = uniforms(own[:, None] ^ np.array(names, dtype=np.uint64)[None, :], 0)
    order = np.argsort(keys, axis=1)
    ends = np.cumsum(weights[order], axis=1)
    before = np.concatenate([np.zeros((len(ids), 1)), ends[:, :-1]], axis=1)
    first = uniforms(own, 0)[:, None]  # of the comb's teeth
    drawn = np.ceil(ends - first) > np.ceil(before - first)
    found = np.empty_like(drawn)
    np.put_along_axis(found, order, drawn, axis=1)
    return found


def by_kind(
    policies: Sequence[Policy], wrapper_of: Callable[[Policy], str]
) -> dict[str, list[Policy]]:
    """The policies with a weight, by their wrapper: those that draw lots among themselves."""
    kinds: dict[str, list[Policy]] = {}
    for policy in policies:
        if policy.weight < 1:
            kinds.setdefault(wrapper_of(policy), []).append(policy)
    return kinds


def in_words(kinds: Mapping[str, Sequence[Policy]]) -> Iterator[str]:
    """How many policies with a weight a prompt has, for each kind."""
    for wrapper, some in kinds.items():
        total = sum(policy.weight for policy in some)
        near = round(total)
        whole = abs(total - near) < _NEAR_WHOLE
        number = f"{near}" if whole else f"{math.floor(total)} or {math.ceil(total)}"
        kind = "chat" if wrapper == "sft" else "base"
        yield f"weights: a prompt has {number} of {len(some):,} {kind} policies with a weight"


class Shares:
    """The prompts of each policy, in units of work.

    A bit is held in memory for each prompt and each policy with a weight: 36 MB for 1,550,000
    prompts and 184 policies.

    Args:
        prompts: All prompts, with their identity.
        policies: The pool.
        wrapper_of: `sft` or `pretrain`, for a policy with a weight.
        rows: A unit of a policy with a weight has as many prompts at least, unless it is the last.
        seed: The run's seed.
    """

    def __init__(
        self,
        prompts: Prompts,
        policies: Sequence[Policy],
        wrapper_of: Callable[[Policy], str],
        *,
        rows: int,
        seed: int,
    ):
        self._prompts = prompts
        self._drawn: dict[str, bytearray] = {}  # a bit for each prompt, windows in whole bytes
        self._starts = [0]  # of each window in it
        self._units: dict[str, list[range]] = {}  # the windows of each unit
        self._totals: dict[str, int] = {}
        kinds = by_kind(policies, wrapper_of)
        for line in in_words(kinds):
            console.note(line)
        if not kinds:
            return
        names = [policy.name for some in kinds.values() for policy in some]
        self._drawn = {name: bytearray() for name in names}
        sizes: dict[str, list[int]] = {name: [] for name in names}
        for number in range(prompts.windows):
            window = prompts.window(number)
            self._starts.append(self._starts[-1] + -(-len(window) // 8))
            for kind, some in kinds.items():
                fits = [record.get("wrapper", kind) == kind for record in window]
                drawn = lots([record["id"] for record in window], some, seed)
                drawn &= np.array(fits, dtype=bool)[:, None]
                for column, policy in enumerate(some):
                    self._drawn[policy.name] += np.packbits(drawn[:, column]).tobytes()
                    sizes[policy.name].append(int(drawn[:, column].sum()))
        for name, counts in sizes.items():
            self._units[name] = joined(counts, rows)
            self._totals[name] = sum(counts)

    def total(self, policy: Policy) -> int:
        """Prompts that the policy is asked."""
        return self._totals.get(policy.name, len(self._prompts))

    def units(self, policy: Policy) -> int:
        """Units of work of the policy."""
        found = self._units.get(policy.name)
        return self._prompts.windows if found is None else len(found)

    def asked(self, policy: Policy, units: int) -> int:
        """Prompts of the policy's first units of work."""
        if units == self.units(policy):
            return self.total(policy)
        return sum(len(self.unit(policy, number)) for number in range(units))

    def of(self, policy: Policy) -> Iterator[Record]:
        """The policy's prompts."""
        for number in range(self.units(policy)):
            yield from self.unit(policy, number)

    def unit(self, policy: Policy, number: int) -> list[Record]:
        """The prompts of a unit of work, with their `id`."""
        if policy.name not in self._units:
            return self._prompts.window(number)
        found: list[Record] = []
        for window in self._units[policy.name][number]:
            records = self._prompts.window(window)
            place = slice(self._starts[window], self._starts[window + 1])
            bits = np.frombuffer(self._drawn[policy.name][place], dtype=np.uint8)
            found += [records[row] for row in np.flatnonzero(np.unpackbits(bits))]
        return found


def joined(counts: Sequence[int], least: int) -> list[range]:
    """Windows put together until they have so many prompts; those at the end may have fewer."""
    found, start, size = [], 0, 0
    for number, count in enumerate(counts, 1):
        size += count
        if size >= least:
            found.append(range(start, number))
            start, size = number, 0
    return [*found, range(start, len(counts))] if size else found
