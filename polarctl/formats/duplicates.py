"""Prompts that were there already: the same text, or nearly the same.

Near-duplicates are found by MinHash signatures of the sets of three words in a row, and looked up
by bands of these, so that a prompt is compared with few others. The package rensa does both; it was
chosen by measurement (docs/guides/corpus.md), comes with the extra `[dedup]` and is imported only
here.
"""

from __future__ import annotations

import hashlib
from typing import Any

from polarctl.errors import UsageError, need
from polarctl.model.template import content_text, plain_text
from polarctl.policies.nearness import words_of

# A signature of 128 numbers estimates a similarity of 0.8 with a standard deviation of 0.035. With
# 32 bands of 4, of two prompts with this similarity one in 10 million is missed; with 0.5, 13 %.
_NUMBERS, _BANDS, _SEED = 128, 32, 42
_SHINGLE = 3
LEAST_SIMILARITY = 0.5


class Duplicates:
    """Remembers prompts.

    Args:
        rule: `exact`, or the similarity (Jaccard) of the sets of three words in a row from which
            two prompts count as the same, at least 0.5 and below 1. Case, white space and
            punctuation between words do not count then.

    Raises:
        MissingError: rensa is not installed.
        UsageError: Another rule.
    """

    def __init__(self, rule: str):
        self._texts: set[bytes] = set()
        self._near: Any = None
        if rule == "exact":
            return
        try:
            similarity = float(rule)
        except ValueError:
            similarity = 0.0
        if not LEAST_SIMILARITY <= similarity < 1:
            raise UsageError(
                f"`--dedup {rule}`: neither `exact` nor a number from {LEAST_SIMILARITY} to 1",
                hint="`--dedup 0.8` for near-duplicates",
            )
        try:
            import rensa
        except ImportError:
            raise need("rensa", "dedup") from None
        self._sign = lambda: rensa.RMinHash(num_perm=_NUMBERS, seed=_SEED)
        self._near = rensa.RMinHashDeduplicator(
            threshold=similarity, num_perm=_NUMBERS, use_lsh=True, num_bands=_BANDS, seed=_SEED
        )

    def add(self, prompt: Any) -> str | None:
        """Take in a prompt: `repeated`, `near_repeated`, or None for a new one.

        The first of several is the new one. A near-duplicate of a near-duplicate is compared with
        those that were kept alone.
        """
        text = content_text(prompt)
        plain = plain_text(text).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(plain, digest_size=16).digest()
        if digest in self._texts:
            return "repeated"
        self._texts.add(digest)
        if self._near is None:
            return None
        words = [word for word in words_of(text.lower()) if word.isalnum()] or [text]
        signature = self._sign()
        last = max(len(words) - _SHINGLE, 0)
        signature.update([" ".join(words[i : i + _SHINGLE]) for i in range(last + 1)])
        name = digest.hex()
        if self._near.is_duplicate(name, signature):
            return "near_repeated"
        self._near.add(name, signature)
        return None
