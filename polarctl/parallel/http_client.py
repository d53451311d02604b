"""Requests to a server over HTTP: sent again until it answers, bounded, and read strictly.

Faults that pass are tried again with growing pauses: no connection, time-outs, 408, 425, 429, most
of 5xx, and what the caller finds wrong with a reply (`Fault`). Requests run in one thread of their
own: any number of threads may ask, and one that is stopped leaves nothing waiting. Size and time of
a reply are limited, its words are cleaned, and a key comes from the environment and is never said.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlsplit

import httpx2 as httpx

from polarctl import console
from polarctl.config import KEY_VARIABLE
from polarctl.errors import MissingError, PolarctlError, UsageError

LONGEST_PAUSE_S = 10.0
MOST_BYTES = 16 << 20
_LONGEST_ASKED_PAUSE_S, _END_S = 60.0, 10.0
A = TypeVar("A")


class Fault(Exception):
    """A reply that may be better the next time.

    Args:
        why: What is wrong with it.
        pause_s: Seconds that the server asks to be left alone, if it does.
    """

    def __init__(self, why: str, pause_s: float | None = None):
        super().__init__(why)
        self.pause_s = pause_s


@dataclass(frozen=True)
class Answer:
    """What a server has answered.

    Attributes:
        status: HTTP status.
        body: The whole body.
    """

    status: int
    body: bytes

    def value(self) -> Any:
        """The body as JSON: each name once in an object, no NaN and no Infinity.

        Raises:
            Fault: It is none.
        """
        try:
            return json.loads(self.body, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise Fault("a reply that is no JSON") from None

    def said(self) -> str:
        """The server's own message, fit to be shown."""
        text = self.body[: 1 << 16].decode("utf-8", "replace")
        try:
            told = json.loads(text)
            for name in ("error", "detail", "message"):
                told = told.get(name, told) if isinstance(told, dict) else told
            text = told if isinstance(told, str) else json.dumps(told)
        except (ValueError, RecursionError):
            pass
        return console.plain(text)


@dataclass(frozen=True)
class Request(Generic[A]):
    """What is asked.

    Attributes:
        method: GET or POST.
        url: The whole address.
        body: For JSON, or None.
        read: From a reply whose status is not for a second try to what it says; raises `Fault` to
            have the request sent again. Runs in the thread of the requests.
    """

    method: str
    url: str
    body: Any
    read: Callable[[Answer], A]


def refuse_errors(reply: Any) -> None:
    """Raise Fault for a JSON object that tells of a failure, whatever else is in it."""
    told = reply if isinstance(reply, dict) else {}
    for name in ("error", "errors", "detail"):
        if told.get(name) or told.get("object") == name:
            raise Fault(f"a reply with `{name}`: {console.plain(str(told.get(name)), 100)}")


def check_url(url: str, name: str = "`--server`") -> None:
    """Raise UsageError for what is not an address of a server, or one with a password in it.

    Args:
        url: The address; it is shown only when it holds no password.
        name: Where it is set, for messages.
    """
    if "@" in url:
        raise UsageError(
            f"{name}: the address holds a user or a password",
            hint=f"the address alone; a key goes into {KEY_VARIABLE}",
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        good = good and not parts.query and not parts.fragment and bool(httpx.URL(url).host)
    except (ValueError, httpx.InvalidURL):
        good = False
    if not good:
        raise UsageError(
            f"{name}: `{console.plain(url, 100)}` is no address", hint="http://127.0.0.1:8000"
        )


def key() -> str:
    """The key that a server asks for, from now on never said; empty when there is none.

    Raises:
        UsageError: It cannot be a header.
    """
    found = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch("[!-~]*", found):
        raise UsageError(f"`{KEY_VARIABLE}` holds characters that no key has")
    # As a server may write it.
    console.hide(found, json.dumps(found)[1:-1], quote(found, safe=""))
    return found


class Remote:
    """A server that is asked. Threads may share it.

    Args:
        url: Its address, for messages.
        concurrency: Requests under way at most.
        timeout_s: Seconds for the whole of one reply.
        deadline_s: Seconds for which a request is sent again after its first fault, and after the
            last good reply to any other.
        pause_s: First pause before a request is sent again; it doubles up to 10 s.
        hint: What helps when no server answers.

    Attributes:
        again: Requests that had to be sent again so far.

    Raises:
        UsageError: No such address, or a key that cannot be one.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int,
        timeout_s: float,
        deadline_s: float,
        pause_s: float = 0.1,
        hint: str | None = None,
    ):
        check_url(url)
        self.url, self.hint = url, hint
        self.timeout_s, self.deadline_s, self.pause_s = timeout_s, deadline_s, pause_s
        self.again, self._met, self._good = 0, False, -math.inf
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if own := key():
            headers["Authorization"] = f"Bearer {own}"
        try:
            self._client = httpx.AsyncClient(
                headers=headers,
                timeout=None,  # `_sent` has one for the whole reply
                limits=httpx.Limits(max_connections=concurrency),
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise UsageError(f"the environment's proxy: {console.plain(str(error))}") from None
        self._places, self._open = asyncio.Semaphore(concurrency), threading.Lock()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_turn, args=(self._loop,), daemon=True, name="requests")
        thread.start()
        self._finalizer = weakref.finalize(self, _end, self._loop, thread, self._client)

    def ask(self, requests: Sequence[Request[A]]) -> list[A]:
        """What is read from the replies, in the order of the requests.

        Raises:
            MissingError: No good reply until the deadline.
            Exception: What `Request.read` raises; the others of the call are given up.
        """
        with self._open:  # what is handed over before the end is ended by it
            if not self._finalizer.alive:
                raise PolarctlError(f"{self.url}: the request was given up")
            future = asyncio.run_coroutine_threadsafe(self._all(requests), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise PolarctlError(f"{self.url}: the request was given up") from None
        finally:
            future.cancel()  # when this thread is stopped

    def close(self) -> None:
        """End the requests under way; say how many had to be sent again."""
        with self._open:
            end = self._finalizer.detach()
        if end:
            _end(*end[2])
        if end and self.again:
            console.warn(f"{self.url}: {self.again:,} requests had to be sent again")

    # -- in the thread of the requests ------------------------------------------------------------

    async def _all(self, requests: Sequence[Request[A]]) -> list[A]:
        over = asyncio.Event()
        tasks = [asyncio.ensure_future(self._answered(one, over)) for one in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answered(self, request: Request[A], over: asyncio.Event) -> A:
        """What is read from the reply to one request, sent until there is a good one.

        `over` is set at the first failure of the call, before another request takes the place.
        """
        async with self._places:
            if over.is_set():
                raise asyncio.CancelledError
            try:
                return await self._insist(request)
            except BaseException:
                over.set()
                raise

    async def _insist(self, request: Request[A]) -> A:
        wait, first = self.pause_s, None
        content = None if request.body is None else json.dumps(request.body).encode()
        while True:
            try:
                sent = self._sent(request.method, request.url, content)
                found = request.read(await asyncio.wait_for(sent, self.timeout_s))
                self._good = time.monotonic()
                return found
            except Fault as error:
                fault = error
            except asyncio.TimeoutError:
                fault = Fault(f"no answer in {self.timeout_s:g} s")
            except httpx.HTTPError as error:
                fault = Fault(console.plain(f"{type(error).__name__}: {error}").rstrip(": "))
            now = time.monotonic()
            first = first or now
            pause = fault.pause_s or wait * random.uniform(0.5, 1.5)  # not all at once
            if now + pause > max(first, self._good) + self.deadline_s:
                raise self._dead(fault)
            if not self.again:
                console.warn(f"{self.url}: {fault}; asking again for up to {self.deadline_s:g} s")
            self.again += 1
            await asyncio.sleep(pause)
            wait = min(2 * wait, LONGEST_PAUSE_S)

    def _dead(self, fault: Fault) -> MissingError:
        if not self._met:
            return MissingError(f"{self.url}: no server answers ({fault})", hint=self.hint)
        return MissingError(
            f"{self.url}: no good reply for {self.deadline_s:g} s ({fault})",
            hint="mend the server; the same command goes on from here",
        )

    async def _sent(self, method: str, url: str, content: bytes | None) -> Answer:
        """The reply to one request, read to its end.

        Raises:
            Fault: Its status is for a second try, or it is too large.
        """
        async with self._client.stream(method, url, content=content) as reply:
            self._met = True
            if reply.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise Fault("a compressed reply, which was not asked for")
            parts, size = [], 0
            async for part in reply.aiter_raw():
                size += len(part)
                if size > MOST_BYTES:
                    raise Fault(f"a reply of more than {MOST_BYTES >> 20} MiB")
                parts.append(part)
            answer = Answer(reply.status_code, b"".join(parts))
            again = answer.status in (408, 425, 429) or answer.status >= 500
            if again and answer.status not in (501, 505):  # those stay
                pause = _seconds(reply.headers.get("Retry-After"))
                raise Fault(f"status {answer.status} {answer.said()}".strip(), pause)
            return answer


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _seconds(header: str | None) -> float | None:
    """Seconds of `Retry-After`, if it says seconds."""
    try:
        asked = float(header or "")
    except ValueError:
        return None
    return min(max(asked, 0.0), _LONGEST_ASKED_PAUSE_S) if math.isfinite(asked) else None


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()  # until `_end` stops it
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: Any) -> None:
    """End the requests, their connections and their thread. Holds no `Remote`, which is gone."""

    async def down() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()
        loop.call_soon(loop.stop)

    asyncio.run_coroutine_threadsafe(down(), loop)
    if threading.current_thread() is not thread:  # as when the collector runs there
        thread.join(_END_S)
