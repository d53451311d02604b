"""Mathematical answers compared by math-verify, in processes of their own with a time limit.

What a policy writes can keep a computer algebra system busy for ever, also inside one machine
instruction of a big number, so the limit is kept from outside: a process that is late is killed
and started anew. An answer that could not be shown to be equal within the limits counts as wrong
(math-verify itself holds it so); such answers are counted and said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from polarctl import console
from polarctl.errors import PolarctlError, RecordError, need
from polarctl.verifiers import rules
from polarctl.verifiers.bounds import Bounds

_START_S = 120.0  # to import the algebra system on a busy machine
_BEGIN = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from polarctl.verifiers.math_pool import serve
serve(float(sys.argv[2]))"""


class MathVerifier:
    """Compares by math-verify; see `polarctl.verifiers.named.Verifier`.

    Args:
        name: As on the command line.
        fields: Where the true answer is: the first that is there.
        limits: Of one comparison.

    Attributes:
        late: Answers so far that were not shown to be equal within the limits.

    Raises:
        MissingError: math-verify is not installed.
    """

    whole = False

    def __init__(self, name: str, fields: Sequence[str], limits: Bounds):
        if importlib.util.find_spec("math_verify") is None:
            raise need("math-verify", "math")
        self.name, self.fields, self.limits = name, fields, limits
        self.late = 0
        self._count = min(8, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._count)
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all: list[_Worker] = []

    def applies(self, record: Mapping[str, Any]) -> bool:
        """Whether the record has a true answer; one that math-verify cannot read is an error."""
        field = self._field(record)
        if field is None:
            return False
        truths = self._truths(record, field)
        if not self._ask({"truths": truths}):
            raise RecordError(
                f"field `{field}`: `{self.name}` finds no mathematical answer in it",
                where=getattr(record, "where", None),
            )
        return True

    def values(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[str]
    ) -> list[float | None]:
        """1 for outputs whose answer is equal to the true one, else 0.

        Raises:
            PolarctlError: A process cannot be started.
        """
        return list(self._threads.map(self._value, records, outputs))

    def close(self) -> None:
        """End the processes; say how many answers took too long."""
        self._threads.shutdown()
        for worker in self._all:
            worker.end()
        if self.late:
            console.warn(
                f"{self.late:,} answers were not shown to be right within "
                f"{self.limits.timeout_s:g} s and {self.limits.memory_gib:g} GiB, and count as "
                f"wrong in `{self.name}`"
            )

    def _value(self, record: Mapping[str, Any], output: str) -> float | None:
        field = self._field(record)
        if field is None:
            return None
        answer = self._ask({"truths": self._truths(record, field), "output": output})
        self.late += answer is None
        return float(bool(answer))

    def _field(self, record: Mapping[str, Any]) -> str | None:
        return next((name for name in self.fields if record.get(name) is not None), None)

    def _truths(self, record: Mapping[str, Any], field: str) -> list[str]:
        try:
            return rules.texts(record[field])
        except ValueError as error:
            where = getattr(record, "where", None)
            raise RecordError(f"field `{field}`: `{self.name}` {error}", where=where) from None

    def _ask(self, question: dict[str, Any]) -> bool | None:
        """A process's answer; None where it was late or ran out of memory."""
        worker = self._free()
        try:
            return worker.ask(question, self.limits.timeout_s)
        finally:
            self._idle.put(worker)

    def _free(self) -> _Worker:
        if self._idle.empty() and len(self._all) < self._count:
            self._all.append(_Worker(self.limits.memory_gib))
            return self._all[-1]
        return self._idle.get()


class _Worker:
    """A process that compares, started when first asked and again after it was late."""

    def __init__(self, memory_gib: float):
        self.memory_gib = memory_gib
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any], limit_s: float) -> bool | None:
        """What `serve` answers; None where there is no answer within the limits."""
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
            answer = self._line(limit_s)
        except BrokenPipeError:
            answer = b""
        if not answer:
            self.end()
            return None
        found: bool | None = json.loads(answer)
        return found

    def end(self) -> None:
        """Kill it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, path, str(self.memory_gib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C on the terminal is the parent's to handle
        )
        if not self._line(_START_S):
            self.end()
            raise PolarctlError("a process with math-verify cannot be started")

    def _line(self, limit_s: float) -> bytes:
        """A line of its stdout; empty where none comes in time, or it has ended."""
        assert self.process is not None and self.process.stdout is not None
        line, deadline = b"", time.monotonic() + limit_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    return b""
                part = os.read(self.process.stdout.fileno(), 1 << 12)
                if not part:
                    return b""
                line += part
        return line


def serve(memory_gib: float) -> None:
    """Answer questions, a line of JSON each, until stdin ends.

    `truths` alone: whether one of them can be read. With `output`: whether its answer is equal to
    one of them; null where memory or the recursion limit did not suffice.

    Args:
        memory_gib: Address space.
    """
    import logging
    import resource

    from math_verify import parse

    logging.disable(logging.CRITICAL)  # it warns of the limits, which are kept by the parent
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_gib * 2**30),) * 2)
    parse("1", parsing_timeout=None)
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)
        answers.write(b"true\n")
        for line in sys.stdin.buffer:
            question = json.loads(line)
            try:
                answer = _judged(question["truths"], question.get("output"))
            except (MemoryError, RecursionError):
                answer = None
            answers.write(json.dumps(answer).encode() + b"\n")


def _judged(truths: list[str], output: str | None) -> bool:
    from math_verify import parse, verify

    wanted = [found for text in truths if (found := _truth(text))]
    if output is None:
        return len(wanted) == len(truths)
    answer = parse(output, parsing_timeout=None, raise_on_error=False)
    return bool(answer) and any(
        verify(truth, answer, timeout_seconds=None, raise_on_error=False) for truth in wanted
    )


def _truth(text: str) -> Any:
    r"""A true answer as math-verify reads it; bare LaTeX (`\frac{1}{2}`) is set in dollars."""
    from math_verify import parse

    if "\\" in text and not any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")):
        text = f"${text}$"
    return parse(text, parsing_timeout=None, raise_on_error=False)
