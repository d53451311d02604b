"""Which cleaned texts are left out on request: too short, too long, or in another language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polarctl.errors import UsageError, need

# Why a text is left out; counted for every policy.
REASONS = ("too short", "too long", "other language")
# With fewer letters than this a language is a guess.
FEWEST_LETTERS = 20


@dataclass(frozen=True)
class Filters:
    """What a text must be to be kept.

    Attributes:
        min_tokens: Tokens at least.
        max_tokens: Tokens at most, or None.
        languages: ISO 639-1 codes, or none for all. A text with fewer letters than
            `FEWEST_LETTERS` is kept.
    """

    min_tokens: int = 0
    max_tokens: int | None = None
    languages: Sequence[str] = ()

    def check(self) -> None:
        """Refuse what keeps nothing, and languages that cannot be told.

        Raises:
            UsageError: The bounds cross, or no such language.
            MissingError: The package that tells languages is not installed.
        """
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise UsageError(
                f"`--drop-longer {self.max_tokens}` is less than `--drop-shorter {self.min_tokens}`"
            )
        if not self.languages:
            return
        try:
            import py3langid
        except ImportError:
            raise need("py3langid", "language") from None
        known = sorted(code for code, _ in py3langid.rank(""))
        for code in self.languages:
            if code not in known:
                raise UsageError(
                    f"`--language {code}`: no such language", hint=f"one of: {', '.join(known)}"
                )

    def look(self, text: str, tokens: int) -> tuple[str | None, str | None]:
        """Why a text is left out, or None, and its language, if that was looked for.

        Args:
            text: After cleaning.
            tokens: Of that text.
        """
        if tokens < self.min_tokens:
            return "too short", None
        if self.max_tokens is not None and tokens > self.max_tokens:
            return "too long", None
        if not self.languages or sum(map(str.isalpha, text)) < FEWEST_LETTERS:
            return None, None
        import py3langid

        language = str(py3langid.classify(text)[0])
        return None if language in self.languages else "other language", language
