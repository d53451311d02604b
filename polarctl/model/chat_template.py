"""Chat templates, bounded: they come with a model, and are programs that may loop."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import chat_template_utils

from polarctl.errors import UsageError

_MOST_S = 10.0  # real templates take milliseconds
_POLL_S = 0.05
_MOST_CHARS = 64 << 20  # more than any context holds


class _Late(BaseException):
    """The time is over."""


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Messages through a tokenizer's chat template, as text.

    Args:
        tokenizer: It has a chat template.
        messages: Of one conversation.
        options: Of `apply_chat_template`.

    Raises:
        UsageError: The template does not end, or writes without end.
        Exception: What else a template raises to refuse messages.
    """
    # The cached object that renders this template. Its loops join their text by `concat`.
    template = chat_template_utils._compile_jinja_template(tokenizer.get_chat_template())
    template.environment.concat = _joined
    with _time_limit():
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def _joined(parts: Iterable[str]) -> str:
    kept, chars = [], 0
    for part in parts:
        chars += len(part)
        if chars > _MOST_CHARS:
            raise UsageError(f"the chat template writes more than {_MOST_CHARS:,} characters")
        kept.append(part)
    return "".join(kept)


class _Call:
    """A rendering under way.

    Attributes:
        thread: Where it runs.
        ends: When its time is over, by `time.monotonic`.
        open: One entry, taken by the side that ends the call first: the rendering when it is done,
            or the watch when its time is over. `list.pop` is one step, and needs no lock that an
            exception could leave held.
    """

    def __init__(self) -> None:
        self.thread, self.ends, self.open = threading.get_ident(), time.monotonic() + _MOST_S, [1]

    def close(self) -> bool:
        """Take the entry; false when the other side has it."""
        try:
            self.open.pop()
        except IndexError:
            return False
        return True


class _Watch:
    """Tells renderings that their time is over. One thread for all: a thread each costs more."""

    def __init__(self) -> None:
        self.calls: set[_Call] = set()
        self.started = False
        self.starting = threading.Lock()

    def begin(self) -> _Call:
        """Watch a rendering of this thread."""
        with self.starting:
            if not self.started:
                threading.Thread(target=self._run, name="chat-templates", daemon=True).start()
                self.started = True
        call = _Call()
        self.calls.add(call)
        return call

    def end(self, call: _Call) -> bool:
        """Watch it no longer; false when its thread was told that the time is over."""
        self.calls.discard(call)
        return call.close()

    def _run(self) -> None:
        while True:
            time.sleep(_POLL_S)
            now = time.monotonic()
            for call in self.calls.copy():
                if now > call.ends and call.close():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(call.thread), ctypes.py_object(_Late)
                    )


_watch = _Watch()


def _after_fork() -> None:
    global _watch
    _watch = _Watch()  # threads stay behind


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Stop Python code of this thread when it takes too long; signals reach the first thread only.

    Raises:
        UsageError: It took too long.
    """
    watch = _watch
    call = watch.begin()
    try:
        try:
            yield
        finally:
            in_time = watch.end(call)
            here = isinstance(sys.exc_info()[1], _Late)
            while not (in_time or here):  # it is to arrive here, not in what comes after
                time.sleep(0.001)
    except _Late:
        raise UsageError(f"the chat template does not end within {_MOST_S:g} s") from None
