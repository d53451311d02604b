"""Work done ahead in processes of their own, its results in order.

A worker is a Python started on its own, one socket to it and one thread that waits for its answers.
Not `multiprocessing.Pool`: that waits without end for the answer of a worker that was killed, as
when memory runs out, and leaves its workers behind when the parent is killed. Here either end of a
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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, TypeVar

from polarctl.errors import PolarctlError

# A worker's number, from 0; of several only the first says anything but errors.
NUMBER = "POLARCTL_WORKER"
_END_S = 60.0  # for a worker to give back what it holds
_BEGIN = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from polarctl.parallel.pool import serve
serve(int(sys.argv[2]))"""
A = TypeVar("A")
B = TypeVar("B")


def in_order(
    items: Iterator[A],
    work: Callable[[A], B],
    *,
    environments: Sequence[Mapping[str, str]],
    ahead: int,
    message: int = 1,
    task: str = "works",
    hint: str | None = None,
) -> Generator[B, None, None]:
    """What `work` gives for each item, in order, whatever the number of processes.

    The processes end when the iterator is closed or this process ends, however it ends. A `work`
    with a method `close` is closed in each when all is done.

    Args:
        items: Read in the caller's thread, `ahead` items before their turn.
        work: A function that can be pickled; importable, not of the main program.
        environments: Environment variables of each process, beside this one's; none: no processes.
        ahead: Items that are under way (in whole messages, and one for each worker at least).
        message: Items a message to a worker.
        task: What a worker does, for the message when one is killed.
        hint: What helps then.

    Raises:
        PolarctlError: A worker was killed.
        Exception: What `items` or `work` raise, once everything before it was handed out.
    """
    if not environments:
        yield from map(work, items)
        return
    items = iter(items)
    most = max(len(environments), -(-ahead // message))
    waiting: deque[Future[Any]] = deque()
    failure: Exception | None = None
    more = True
    with _Workers(environments, work, task, hint) as pool:
        while True:
            while more and len(waiting) < most:
                chunk: list[A] = []
                try:
                    for item in itertools.islice(items, message):
                        chunk.append(item)
                except Exception as error:  # its turn is after what is under way
                    failure = error
                more = failure is None and len(chunk) == message
                if chunk:
                    waiting.append(pool.submit(chunk))
            if not waiting:
                break
            found, wrong, trace = waiting.popleft().result()
            yield from found
            if wrong is not None:
                raise wrong from InWorker(trace)
    if failure is not None:
        raise failure


def in_threads(items: Iterator[A], work: Callable[[A], B], *, threads: int) -> Iterator[B]:
    """What `work` gives for each item, in order, for work that mostly waits.

    Args:
        items: Read in the caller's thread, `threads` items before their turn.
        work: Runs in several threads at a time.
        threads: How many.

    Raises:
        Exception: What `items` or `work` raise, once everything before it was handed out.
    """
    waiting: deque[Future[B]] = deque()
    failure: Exception | None = None
    more = True
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            while more and len(waiting) < threads:
                try:
                    waiting.append(pool.submit(work, next(items)))
                except StopIteration:
                    more = False
                except Exception as error:  # its turn is after what is under way
                    failure, more = error, False
            if not waiting:
                break
            yield waiting.popleft().result()
    finally:
        # Not waited for: whoever closes what they wait for ends them.
        pool.shutdown(wait=False, cancel_futures=True)
    if failure is not None:
        raise failure


class OneWorker(Generic[A, B]):
    """One process of its own that works when it is called, and whose memory ends with it.

    Args:
        work: A function that can be pickled; importable, not of the main program.
        environment: Environment variables of the process, beside this one's.
        task: What it does, for the message when it is killed.
        hint: What helps then.
    """

    def __init__(
        self,
        work: Callable[[A], B],
        *,
        environment: Mapping[str, str],
        task: str,
        hint: str | None = None,
    ):
        self._workers: _Workers | None = _Workers([environment], work, task, hint)

    def __call__(self, item: A) -> B:
        """What `work` gives for an item. What stops the waiting kills the process.

        Raises:
            PolarctlError: It was killed.
            Exception: What `work` raises.
        """
        assert self._workers is not None
        try:
            found, wrong, trace = self._workers.submit([item]).result()
        except BaseException:
            self.close(kill=True)
            raise
        if wrong is not None:
            raise wrong from InWorker(trace)
        result: B = found[0]
        return result

    def close(self, *, kill: bool = False) -> None:
        """End it, and wait until it has given back what it holds."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.__exit__(kill)


class InWorker(Exception):
    """The traceback of a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Workers:
    """Some processes, and a thread for each; see `in_order` for the arguments."""

    def __init__(
        self,
        environments: Sequence[Mapping[str, str]],
        work: Callable[[Any], Any],
        task: str,
        hint: str | None,
    ):
        self.work = pickle.dumps(work)
        self.chunks: queue.SimpleQueue[tuple[list[Any], Future[Any]] | None] = queue.SimpleQueue()
        self.all: list[_Worker] = []
        self.threads: list[threading.Thread] = []
        try:
            for number, environment in enumerate(environments):
                self.all.append(_Worker({NUMBER: str(number), **environment}, task, hint))
                # As daemons they hold nothing up where the program ends without closing this.
                thread = threading.Thread(target=self._attend, args=self.all[-1:], daemon=True)
                thread.start()
                self.threads.append(thread)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, failed: object = None, *_: object) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.chunks.get_nowait()
        for worker in self.all:
            if failed:
                worker.kill()  # wakes the thread that waits for it
            self.chunks.put(None)
        for thread in self.threads:
            thread.join()
        for worker in self.all:
            worker.connection.close()  # which a worker takes as its end
        for worker in self.all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(_END_S)
            worker.kill()
            worker.process.wait()

    def submit(self, chunk: list[Any]) -> Future[Any]:
        """The answer to come: results, then the error that ended them and its traceback."""
        answer: Future[Any] = Future()
        self.chunks.put((chunk, answer))
        return answer

    def _attend(self, worker: _Worker) -> None:
        with contextlib.suppress(ConnectionError):  # told when the first answer is missing
            worker.connection.send_bytes(self.work)
        while (task := self.chunks.get()) is not None:
            chunk, answer = task
            try:
                answer.set_result(worker.ask(chunk))
            except BaseException as error:
                answer.set_exception(error)


class _Worker:
    """A process, with its environment variables beside this process's."""

    def __init__(self, environment: Mapping[str, str], task: str, hint: str | None) -> None:
        self.task, self.hint = task, hint
        self.connection, theirs = Pipe()
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout carries the parent's result
                pass_fds=[theirs.fileno()],
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment},
                start_new_session=True,  # Ctrl-C on the terminal is the parent's to handle
            )
        finally:
            theirs.close()

    def ask(self, chunk: list[Any]) -> Any:
        """What `serve` answers; PolarctlError where it is dead."""
        try:
            self.connection.send_bytes(pickle.dumps(chunk))
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._death() from None

    def kill(self) -> None:
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _death(self) -> PolarctlError:
        status = self.process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"
        return PolarctlError(f"a process that {self.task} {how}", hint=self.hint)


def serve(handle: int) -> None:
    """Be a worker until the parent is gone.

    Args:
        handle: File descriptor of the socket to it.
    """
    # A scheduler that stops a job signals all of its processes; the parent still ends its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(handle)
    work: Any = None
    with contextlib.suppress(EOFError, ConnectionError):
        packed = connection.recv_bytes()
        while True:
            chunk = connection.recv_bytes()
            found: list[Any] = []
            try:
                work = work or pickle.loads(packed)
                for item in pickle.loads(chunk):
                    found.append(work(item))
                answer = answer_of(found)
            except Exception as error:
                answer = answer_of(found, error)
            connection.send_bytes(answer)
    if hasattr(work, "close"):
        work.close()


def answer_of(found: list[Any], error: Exception | None = None) -> bytes:
    """A worker's answer: results, the error that ended them, and its traceback.

    Called where the error is handled. An error that cannot travel goes as text.
    """
    if error is None:
        return pickle.dumps((found, None, ""))
    trace = traceback.format_exc()
    try:
        answer = pickle.dumps((found, error, trace))
        pickle.loads(answer)
        return answer
    except Exception:
        return pickle.dumps(([], RuntimeError(f"{type(error).__name__}: {error}"), trace))
