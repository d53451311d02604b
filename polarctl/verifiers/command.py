"""A program of the user's as verifier: a record on stdin, a number on stdout.

It is started once for each output, without a shell, in a session of its own, and gets the record as
JSON with the output in `output`. It prints one number from 0 to 1, or `null` where the record is
not its business, and ends with status 0. Whatever else it does is an error that names the record: a
failure is never a value. What it writes on stderr is shown with the error.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import orjson

from polarctl import console
from polarctl.errors import PolarctlError, UsageError
from polarctl.verifiers.bounds import Bounds

_ANSWER_BYTES, _SAID_BYTES = 4096, 4096
# `ulimit` takes KiB. The shell is replaced by the program.
_BOUNDED = ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"']


class CommandVerifier:
    """Runs a program on each output; see `polarctl.verifiers.named.Verifier`.

    Args:
        name: As on the command line.
        command: The program and its arguments, as a shell would split them.
        limits: Of each run.

    Raises:
        UsageError: No such program.
    """

    whole = False

    def __init__(self, name: str, command: str, limits: Bounds):
        self.name, self.limits = name, limits
        try:
            self.command = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"`{name}`: {error}") from None
        if not self.command or shutil.which(self.command[0]) is None:
            raise UsageError(
                f"`{name}`: no program `{(self.command or [''])[0]}` that can be started",
                hint="its path, and a file that may be executed",
            )
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1)

    def applies(self, record: Mapping[str, Any]) -> bool:
        """What the program says to an output decides."""
        return True

    def values(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[str]
    ) -> list[float | None]:
        """What it prints for each output.

        Raises:
            PolarctlError: It failed on one.
        """
        return list(self._threads.map(self._value, records, outputs))

    def close(self) -> None:
        """End the threads; no program runs any more."""
        self._threads.shutdown()

    def _value(self, record: Mapping[str, Any], output: str) -> float | None:
        answer, said, fault = self._run(orjson.dumps({**record, "output": output}))
        value: Any = None
        if not fault:
            try:
                value = orjson.loads(answer)
            except orjson.JSONDecodeError:
                value = answer
            number = type(value) in (int, float) and 0 <= value <= 1
            if value is not None and not number:
                shown = console.plain(answer.decode(errors="replace").strip(), 100)
                fault = f"printed `{shown}`, which is no number from 0 to 1"
        if fault:
            where = getattr(record, "where", None)
            last = console.plain(said.decode(errors="replace").strip()[-300:], 300)
            raise PolarctlError(
                f"{where + ': ' if where else ''}`{self.name}` {fault}",
                hint=f"it said: {last}" if last else "a number from 0 to 1 on stdout, or null",
            )
        return None if value is None else float(value)

    def _run(self, given: bytes) -> tuple[bytes, bytes, str]:
        """What the program wrote on stdout and, at the end, on stderr, and how it failed."""
        limit = str(int(self.limits.memory_gib * 2**20))
        with tempfile.TemporaryFile() as stdin:
            stdin.write(given)
            stdin.seek(0)
            process = subprocess.Popen(
                [*_BOUNDED, limit, *self.command],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # to end it with all that it has started
            )
        try:
            answer, said, fault = _read(process, time.monotonic() + self.limits.timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if fault == "time":
            return answer, said, f"took more than {self.limits.timeout_s:g} s"
        if fault:
            return answer, said, fault
        if status < 0:
            return answer, said, f"was ended by {signal.Signals(-status).name}"
        return answer, said, f"ended with status {status}" if status else ""


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes, str]:
    """Both pipes until the program has ended; stdout as far as an answer goes, stderr's end."""
    answer, said = b"", b""
    with selectors.DefaultSelector() as waiting:
        streams: dict[Any, IO[bytes] | None] = {1: process.stdout, 2: process.stderr}
        for which, stream in streams.items():
            waiting.register(stream, selectors.EVENT_READ, which)  # type: ignore[arg-type]
        ended = False
        while waiting.get_map() and not ended:
            # What it has started may hold the pipes open after its end.
            ended = process.poll() is not None
            if time.monotonic() > deadline:
                return answer, said, "time"
            for key, _ in waiting.select(0 if ended else 0.05):
                part = os.read(key.fd, 1 << 16)
                if not part:
                    waiting.unregister(key.fileobj)
                elif key.data == 1:
                    answer += part
                else:
                    said = (said + part)[-_SAID_BYTES:]
                ended = ended and not part  # all that it wrote is read
            if len(answer) > _ANSWER_BYTES:
                return answer, said, f"printed more than {_ANSWER_BYTES:,} bytes"
        while process.poll() is None:
            if time.monotonic() > deadline:
                return answer, said, "time"
            time.sleep(0.005)
    return answer, said, ""
