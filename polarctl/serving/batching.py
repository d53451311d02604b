"""One thread computes; requests that wait at the same time go through the model together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

Ids = Sequence[int]
Groups = list[list[Ids]]
Request = tuple[Groups, "Future[list[list[float]]]"]


class Closed(Exception):
    """The server is stopping and takes no more work."""


class Batcher:
    """Computes rewards for many threads in one.

    Args:
        rewards_of: From the ids of each group's candidates to their rewards; called in one thread.
        batch_tokens: Tokens that are computed together at most, prefixes counted for each
            candidate (a larger request goes alone).
        batches: Called with the requests and tokens of every batch.
    """

    def __init__(
        self,
        rewards_of: Callable[[Groups], list[list[float]]],
        batch_tokens: int,
        batches: Callable[[int, int], None] = lambda requests, tokens: None,
    ):
        self._rewards_of, self._budget, self._batches = rewards_of, batch_tokens, batches
        self._waiting: deque[Request] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def rewards(self, groups: Groups) -> list[list[float]]:
        """Rewards of a request, waited for.

        Raises:
            Closed: The server is stopping.
            PolarctlError: The model failed at it.
        """
        answer: Future[list[list[float]]] = Future()
        with self._changed:
            if self._closed:
                raise Closed
            self._waiting.append((groups, answer))
            self._changed.notify()
        return answer.result()

    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Finish what is computed now, and stop; what waits still has nobody left to hear of it."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft()[1].set_exception(Closed())
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        # What arrives while a batch is computed is the next one: no request waits for company, and
        # the busier the server the larger its batches.
        while batch := self._next():
            self._compute(batch)

    def _next(self) -> list[Request]:
        """The requests that go together; none when all is done."""
        batch: list[Request] = []
        tokens = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            while self._waiting:
                size = _tokens(self._waiting[0][0])
                if batch and tokens + size > self._budget:
                    break
                batch.append(self._waiting.popleft())
                tokens += size
        if batch:
            self._batches(len(batch), tokens)
        return batch

    def _compute(self, batch: list[Request]) -> None:
        try:
            found = iter(self._rewards_of([group for groups, _ in batch for group in groups]))
            for groups, answer in batch:
                answer.set_result([next(found) for _ in groups])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for entry in batch:  # one request must not fail the others
                self._compute([entry])


def _tokens(groups: Groups) -> int:
    return sum(len(ids) for group in groups for ids in group)
