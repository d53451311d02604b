"""What a data set holds, for its card: policies, tokens, lengths, and what cleaning did."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_TEXTS = ("prompt", "reference", "chosen", "rejected", "output")
# What is counted for a policy, and its column in the card.
COLUMNS = {
    "records": "Records",
    "reference": "As reference",
    "rejected": "As rejected",
    "tokens": "Tokens written",
    "length": "Cut by the limit",
    "loop": "Loops cut",
    "incomplete": "Endings cut back",
    "refusal": "Refusals",
    "empty": "Without text, left out",
    "unfit": "Prompts that do not fit",
}


# Counts of manifests that say what is not in the file, in words. Counts that are words already,
# such as those of `pair`, are told by `_SAYS_WHY`.
_WHY = {
    "repeated": "repeated prompts, taken once",
    "near_repeated": "rows with nearly a prompt that was there already",
    "empty": "samples without text",
    "no_pair": "rows without candidates that differ enough to compare",
    "unlabelled": "candidates without a label",
}
# The same in the counts of a policy.
_WHY_NOT = {
    "unfit": "prompts that a policy could not take",
    "too short": "texts that are too short",
    "too long": "texts that are too long",
    "other language": "texts in another language",
}
_SAYS_WHY = re.compile(r"(?:prompts|rollouts|texts|trajectories) with(?:out)? .*|.* passed over")
# What cleaning did to texts that are in the file.
_CLEANED = {
    "loop": "a repetition loop cut",
    "incomplete": "an ending cut back to the last whole sentence",
    "refusal": "nothing in them but a refusal",
}
_STEPS = 16  # lengths of a policy's texts are kept to a 16th of a doubling, 4 %


@dataclass
class Statistics:
    """Counts over records of any kind.

    Attributes:
        lengths: Field to how many texts have how many characters; of messages, their contents.
        policies: Policy to its counts, by the names of `COLUMNS`.
        policy_lengths: Policy to how many of its texts have about how many characters.
        discards: What is not in the file and why, in words, to how many.
    """

    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    policies: dict[str, Counter[str]] = field(default_factory=dict)
    policy_lengths: dict[str, Counter[int]] = field(default_factory=dict)
    discards: dict[str, int] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record."""
        for name in _TEXTS:
            if name in record:
                self.lengths.setdefault(name, Counter())[_characters(record[name])] += 1
        for candidate in record.get("candidates") or ():
            size = _characters(candidate.get("output"))
            self.lengths.setdefault("output", Counter())[size] += 1
            self._add_policy(candidate.get("name"), "records", candidate.get("output"))
        policy, rejected = record.get("policy"), record.get("rejected_policy")
        if isinstance(rejected, str):
            self._add_policy(policy, "reference", record.get("chosen"))
            self._add_policy(rejected, "rejected", record.get("rejected"))
        elif isinstance(policy, str):
            self._add_policy(policy, "records", record.get("output"))
            counts = self.policies[policy]
            counts["tokens"] += record.get("num_tokens") or 0
            counts["length"] += record.get("finish_reason") == "length"
            counts.update(record.get("cleaned") or ())

    def _add_policy(self, policy: Any, what: str, text: Any) -> None:
        if isinstance(policy, str):
            self.policies.setdefault(policy, Counter())[what] += 1
            if text is not None:
                self.policy_lengths.setdefault(policy, Counter())[_about(_characters(text))] += 1

    def add_manifest(self, counts: Mapping[str, Any]) -> None:
        """Take in what a manifest says of texts that are not in the file."""
        tallies = [(name, t) for name, t in (counts.get("policies") or {}).items() if is_counts(t)]
        for policy, tally in tallies:
            for what in ("empty", "unfit"):
                if tally.get(what):
                    self.policies.setdefault(policy, Counter())[what] += tally[what]
        found = {
            words: sum(tally.get(what, 0) for _, tally in tallies)
            for what, words in _WHY_NOT.items()
        }
        # `sample` sets aside more than those.
        known = found[_WHY_NOT["unfit"]] + (counts.get("empty") or 0)
        found["bad rows of the input"] = (counts.get("rejects") or 0) - known
        for name, count in counts.items():
            if isinstance(count, int) and (name in _WHY or _SAYS_WHY.fullmatch(name)):
                found[_WHY.get(name, name)] = count
        for why, count in found.items():
            if count > 0:
                self.discards[why] = self.discards.get(why, 0) + count

    def cleaned(self) -> Iterator[tuple[str, int, float]]:
        """What cleaning did, in words, to how many of the file's texts, and their share."""
        texts = sum(counts["records"] for counts in self.policies.values())
        for mark, words in _CLEANED.items():
            if count := sum(counts[mark] for counts in self.policies.values()):
                yield words, count, count / texts

    def texts(self) -> Iterator[tuple[str, int, int, int, int]]:
        """For each field: its name, characters in all, median, 95th percentile, longest."""
        for name, lengths in self.lengths.items():
            total = sum(size * count for size, count in lengths.items())
            yield name, total, quantile(lengths, 0.5), quantile(lengths, 0.95), max(lengths)

    def columns(self) -> list[str]:
        """Names of the counts that some policy has."""
        return [name for name in COLUMNS if any(c[name] for c in self.policies.values())]


def is_counts(value: Any) -> bool:
    """Whether a manifest's value maps names to numbers."""
    return isinstance(value, Mapping) and all(isinstance(count, int) for count in value.values())


def _about(size: int) -> int:
    """A length, rounded to about 4 %: of few values, however many texts there are."""
    return round(2 ** (round(_STEPS * math.log2(size)) / _STEPS)) if size > _STEPS else size


def _characters(text: Any) -> int:
    if isinstance(text, str):
        return len(text)
    if isinstance(text, Mapping):
        return _characters(text.get("content", text.get("text")))
    return sum(map(_characters, text)) if isinstance(text, list) else 0


def quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the texts does not exceed."""
    seen, enough = 0, share * lengths.total()
    for size in sorted(lengths):
        seen += lengths[size]
        if seen >= enough:
            return size
    return 0
