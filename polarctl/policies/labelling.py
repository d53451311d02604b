"""From a policy's own rollouts to triples: what it did right over what it did wrong.

A policy under reinforcement finds texts that the reward model likes and that are wrong. These are
the texts that the reward model has to see as rejected ones. Who is wrong is told by a number of
each rollout that the reward model did not give: a check, a verifier, a judge.

* `threshold`: rollouts whose number reaches a limit are right, the others wrong. Chosen is a right
  rollout that is not the reference. Without one it is another accepted text, where the prompt has
  some (`accept`); else the reference itself.
* `rank`: of the rollouts of one prompt in one step, the highest number over the lowest.

The right rollout comes first for a reason. A triple whose chosen text is the reference asks for
"a copy above a mistake", which a pre-trained reward model does already. Hacked rewards have
mistakes above right answers in other words, and only a chosen text in other words says so.

Nothing depends on the order of the input: texts are sorted before any is drawn, and the draws come
from the seed and the prompt's id. White space does not make texts differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from polarctl import seeding
from polarctl.errors import RecordError
from polarctl.model.template import content_text, plain_text
from polarctl.policies.by_prompt import ByPrompt, digest_of
from polarctl.records import Record, prompt_id

_SOURCES = ("a right rollout", "another accepted text", "the reference")


def numbers_of(record: Record) -> dict[str, float]:
    """The numbers of a rollout by name: its own fields, and its rewards' `components`."""
    found = {**(record.get("components") or {}), **record}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


@dataclass
class Written:
    """A text that was written at least once, in any spacing.

    Attributes:
        output: The text; of several spacings the first in the order of characters.
        policy: Who wrote it; of several the first in the order of names.
        lowest: Lowest number that it got.
        highest: Highest number that it got.
    """

    output: Any
    policy: str
    lowest: float
    highest: float

    def meet(self, other: Written) -> None:
        """Take in the same text, written again."""
        if content_text(other.output) < content_text(self.output):
            self.output = other.output
        self.policy = min(self.policy, other.policy)
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)


@dataclass
class RolloutGroup:
    """What a policy wrote for one prompt with one reference.

    Attributes:
        id: Identity of the prompt.
        prompt: The prompt.
        reference: Its reference.
        wrapper: `sft` or `pretrain`.
        category: Of the first rollout, or None.
        accept: Other texts that are right.
        parts: Step (or one part for all steps) to plain text to what was written.
        counts: Rollouts, and those without an answer (`floored`) or without a number.
    """

    id: str
    prompt: Any
    reference: Any
    wrapper: str
    category: str | None
    accept: list[Any]
    parts: dict[tuple[str, int], dict[str, Written]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, record: dict[str, Any], number: float | None, part: tuple[str, int]) -> None:
        """Take one rollout with the number that it is judged by."""
        self.counts["rollouts"] += 1
        if record.get("floored"):
            self.counts["rollouts without an answer"] += 1
        elif number is None:
            self.counts["rollouts without a label"] += 1
        else:
            new = Written(record["output"], record["policy"], number, number)
            texts = self.parts.setdefault(part, {})
            texts.setdefault(plain_text(record["output"]), new).meet(new)


class Rollouts(ByPrompt[RolloutGroup]):
    """Rollouts by prompt, wrapper and reference.

    Args:
        name: The number that a rollout is judged by; one without it is left out.
        judge: Gives that number where a rollout does not bring it; None: nothing does.
        by_step: Keep the steps apart.

    Attributes:
        names: Name of every number met to how many rollouts have it.
    """

    def __init__(
        self,
        name: str,
        *,
        judge: Callable[[Record], float | None] | None = None,
        by_step: bool = False,
    ):
        super().__init__()
        self.name, self.judge, self.by_step = name, judge, by_step
        self.names: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Take one rollout; without `wrapper` it is `sft`.

        Raises:
            RecordError: It has no reference, or its `accept` holds no texts.
        """
        if "reference" not in record:
            raise RecordError("missing field `reference`", hint="`rft` writes it to its rollouts")
        if not all(isinstance(text, str) for text in _accepted(record)):
            raise RecordError("field `accept`: expected a text or a list of texts")
        numbers = numbers_of(record)
        self.names.update(numbers.keys())
        number = numbers.get(self.name)
        if number is None and self.judge is not None and not record.get("floored"):
            number = self.judge(record)
        self.keep(record, number, digest_of(content_text(record["reference"]).encode()).hex())

    def group(self, rows: Iterable[tuple[Any, dict[str, Any]]]) -> RolloutGroup:
        """See `ByPrompt`."""
        found: RolloutGroup | None = None
        for number, record in rows:
            if found is None:
                found = RolloutGroup(
                    prompt_id(record),
                    record["prompt"],
                    record["reference"],
                    record.get("wrapper", "sft"),
                    record.get("category"),
                    _accepted(record),
                )
            part = (record["policy"], record.get("step", 0)) if self.by_step else ("", 0)
            found.add(record, number, part)
        assert found is not None
        return found


def _accepted(record: dict[str, Any]) -> list[Any]:
    """The texts of `accept`; something that is no list as one that is no text."""
    found = record.get("accept", [])
    return found if isinstance(found, list) else [found]


class Labelling:
    """Draws triples, prompt by prompt.

    Args:
        rule: `threshold` or `rank`, see above.
        threshold: Number from which a rollout is right.
        gap: For `rank`: the two numbers differ by this at least, and always by more than 0.
        per_prompt: Triples per prompt at most. Every wrong text comes once before one comes again.
        negatives: Rejected texts of a triple at most; those after the first go to `negatives`.
        keep_copies: Make triples whose chosen text is the reference, where there is no other.
        seed: The run's seed.

    Attributes:
        counts: Triples, prompts without one by reason, and what the chosen texts are.
    """

    def __init__(
        self,
        *,
        rule: str = "threshold",
        threshold: float = 0.5,
        gap: float = 0.0,
        per_prompt: int = 1,
        negatives: int = 1,
        keep_copies: bool = True,
        seed: int = 0,
    ):
        self.rule, self.threshold, self.gap = rule, threshold, gap
        self.per_prompt, self.negatives, self.seed = per_prompt, negatives, seed
        self.keep_copies = keep_copies
        self.counts: Counter[str] = Counter()

    def triples(self, group: RolloutGroup) -> Iterator[dict[str, Any]]:
        """The triples of a prompt, at most `per_prompt`, none twice."""
        self.counts["prompts"] += 1
        self.counts += group.counts
        every = self._by_rank(group) if self.rule == "rank" else self._by_limit(group)
        for triple in islice(every, self.per_prompt):
            self.counts["triples"] += 1
            yield triple

    def _none(self, why: str) -> Iterator[dict[str, Any]]:
        self.counts[f"prompts {why}"] += 1
        return iter(())

    def _shuffled(self, group: RolloutGroup, what: str, items: list[Any]) -> list[Any]:
        key = (group.id, group.wrapper, content_text(group.reference))
        seeding.rng(self.seed, "rollouts", what, *key).shuffle(items)
        return items

    def _by_limit(self, group: RolloutGroup) -> Iterator[dict[str, Any]]:
        texts = {name: text for part in group.parts.values() for name, text in part.items()}
        if not texts:
            return self._none("without a label")
        copy = plain_text(group.reference)
        # A text that got labels of both kinds says nothing, nor does a wrong copy of the reference.
        wrong = sorted(n for n, w in texts.items() if w.highest < self.threshold and n != copy)
        right = sorted(n for n, w in texts.items() if w.lowest >= self.threshold and n != copy)
        self.counts["texts with labels of both kinds"] += sum(
            w.lowest < self.threshold <= w.highest for w in texts.values()
        )
        if not wrong:
            return self._none("without a wrong rollout")
        accepted = {plain_text(text): text for text in group.accept}
        accepted = {name: text for name, text in accepted.items() if name != copy}
        chosen: list[tuple[Any, str | None]]
        if right:
            chosen, source = [(texts[n].output, texts[n].policy) for n in right], _SOURCES[0]
        elif accepted:
            chosen, source = [(accepted[n], None) for n in sorted(accepted)], _SOURCES[1]
        elif self.keep_copies:
            chosen, source = [(group.reference, None)], _SOURCES[2]
        else:
            return self._none("without a right rollout")
        return self._drawn(group, chosen, [texts[n] for n in wrong], source)

    def _drawn(
        self,
        group: RolloutGroup,
        chosen: list[tuple[Any, str | None]],
        wrong: list[Written],
        source: str,
    ) -> Iterator[dict[str, Any]]:
        chosen, wrong = (
            self._shuffled(group, "chosen", chosen),
            self._shuffled(group, "wrong", wrong),
        )
        for turn in range(len(chosen)):
            for place, rejected in enumerate(wrong):
                text, policy = chosen[(place + turn) % len(chosen)]
                self.counts[f"chosen is {source}"] += 1
                others = [wrong[(place + more) % len(wrong)] for more in range(1, len(wrong))]
                yield self._triple(group, text, policy, rejected, others)

    def _by_rank(self, group: RolloutGroup) -> Iterator[dict[str, Any]]:
        if not group.parts:
            return self._none("without a label")
        copy, seen = plain_text(group.reference), set()
        pairs = []
        for _, texts in sorted(group.parts.items()):
            order = sorted((w.highest, name) for name, w in texts.items() if name != copy)
            if not order:
                continue
            (low, worst), (high, best) = order[0], order[-1]
            if high - low < self.gap or high <= low or (best, worst) in seen:
                continue
            seen.add((best, worst))
            between = [texts[n] for value, n in order[1:-1] if high - value >= self.gap]
            pairs.append((texts[best], texts[worst], [w for w in between if w.highest < high]))
        if not pairs:
            return self._none("without two rollouts far enough apart")
        return (
            self._triple(group, best.output, best.policy, worst, others)
            for best, worst, others in self._shuffled(group, "rank", pairs)
        )

    def _triple(
        self,
        group: RolloutGroup,
        chosen: Any,
        policy: str | None,
        rejected: Written,
        others: list[Written],
    ) -> dict[str, Any]:
        record = {
            "id": group.id,
            "prompt": group.prompt,
            "reference": group.reference,
            "chosen": chosen,
            "rejected": rejected.output,
            "wrapper": group.wrapper,
            "rejected_policy": rejected.policy,
        }
        if policy is not None:
            record["policy"] = policy
        if others and self.negatives > 1:
            record["negatives"] = [other.output for other in others[: self.negatives - 1]]
        return record if group.category is None else {**record, "category": group.category}
