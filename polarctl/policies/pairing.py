"""From trajectories to triples: which policies meet, and which of their samples.

A triple is a reference and a chosen text by one policy and a rejected text by another. Every
choice is made from the seed, the prompt's id and the index of the triple, so that the order of the
input and the way it is cut change nothing.

Balance: policies are drawn with the weight 1 / (prompts in which they can take that role), counted
over the whole input. Where all policies answered all prompts this is uniform; a policy with fewer
prompts is drawn more often in those that it has. Drawing first the reference's policy, then the
other, gives both roles to everybody.

Two samples of one policy are often the same text, above all where answers are short. What becomes
of such a triple is a choice, `equal_chosen`. They are kept by default: a small model learns to
compare from copies (measured in docs/guides/training.md).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from polarctl import seeding
from polarctl.model.template import plain_text
from polarctl.policies import nearness
from polarctl.policies.by_prompt import Groups, PromptGroup

# Samples of one policy and prompt that are combined; of more, a random part is taken.
MAX_SAMPLES = 8

Samples = tuple[int, int, int]  # of reference, chosen and rejected


class Pairing:
    """Draws triples, group by group.

    Args:
        groups: All groups, finished: the weights come from them.
        per_prompt: Triples per prompt at most.
        negatives: Rejected texts of a triple at most; those after the first go to `negatives`.
        require: Says of a policy's name whether it counts; one of the two must.
        equal_chosen: What becomes of a triple whose chosen text is its reference: `keep`; `drop`
            leaves it out; `resample` takes other samples, of the same two policies first. White
            space does not make texts differ.
        max_similarity: A rejected text that is nearer than this to the reference or to the chosen
            text is passed over; 1: only an equal one (`nearness.similarity`).
        distance: Draws rejected policies near the reference's with preference
            (`nearness.weights`).
        seed: The run's seed.

    Attributes:
        counts: Prompts without a triple by reason, texts passed over, draws, and how many of them
            had a chosen text equal to the reference.
        roles: Policy to its triples as `reference` and as `rejected`.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        per_prompt: int = 1,
        negatives: int = 1,
        require: Callable[[str], bool] = lambda name: True,
        equal_chosen: str = "keep",
        max_similarity: float = 1.0,
        distance: nearness.Distance | None = None,
        seed: int = 0,
    ):
        self.negatives, self.equal_chosen = negatives, equal_chosen
        self.per_prompt, self.require, self.seed = per_prompt, require, seed
        self.max_similarity, self.distance = max_similarity, distance
        self.counts: Counter[str] = Counter()
        self.roles: dict[str, dict[str, int]] = {}
        self._words: dict[tuple[str, int], Counter[tuple[str, str]]] = {}  # of a group's texts
        self._first, self._second = groups.firsts, groups.seconds

    def triples(self, group: PromptGroup) -> Iterator[dict[str, Any]]:
        """The triples of a prompt, at most `per_prompt`.

        No pair of policies comes twice before all have come; no triple comes twice.
        """
        self.counts["prompts"] += 1
        self._words.clear()
        samples: dict[tuple[str, str], Iterator[Samples]] = {}
        spent: set[tuple[str, str]] = set()  # pairs of policies without a further triple
        closed: set[tuple[str, str]] = set()  # those, and the pairs of the round in hand
        made = drawn = tries = 0
        # What is dropped counts as drawn; what is drawn again does not.
        while (made if self.equal_chosen == "resample" else drawn) < self.per_prompt:
            pair = self._draw(
                group, closed, seeding.rng(self.seed, "pair", group.id, group.wrapper, tries)
            )
            tries += 1
            if pair is None:
                if closed == spent:
                    break
                closed = set(spent)  # every pair has come: the next round
                continue
            closed.add(pair)
            if pair not in samples:
                samples[pair] = self._combinations(group, *pair)
            chosen = self._next(group.outputs[pair[0]], samples[pair])
            if chosen is None:
                spent.add(pair)
                continue
            drawn += 1
            if self.equal_chosen == "drop" and self._is_copy(group.outputs[pair[0]], chosen):
                continue
            yield self._triple(group, *pair, chosen)
            made += 1
        self.counts["triples"] += made
        if not made:
            alike = bool(spent) or bool(drawn)
            self.counts[_why_none(group, alike, self.max_similarity < 1)] += 1

    def _next(self, texts: dict[int, Any], samples: Iterator[Samples]) -> Samples | None:
        """The next samples of two policies; of `resample`, the next that are not copies."""
        found = next(samples, None)
        if found is None:
            return None
        self.counts["draws"] += 1
        self.counts["chosen equal to the reference"] += self._is_copy(texts, found)
        while self.equal_chosen == "resample" and found and self._is_copy(texts, found):
            found = next(samples, None)
        return found

    def _is_copy(self, texts: dict[int, Any], samples: Samples) -> bool:
        """Whether the chosen text is the reference."""
        return plain_text(texts[samples[0]]) == plain_text(texts[samples[1]])

    def _draw(
        self, group: PromptGroup, closed: set[tuple[str, str]], rng: random.Random
    ) -> tuple[str, str] | None:
        """Two policies by their weights, or None when all pairs are closed."""
        firsts = group.firsts()
        while firsts:
            first = rng.choices(firsts, [1 / self._first[a] for a in firsts])[0]
            seconds = [
                b
                for b in group.seconds()
                if b != first
                and (self.require(first) or self.require(b))
                and (first, b) not in closed
            ]
            if seconds:
                even = [1 / self._second[b] for b in seconds]
                weights = nearness.weights(first, seconds, even, self.distance)
                return first, rng.choices(seconds, weights)[0]
            firsts.remove(first)
        return None

    def _combinations(self, group: PromptGroup, a: str, b: str) -> Iterator[Samples]:
        """Samples (reference, chosen, rejected) in random order; equal texts are left out."""
        rng = seeding.rng(self.seed, "samples", group.id, group.wrapper, a, b)
        ours, theirs = (sorted(group.outputs[name]) for name in (a, b))
        ours, theirs = (rng.sample(x, min(len(x), MAX_SAMPLES)) for x in (ours, theirs))
        every = [(i, j, k) for i, j in itertools.permutations(ours, 2) for k in theirs]
        rng.shuffle(every)
        for i, j, k in every:
            rejected = plain_text(group.outputs[b][k])
            if rejected in (plain_text(group.outputs[a][i]), plain_text(group.outputs[a][j])):
                self.counts["identical texts passed over"] += 1
                continue
            if self._are_near(group, (b, k), (a, i), (a, j)):
                self.counts["similar texts passed over"] += 1
                continue
            yield i, j, k

    def _are_near(
        self, group: PromptGroup, rejected: tuple[str, int], *others: tuple[str, int]
    ) -> bool:
        """Whether a rejected text is nearer than allowed to one of the others."""
        if self.max_similarity >= 1:
            return False
        for key in (rejected, *others):
            if key not in self._words:
                self._words[key] = nearness.pairs_of_words(group.outputs[key[0]][key[1]])
        words = self._words
        near = (nearness.similarity(words[rejected], words[other]) for other in others)
        return any(share > self.max_similarity for share in near)

    def _triple(self, group: PromptGroup, a: str, b: str, samples: Samples) -> dict[str, Any]:
        self._role(a)["reference"] += 1
        self._role(b)["rejected"] += 1
        reference, chosen, rejected = samples
        record = {
            "id": group.id,
            "prompt": group.prompt,
            "reference": group.outputs[a][reference],
            "chosen": group.outputs[a][chosen],
            "rejected": group.outputs[b][rejected],
            "wrapper": group.wrapper,
            "reference_policy": a,
            "policy": a,
            "rejected_policy": b,
        }
        more = self._further(group, a, b, samples)
        if more:
            record["negatives"] = more
        return record if group.category is None else {**record, "category": group.category}

    def _further(self, group: PromptGroup, a: str, b: str, samples: Samples) -> list[Any]:
        """Further rejected texts, of any policy but the first, in random order, none twice."""
        if self.negatives == 1:
            return []
        rng = seeding.rng(self.seed, "negatives", group.id, group.wrapper, a, b, *samples)
        others = sorted(
            (name, k) for name in group.outputs if name != a for k in group.outputs[name]
        )
        if self.distance is None:
            rng.shuffle(others)
        else:
            names = sorted({name for name, _ in others})
            weights = nearness.weights(a, names, [1.0] * len(names), self.distance)
            weight = dict(zip(names, weights, strict=True))
            others = nearness.shuffled([(weight[x[0]], x) for x in others], rng.random)
        ours = [(a, k) for k in samples[:2]]
        seen = [plain_text(group.outputs[a][k]) for k in samples[:2]]
        seen.append(plain_text(group.outputs[b][samples[2]]))
        found: list[Any] = []
        for name, k in others:
            if len(found) == self.negatives - 1:
                break
            text = group.outputs[name][k]
            words = plain_text(text)
            if words not in seen and not self._are_near(group, (name, k), *ours):
                seen.append(words)
                found.append(text)
        return found

    def _role(self, policy: str) -> dict[str, int]:
        return self.roles.setdefault(policy, {"reference": 0, "rejected": 0})


def _why_none(group: PromptGroup, identical: bool, similar: bool) -> str:
    if identical:
        return f"prompts with {'too similar' if similar else 'identical'} texts"
    if len(group.outputs) == 1:
        return "prompts with one policy"
    if not group.firsts():
        return "prompts with single samples only"
    return "prompts without a required policy"
