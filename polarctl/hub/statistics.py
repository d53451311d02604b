"""What a data set holds, for its card: policies, tokens, lengths, and what cleaning did."""

from __future__ import annotations

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


@dataclass
class Statistics:
    """Counts over records of any kind.

    Attributes:
        lengths: Field to how many texts have how many characters; of messages, their contents.
        policies: Policy to its counts, by the names of `COLUMNS`.
    """

    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    policies: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record."""
        for name in _TEXTS:
            if name in record:
                self.lengths.setdefault(name, Counter())[_characters(record[name])] += 1
        for candidate in record.get("candidates") or ():
            size = _characters(candidate.get("output"))
            self.lengths.setdefault("output", Counter())[size] += 1
            self._add_policy(candidate.get("name"), "records")
        policy, rejected = record.get("policy"), record.get("rejected_policy")
        if isinstance(rejected, str):
            self._add_policy(policy, "reference")
            self._add_policy(rejected, "rejected")
        elif isinstance(policy, str):
            self._add_policy(policy, "records")
            counts = self.policies[policy]
            counts["tokens"] += record.get("num_tokens") or 0
            counts["length"] += record.get("finish_reason") == "length"
            counts.update(record.get("cleaned") or ())

    def _add_policy(self, policy: Any, what: str) -> None:
        if isinstance(policy, str):
            self.policies.setdefault(policy, Counter())[what] += 1

    def add_manifest(self, counts: Mapping[str, Any]) -> None:
        """Take in what a manifest of `sample` says of texts that are not in the file."""
        for policy, tally in (counts.get("policies") or {}).items():
            for what in ("empty", "unfit"):
                if isinstance(tally, Mapping) and tally.get(what):
                    self.policies.setdefault(policy, Counter())[what] += tally[what]

    def texts(self) -> Iterator[tuple[str, int, int, int, int]]:
        """For each field: its name, characters in all, median, 95th percentile, longest."""
        for name, lengths in self.lengths.items():
            total = sum(size * count for size, count in lengths.items())
            yield name, total, _quantile(lengths, 0.5), _quantile(lengths, 0.95), max(lengths)

    def columns(self) -> list[str]:
        """Names of the counts that some policy has."""
        return [name for name in COLUMNS if any(c[name] for c in self.policies.values())]


def _characters(text: Any) -> int:
    if isinstance(text, str):
        return len(text)
    if isinstance(text, Mapping):
        return _characters(text.get("content", text.get("text")))
    return sum(map(_characters, text)) if isinstance(text, list) else 0


def _quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the texts does not exceed."""
    seen, enough = 0, share * lengths.total()
    for size in sorted(lengths):
        seen += lengths[size]
        if seen >= enough:
            return size
    return 0
