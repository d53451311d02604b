"""Scoring by a server that holds the model: vLLM, SGLang or lmdeploy, asked over HTTP.

Inputs are made here, by the template of the checkpoint, so that they are those of every other
engine: as token ids where the server takes them, else as the glued text. What fails for a while is
asked again: lost connections, time-outs, 408, 429, 5xx, and replies that are no rewards. What fails
for good (any other 4xx) ends the run. No failure ever becomes a reward.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any

import httpx2 as httpx

from polarctl import console
from polarctl.encoding import Encoder
from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.scoring import Item, Scored, score_ids

TYPES = ("auto", "vllm", "sglang", "lmdeploy", "polarctl")
KEY_VARIABLE = "POLARCTL_SERVER_KEY"
_AGAIN = {408, 429, 500, 502, 503, 504}
_FIRST_WAIT_S, _LONGEST_WAIT_S, _REQUEST_S = 0.1, 10.0, 120.0
_PROBES = ("Yes.", "No.", "a", "It is 7.", "the sea was calm", "?", "1 2 3", "def f(): pass")


class _Fault(Exception):
    """A reply that may be better the next time."""

    def __init__(self, why: str, wait_s: float | None = None):
        super().__init__(why)
        self.wait_s = wait_s


class ServerScorer:
    """Scores by a server's replies; see `polarctl.scoring.Scorer`.

    Args:
        url: Where it is, such as http://127.0.0.1:8000.
        encoder: The template of the checkpoint that it serves.
        kind: One of `TYPES`; `auto` asks it.
        name: Model name in the requests; None: the first that it lists.
        concurrency: Requests under way at most.
        batch: Inputs of a request at most.
        deadline_s: Seconds without any good reply after which it counts as dead.

    Raises:
        MissingError: No answer within the deadline.
        UsageError: No such kind, or the server gives a function of the reward.
    """

    def __init__(
        self,
        url: str,
        encoder: Encoder,
        *,
        kind: str = "auto",
        name: str | None = None,
        concurrency: int = 16,
        batch: int = 32,
        deadline_s: float = 300.0,
    ):
        if kind not in TYPES:
            raise UsageError(f"no server type `{kind}`", hint=f"one of {', '.join(TYPES)}")
        self.url, self.encoder, self.batch = url.rstrip("/"), encoder, batch
        self.deadline_s = deadline_s
        key = os.environ.get(KEY_VARIABLE)
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=min(_REQUEST_S, max(1.0, deadline_s / 3)),  # one that hangs is no dead server
            limits=httpx.Limits(max_connections=concurrency),
        )
        self._lock, self._alive, self._stop = Lock(), time.monotonic(), Event()
        self._pool = ThreadPoolExecutor(concurrency)
        self.retries = 0
        try:
            self.kind, self.name = self._known(kind, name)
            self._refuse_sigmoid()
        except BaseException:
            self.close()
            raise

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items.

        Raises:
            MissingError: The server is dead.
            PolarctlError: It refuses a request.
        """
        return score_ids(items, self.encoder, self.rewards_of)

    def rewards_of(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Rewards of the candidates of every group, from their token ids. Threads may share it."""
        with self._lock:
            self._alive = max(self._alive, time.monotonic())
        waiting = [self._pool.submit(self._asked, chunk) for chunk in self._chunks(groups)]
        try:
            flat = iter([reward for future in waiting for reward in future.result()])
        except BaseException:
            for future in waiting:
                future.cancel()
            self._stop.set()  # the others give up as well
            raise
        return [[next(flat) for _ in group] for group in groups]

    def close(self) -> None:
        """Give the connections back; say how often the server had to be asked again."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self.client.close()
        if self.retries:
            console.warn(f"{self.url}: {self.retries:,} requests had to be sent again")

    def _chunks(self, groups: Sequence[Sequence[Sequence[int]]]) -> Iterator[list[Sequence[int]]]:
        """Inputs of a request each; a group stays together, for the server's prefix cache."""
        chunk: list[Sequence[int]] = []
        for group in groups:
            for begin in range(0, len(group), self.batch):
                part = group[begin : begin + self.batch]
                if len(chunk) + len(part) > self.batch:
                    yield chunk
                    chunk = []
                chunk += part
        if chunk:
            yield chunk

    # -- one request ------------------------------------------------------------------------------

    def _asked(self, ids: Sequence[Sequence[int]], activation: bool = False) -> list[float]:
        """Rewards of some inputs, asked for until the server answers or counts as dead."""
        route, body = self._request(ids, activation)
        wait = _FIRST_WAIT_S
        while True:
            try:
                reply = self._sent("POST", route, body)
                rewards = _rewards(self.kind, reply, len(ids))
                with self._lock:
                    self._alive = max(self._alive, time.monotonic())
                return rewards
            except _Fault as fault:
                pause = fault.wait_s or wait * random.uniform(0.5, 1.5)
                with self._lock:
                    self.retries += 1
                    silent = time.monotonic() - self._alive
                if self._stop.is_set() or silent + pause > self.deadline_s:
                    raise MissingError(
                        f"{self.url}: no good reply for {self.deadline_s:g} s ({fault})",
                        hint="start the server; the same command goes on from here",
                    ) from None
                self._stop.wait(pause)
                wait = min(2 * wait, _LONGEST_WAIT_S)

    def _sent(self, method: str, route: str, body: Any = None) -> Any:
        """The decoded reply to one request.

        Raises:
            _Fault: It may be better the next time.
            PolarctlError: It never will.
        """
        try:
            reply = self.client.request(method, self.url + route, json=body)
        except httpx.TransportError as error:
            raise _Fault(type(error).__name__) from None
        if reply.status_code in _AGAIN:
            raise _Fault(f"status {reply.status_code}", _seconds(reply.headers.get("Retry-After")))
        if reply.status_code >= 400:
            text = " ".join(reply.text.split())[:300]
            raise PolarctlError(
                f"{self.url}{route}: status {reply.status_code}: {text}",
                hint="--server-type, or the model that the server holds",
            )
        try:
            return reply.json()
        except ValueError:
            raise _Fault("a reply that is no JSON") from None

    def _request(self, ids: Sequence[Sequence[int]], activation: bool) -> tuple[str, Any]:
        if self.kind in ("vllm", "polarctl"):
            given = [list(one) for one in ids]
            return "/classify", {"model": self.name, "input": given, "use_activation": activation}
        decode = self.encoder.tokenizer.decode
        texts = [decode(list(one), skip_special_tokens=False) for one in ids]
        if self.kind == "sglang":
            return "/classify", {"model": self.name, "text": texts}
        return "/pooling", {"model": self.name, "input": texts}

    # -- who is there -----------------------------------------------------------------------------

    def _known(self, kind: str, name: str | None) -> tuple[str, str | None]:
        """Kind of the server and name of its model, asked for where they are not given."""
        owner = None
        if kind == "auto" or name is None:
            wait = _FIRST_WAIT_S
            while True:
                try:
                    listed = self._sent("GET", "/v1/models")["data"][0]
                    owner, name = listed.get("owned_by"), name or listed["id"]
                    break
                except (_Fault, LookupError, TypeError) as fault:
                    if time.monotonic() - self._alive + wait > self.deadline_s:
                        raise MissingError(
                            f"{self.url}: no server answers ({fault})",
                            hint="vllm serve DIR --runner pooling, and --server URL",
                        ) from None
                    time.sleep(wait)
                    wait = min(2 * wait, _LONGEST_WAIT_S)
        if kind == "auto":
            if owner not in TYPES[1:]:
                raise UsageError(
                    f"{self.url}: what kind of server this is cannot be told (`{owner}`)",
                    hint=f"--server-type {', '.join(TYPES[1:])}",
                )
            kind = owner
            console.choice("server", kind, f"{self.url} says so")
        return kind, name

    def _refuse_sigmoid(self) -> None:
        """Refuse a server that gives sigmoid(reward), as vLLM does for some models.

        Rewards are unbounded. Where eight texts all come out between 0 and 1, with the activation
        asked for and without, the switch is not heard and the values are no rewards.
        """
        ids = [self.encoder.encode("Is it so?", "Yes.", text) for text in _PROBES]
        raw = self._asked(ids)
        if not all(0 < value < 1 for value in raw):
            return
        again = self._asked(ids, activation=True)
        if all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(raw, again, strict=True)):
            raise UsageError(
                f"{self.url}: gives values between 0 and 1 only, a sigmoid of the reward",
                hint='serve a model whose config.json says "problem_type": "regression" (polarctl '
                "convert checkpoint writes one)",
            )


def _rewards(kind: str, reply: Any, count: int) -> list[float]:
    """The rewards in a reply, in the order of the inputs.

    Raises:
        _Fault: They are not there, not as many as inputs, or not finite.
    """
    try:
        if kind == "sglang":
            rows = reply if isinstance(reply, list) else [reply]
            found = [row["embedding"][0] for row in rows]
        else:
            rows = sorted(reply["data"], key=lambda row: row["index"])
            field = "data" if kind == "lmdeploy" else "probs"
            found = [row[field] for row in rows]
            found = [value[0] if isinstance(value, list) else value for value in found]
        rewards = [float(value) for value in found]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise _Fault("a reply without rewards") from None
    if len(rewards) != count:
        raise _Fault(f"{len(rewards)} rewards for {count} inputs")
    if not all(map(math.isfinite, rewards)):
        raise _Fault("a reward that is not finite")
    return rewards


def _seconds(header: str | None) -> float | None:
    """Seconds of `Retry-After`, if it says seconds."""
    try:
        return min(max(float(header or ""), 0.0), 60.0)
    except ValueError:
        return None
