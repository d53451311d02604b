"""Tokenizing triples ahead of the model, in processes of their own, in order.

A worker is a Python started on its own, one socket to it and one thread that waits for its answers.
Not `multiprocessing.Pool`: that waits for ever for the answer of a worker that was killed, as when
memory runs out, and leaves its workers behind when the parent is killed. Here either end of a
socket sees the other's death at once, and workers do not run the main program's file again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from polarctl import console
from polarctl.encoding import Encoder
from polarctl.errors import PolarctlError, RecordError
from polarctl.records import Record

PIECES = ("prompt", "reference", "output")
_CHUNK = 8  # records a message to a worker
_BEGIN = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from polarctl.training.workers import serve
serve(int(sys.argv[2]))"""
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """An encoded triple.

    Attributes:
        ids: Token ids: chosen, then the rejected ones.
        margin: The record's own margin.
        cut: Pieces that were longer than the template.
    """

    ids: tuple[list[int], ...]
    margin: float = 0.0
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class TripleEncoder:
    """From a triple to its token ids.

    Attributes:
        encoder: The reward model's template.
        negatives: Rejected trajectories that are used at most.
    """

    encoder: Encoder
    negatives: int = 1

    def __call__(self, record: Record) -> Group:
        """The triple's group, with one prompt budget for all of its candidates.

        Raises:
            RecordError: A text that cannot be encoded.
        """
        rejected = [record["rejected"], *record.get("negatives", ())][: self.negatives]
        try:
            found = self.encoder.report_group(
                record["prompt"],
                record["reference"],
                [record["chosen"], *rejected],
                record.get("wrapper", "sft"),
            )
        except ValueError as error:
            raise RecordError(str(error), where=record.where) from None
        cut = {piece for e in found for piece in PIECES if getattr(e, f"truncated_{piece}")}
        return Group(tuple(e.ids for e in found), record.get("margin", 0.0), tuple(sorted(cut)))


def default_count(device_type: str, processes: int) -> int:
    """Workers of a process, said with the reason.

    Args:
        device_type: Where the model computes: `cpu` or `cuda`.
        processes: Processes of this machine that train.
    """
    cores = os.cpu_count() or 1
    if device_type == "cpu":
        console.choice("workers", "0", "the model computes on the same cores")
        return 0
    count = min(8, max(0, cores // processes - 1))
    console.choice("workers", str(count), f"{cores} cores for {processes} training processes")
    return count


def encoded(
    records: Iterator[Record], encode: Callable[[Record], T], *, workers: int, ahead: int
) -> Iterator[T]:
    """What `encode` gives for each record, in order, whatever the number of workers.

    The processes end when the iterator is closed or this process ends, however it ends.

    Args:
        records: What to encode; read in the caller's thread, `ahead` records before their turn.
        encode: A function that can be pickled; importable, not of the main program.
        workers: Processes; 0: none beside this one.
        ahead: Records that are under way (in whole messages, and one for each worker at least).

    Raises:
        PolarctlError: A worker was killed.
        Exception: What `records` or `encode` raise, once everything before it was handed out.
    """
    if not workers:
        yield from map(encode, records)
        return
    records = iter(records)
    most = max(workers, -(-ahead // _CHUNK))
    waiting: deque[Future[Any]] = deque()
    failure: Exception | None = None
    more = True
    with _Workers(workers, encode) as pool:
        while True:
            while more and len(waiting) < most:
                chunk: list[Record] = []
                try:
                    for record in itertools.islice(records, _CHUNK):
                        chunk.append(record)
                except Exception as error:  # its turn is after what is under way
                    failure = error
                more = failure is None and len(chunk) == _CHUNK
                if chunk:
                    waiting.append(pool.submit(chunk))
            if not waiting:
                break
            found, wrong, trace = waiting.popleft().result()
            yield from found
            if wrong is not None:
                raise wrong from _InWorker(trace)
    if failure is not None:
        raise failure


class _InWorker(Exception):
    """The traceback of a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Workers:
    """Some processes that encode, and a thread for each.

    Args:
        count: How many.
        encode: What they do with a record.
    """

    def __init__(self, count: int, encode: Callable[[Record], Any]):
        self.encode = pickle.dumps(encode)
        self.chunks: queue.SimpleQueue[tuple[list[Record], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self.all: list[_Worker] = []
        self.threads: list[threading.Thread] = []
        try:
            for _ in range(count):
                self.all.append(_Worker())
                # As daemons they hold nothing up where the program ends without closing this.
                thread = threading.Thread(target=self._attend, args=self.all[-1:], daemon=True)
                thread.start()
                self.threads.append(thread)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.chunks.get_nowait()
        for worker in self.all:
            worker.process.kill()  # wakes the thread that waits for it
            self.chunks.put(None)
        for thread in self.threads:
            thread.join()
        for worker in self.all:
            worker.process.wait()
            worker.connection.close()

    def submit(self, chunk: list[Record]) -> Future[Any]:
        """The answer to come: results, then the error that ended them and its traceback."""
        answer: Future[Any] = Future()
        self.chunks.put((chunk, answer))
        return answer

    def _attend(self, worker: _Worker) -> None:
        with contextlib.suppress(ConnectionError):  # told when the first answer is missing
            worker.connection.send_bytes(self.encode)
        while (task := self.chunks.get()) is not None:
            chunk, answer = task
            try:
                answer.set_result(worker.ask(chunk))
            except BaseException as error:
                answer.set_exception(error)


class _Worker:
    """A process that encodes."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout carries the parent's result
                pass_fds=[theirs.fileno()],
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C on the terminal is the parent's to handle
            )
        finally:
            theirs.close()

    def ask(self, chunk: list[Record]) -> Any:
        """What `serve` answers; PolarctlError where it is dead."""
        try:
            self.connection.send_bytes(pickle.dumps(chunk))
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._death() from None

    def _death(self) -> PolarctlError:
        status = self.process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"
        return PolarctlError(
            f"a process that tokenizes {how}",
            hint="fewer --workers need less memory; the same command goes on from the checkpoint",
        )


def serve(handle: int) -> None:
    """Be a worker until the parent is gone.

    Args:
        handle: File descriptor of the socket to it.
    """
    # A scheduler that stops a job signals all of its processes; the parent still ends its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(handle)
    with contextlib.suppress(EOFError, ConnectionError):
        packed = connection.recv_bytes()
        encode: Callable[[Record], Any] | None = None
        while True:
            chunk = connection.recv_bytes()
            found: list[Any] = []
            try:
                encode = encode or pickle.loads(packed)
                for record in pickle.loads(chunk):
                    found.append(encode(record))
                answer = pickle.dumps((found, None, ""))
            except Exception as error:
                answer = _packed(found, error)
            connection.send_bytes(answer)


def _packed(found: list[Any], error: Exception) -> bytes:
    """The answer that ends in an error, as text where it cannot travel."""
    trace = traceback.format_exc()
    try:
        answer = pickle.dumps((found, error, trace))
        pickle.loads(answer)
        return answer
    except Exception:
        return pickle.dumps(([], RuntimeError(f"{type(error).__name__}: {error}"), trace))
