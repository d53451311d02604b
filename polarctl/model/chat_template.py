"""Chat templates, bounded: they come with a model, and are programs that may loop."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import chat_template_utils

from polarctl.errors import UsageError

_MOST_S = 10.0  # real templates take milliseconds
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


@contextmanager
def _time_limit() -> Iterator[None]:
    """Stop Python code of this thread when it takes too long; signals reach the first thread only.

    Raises:
        UsageError: It took too long.
    """
    me, lock = threading.get_ident(), threading.Lock()
    state = {"done": False, "late": False}

    def stop() -> None:
        with lock:
            if not state["done"]:
                state["late"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(me), ctypes.py_object(_Late)
                )

    timer = threading.Timer(_MOST_S, stop)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                state["done"] = True
            timer.cancel()
            here = isinstance(sys.exc_info()[1], _Late)
            while state["late"] and not here:  # it is to arrive here, not in what comes after
                time.sleep(0.001)
    except _Late:
        raise UsageError(f"the chat template does not end within {_MOST_S:g} s") from None
