"""What one request may ask for, and what all requests under way may hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from polarctl.model.template import content_text

_VALUES = 1 << 21
_MUCH = 16 << 20


class Refused(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: What is wrong with it.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body_bytes: Size of its body.
        inputs: Rewards; a candidate counts once for each of its references.
        text_chars: Characters of one text. A tokenizer takes 200 to 350 bytes for each.
        chars: Characters of all inputs, each with its prompt and reference; of token ids, tokens.
    """

    body_bytes: int = 32 << 20
    inputs: int = 4096
    text_chars: int = 256 << 10
    chars: int = 32 << 20


def check_values(body: bytes) -> None:
    """Count the values in a JSON text before they are built: each takes up to 24 times its bytes.

    The parser holds Python's lock, so that nothing else is answered in the meantime.

    Raises:
        Refused: Too many.
    """
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    found = text.count(b'"') // 2
    if found <= _VALUES:
        outside = b"".join(text.split(b'"')[::2])  # what is no string
        found = sum(outside.count(mark) for mark in (b",", b"[", b"{"))
    if found > _VALUES:
        raise Refused(413, f"a body of more than {_VALUES:,} JSON values")


class Size:
    """Inputs and characters of one request, counted before anything is tokenized.

    Args:
        limits: What it may ask for.

    Attributes:
        inputs: Rewards so far.
        chars: Their characters so far.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.inputs = self.chars = 0

    def add(self, prompt: Any, references: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count every output against every reference. Text fields are strings or messages.

        Raises:
            Refused: A text that is too long, or too much in all.
        """
        counts = len(references), len(outputs)
        self._count(
            counts[0] * counts[1],
            counts[0] * counts[1] * self._chars(prompt)
            + counts[1] * sum(map(self._chars, references))
            + counts[0] * sum(map(self._chars, outputs)),
        )

    def add_input(self, given: str | list[int]) -> None:
        """Count one whole input: a text, or token ids.

        Raises:
            Refused: See `add`.
        """
        self._count(1, self._chars(given) if isinstance(given, str) else len(given))

    def _chars(self, value: Any) -> int:
        found, most = len(content_text(value)), self.limits.text_chars
        if found > most:
            raise Refused(
                413, f"a text of {found:,} characters; the server takes {most:,} (--max-text-chars)"
            )
        return found

    def _count(self, inputs: int, chars: int) -> None:
        self.inputs += inputs
        self.chars += chars
        most = self.limits
        if self.inputs > most.inputs:
            raise Refused(
                413, f"{self.inputs:,} inputs; a request takes {most.inputs:,} (--max-inputs)"
            )
        if self.chars > most.chars:
            raise Refused(
                413,
                f"{self.chars:,} characters, each input with its prompt and reference; a request "
                f"takes {most.chars:,} (--max-chars)",
            )


class Gate:
    """Bounds what all requests under way hold together.

    Args:
        most: How much that may be.
    """

    def __init__(self, most: int):
        self._most, self._held = most, 0
        self._much, self._quiet = False, 0  # much was held; calls of `settle` since
        self._lock = threading.Lock()

    def take(self, amount: int) -> None:
        """Hold so much more, until it is given back.

        Raises:
            Refused: Others hold too much; nothing was taken.
        """
        with self._lock:
            if self._held + amount > self._most:
                raise Refused(503, "too much is under way; ask again in a second")
            self._held += amount
            if self._held > _MUCH:
                self._much, self._quiet = True, 0

    def give(self, amount: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._held -= amount

    def settle(self, clear: Callable[[], None]) -> None:
        """Call `clear` after much was held, when little has been held for a few of these calls."""
        with self._lock:
            self._quiet = 0 if self._held > _MUCH else self._quiet + 1
            if not self._much or self._quiet < 3:
                return
            self._much = False
        clear()

    @contextmanager
    def growing(self) -> Iterator[Callable[[int], None]]:
        """Gives `take`; what was taken by it is given back at the end."""
        held = 0

        def take(amount: int) -> None:
            nonlocal held
            self.take(amount)
            held += amount

        try:
            yield take
        finally:
            self.give(held)

    @contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        """Hold so much for a while.

        Raises:
            Refused: See `take`.
        """
        self.take(amount)
        try:
            yield
        finally:
            self.give(amount)


class Turns:
    """Lets a few threads in at a time: `with turns: ...`.

    Args:
        most: Threads.
        check: Called by a thread when its turn has come; raises when its work is to end.
    """

    def __init__(self, most: int, check: Callable[[], None]):
        self._free, self._check = threading.Semaphore(most), check

    def __enter__(self) -> None:
        self._free.acquire()
        try:
            self._check()
        except BaseException:
            self._free.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._free.release()


class InTurns:
    """A tokenizer that a few threads use at a time, as it takes much memory for a long text.

    Args:
        tokenizer: Theirs; see `polarctl.model.template.Tokenizer`.
        turns: Taken by a thread for each text.
    """

    def __init__(self, tokenizer: Any, turns: Turns):
        self._tokenizer, self._turns = tokenizer, turns

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `polarctl.model.template.Tokenizer`."""
        with self._turns:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """See `polarctl.model.template.Tokenizer`."""
        with self._turns:
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text
