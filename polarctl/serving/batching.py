"""One thread computes; requests that wait at the same time go through the model together."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

from polarctl.model.packing import portions, span_of

Ids = Sequence[int]
Groups = list[list[Ids]]


class Closed(Exception):
    """The server is stopping and takes no more work."""


class Gone(Exception):
    """The client has left; nobody waits for the answer."""


class Ticket:
    """A client's request, by which its work can be ended before all of it is done.

    Attributes:
        ended: Why nothing more of it is to be done, if so.
    """

    def __init__(self) -> None:
        self.ended: Exception | None = None


class _Request:
    """Groups of candidates, in portions that fit into a batch.

    Attributes:
        ticket: The client's request that it is a part of, if known.
        portions: (group, its candidates, tokens) of those that are not taken yet.
        answer: The rewards, once all are there.
    """

    def __init__(self, groups: Groups, budget: int, ticket: Ticket | None):
        self.ticket, self._groups = ticket, groups
        self._found = [[math.nan] * len(candidates) for candidates in groups]
        self.portions: deque[tuple[int, list[int], int]] = deque()
        for number, candidates in enumerate(groups):
            span = span_of(candidates)
            for part in portions(candidates, budget):
                tokens = span.prefix + sum(span.branches[i] for i in part)
                self.portions.append((number, part, tokens))
        self._open = len(self.portions)
        self.answer: Future[list[list[float]]] = Future()
        if not self._open:
            self.answer.set_result(self._found)

    def ids(self, number: int, part: list[int]) -> list[Ids]:
        """The candidates of a portion."""
        return [self._groups[number][i] for i in part]

    def put(self, number: int, part: list[int], rewards: Sequence[float]) -> None:
        """Take the rewards of a portion."""
        for i, reward in zip(part, rewards, strict=True):
            self._found[number][i] = reward
        self._open -= 1
        if not self._open:
            with contextlib.suppress(InvalidStateError):  # it was ended from another thread
                self.answer.set_result(self._found)

    def fail(self, error: Exception) -> None:
        """End it by an error."""
        self.portions.clear()
        with contextlib.suppress(InvalidStateError):
            self.answer.set_exception(error)


Work = tuple[_Request, int, list[int]]


class Batcher:
    """Computes rewards for many threads in one.

    Requests take turns, a portion of one batch at most each time: a large one does not keep the
    others waiting until it is done.

    Args:
        rewards_of: From the ids of each group's candidates to their rewards; called in one thread.
        batch_tokens: Tokens that are computed together at most, a group's prefix counted once (a
            longer input goes alone).
        batches: Called with the requests and tokens of every batch.
    """

    def __init__(
        self,
        rewards_of: Callable[[Groups], list[list[float]]],
        batch_tokens: int,
        batches: Callable[[int, int], None] = lambda requests, tokens: None,
    ):
        self._rewards_of, self._budget, self._batches = rewards_of, batch_tokens, batches
        self._waiting: deque[_Request] = deque()
        self._open: list[_Request] = []  # those too of which all is being computed
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def rewards(self, groups: Groups, ticket: Ticket | None = None) -> list[list[float]]:
        """Rewards of a request, waited for.

        Args:
            groups: The ids of each group's candidates.
            ticket: By which it can be ended.

        Raises:
            Closed: The server is stopping.
            Gone: The client has left.
            PolarctlError: The model failed at it.
        """
        request = _Request(groups, self._budget, ticket)
        with self._changed:
            self.check(ticket)
            if request.portions:
                self._open.append(request)
                self._waiting.append(request)
                self._changed.notify()
        try:
            return request.answer.result()
        finally:
            with self._changed, contextlib.suppress(ValueError):
                self._open.remove(request)

    def check(self, ticket: Ticket | None) -> None:
        """Raise what `rewards` would raise for a request that has been ended."""
        if ticket is not None and ticket.ended is not None:
            raise ticket.ended
        if self._closed:
            raise Closed

    def end(self, ticket: Ticket, error: Exception) -> None:
        """Do nothing more of a request. What is being computed is dropped afterwards."""
        with self._changed:
            ticket.ended = error
            self._fail([one for one in self._open if one.ticket is ticket], error)

    def waiting(self) -> int:
        """Requests of which something waits."""
        return len(self._waiting)

    def close(self, patience_s: float | None = None) -> None:
        """Finish what is computed now, and stop; what still waits is not computed.

        Args:
            patience_s: Seconds for what is computed now; None is no limit.
        """
        with self._changed:
            self._closed = True
            self._fail(list(self._waiting), Closed())
            self._changed.notify()
        self._thread.join(patience_s)
        with self._changed:
            self._fail(self._open, Closed())

    def _fail(self, requests: Sequence[_Request], error: Exception) -> None:
        for request in requests:
            with contextlib.suppress(ValueError):
                self._waiting.remove(request)
            request.fail(error)

    def _run(self) -> None:
        # What arrives while a batch is computed is the next one: no request waits for company, and
        # the busier the server the larger its batches.
        while batch := self._next():
            self._compute(batch)

    def _next(self) -> list[Work]:
        """What goes together, a portion of each request in turn; nothing when all is done."""
        batch: list[Work] = []
        tokens = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            while self._waiting:
                request = self._waiting[0]
                number, part, size = request.portions[0]
                if batch and tokens + size > self._budget:
                    break
                request.portions.popleft()
                batch.append((request, number, part))
                tokens += size
                self._waiting.popleft()
                if request.portions:
                    self._waiting.append(request)
        if batch:
            self._batches(len({id(request) for request, _, _ in batch}), tokens)
        return batch

    def _compute(self, batch: list[Work]) -> None:
        try:
            found = self._rewards_of([request.ids(number, part) for request, number, part in batch])
            for (request, number, part), rewards in zip(batch, found, strict=True):
                request.put(number, part, rewards)
        except Exception as error:
            if len(batch) == 1:
                self._drop(batch[0][0], error)
                return
            for work in batch:  # one request must not fail the others
                if not work[0].answer.done():
                    self._compute([work])

    def _drop(self, request: _Request, error: Exception) -> None:
        with self._changed:
            self._fail([request], error)
