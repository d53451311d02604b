"""A judge behind an OpenAI-compatible server: `POST /v1/chat/completions`.

Faults that pass (no connection, time-outs, 408, 429, 5xx, a body that is no answer) are tried again
with growing pauses; any other refusal ends the run at once with the server's message, but for a
question that is too long, which is that record's error.

The key comes from the environment alone, is sent as `Authorization: Bearer` and never said.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.judging.parsing import Failure, Reply

KEY = "POLARCTL_JUDGE_KEY"
LONGEST_PAUSE_S = 30.0


class ChatServer:
    """Asks a chat model over HTTP, many questions at a time.

    Args:
        url: Address of the server, with or without `/v1` or `/v1/chat/completions`.
        model: Name under which it serves the judge.
        temperature: 0 for the likeliest tokens.
        max_new_tokens: Length limit of an answer, thinking included.
        concurrency: Questions under way at a time.
        timeout_s: Seconds for one answer.
        deadline_s: Seconds for which one question is tried again after its first fault.
        pause_s: First pause before trying again; it doubles up to 30 s.

    Raises:
        UsageError: The address is no http address, or the key cannot be a header.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 4096,
        concurrency: int = 16,
        timeout_s: float = 600.0,
        deadline_s: float = 120.0,
        pause_s: float = 0.5,
    ):
        self.url, self.model = _endpoint(url), model
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self.deadline_s, self.pause_s = deadline_s, pause_s
        self._key = os.environ.get(KEY, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise UsageError(f"`{KEY}` holds characters that no key has")
        self._warned = False

    def ask(
        self, questions: Sequence[list[dict[str, str]]], seeds: Sequence[int]
    ) -> list[Reply | Failure]:
        """The replies in the order of the questions.

        Args:
            questions: Messages each.
            seeds: A seed each, sent along; servers that know none pass over it.

        Raises:
            MissingError: No answer until the deadline, a refused key, or no such model.
            PolarctlError: Another refusal.
        """
        return asyncio.run(self._ask_all(questions, seeds))

    async def _ask_all(self, questions: Any, seeds: Any) -> list[Reply | Failure]:
        places = asyncio.Semaphore(self.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        # The time-out holds for the whole answer (`wait_for`), not for each piece of it.
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as client:

            async def one(messages: Any, seed: int) -> Reply | Failure:
                async with places:
                    return await self._answer(client, messages, seed)

            tasks = [one(*pair) for pair in zip(questions, seeds, strict=True)]
            return list(await asyncio.gather(*tasks))

    async def _answer(self, client: Any, messages: Any, seed: int) -> Reply | Failure:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "seed": seed % 2**31,
        }
        clock = asyncio.get_running_loop().time
        end = None
        for attempt in itertools.count():
            pause = min(LONGEST_PAUSE_S, self.pause_s * 2 ** min(attempt, 16))
            pause *= random.uniform(0.5, 1.0)  # so that not all come back at once
            try:
                response = await asyncio.wait_for(client.post(self.url, json=body), self.timeout_s)
            except asyncio.TimeoutError:
                fault = f"no answer in {self.timeout_s:g} s"
            except httpx.TransportError as error:
                fault = str(error) or type(error).__name__
            else:
                found = self._read(response)
                if not isinstance(found, str):
                    return found
                fault = found
                asked = response.headers.get("retry-after", "")
                pause = max(pause, float(asked)) if asked.isdecimal() else pause
            end = clock() + self.deadline_s if end is None else end
            if clock() + pause > end:
                raise MissingError(
                    f"the judge at {self.url} gives no answer: {fault}",
                    hint="is its server up, and does it speak OpenAI's chat API?",
                )
            if not self._warned:
                self._warned = True
                console.warn(f"judge: {fault}; trying again for up to {self.deadline_s:g} s")
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    def _read(self, response: Any) -> Reply | Failure | str:
        """The reply, or as a text the fault for which the question is asked again."""
        status = response.status_code
        if status == 200:
            return _reply(response)
        said = f"{status} {self._said(response)}".strip()
        if status in (408, 429) or status >= 500:
            return f"the server answers {said}"
        if status == 413 or (status == 400 and "context" in said and "length" in said):
            return Failure(f"the judge cannot take the question: {said}")
        if status in (401, 403):
            raise MissingError(f"the judge refuses the key: {said}", hint=f"set {KEY}")
        if status == 404:
            raise MissingError(
                f"no model `{self.model}` at {self.url}: {said}",
                hint="the name under which the server serves it",
            )
        raise PolarctlError(f"the judge at {self.url} answers {said}")

    def _said(self, response: Any) -> str:
        """The server's own message, in one line and without the key."""
        try:
            told = response.json()
            told = told.get("error", told) if isinstance(told, dict) else told
            text = str(told.get("message", told) if isinstance(told, dict) else told)
        except ValueError:
            text = response.text
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:200]


def _reply(response: Any) -> Reply | Failure | str:
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        text = message["content"]
        # vLLM and SGLang hand the thinking over apart when told to; the name has changed once.
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return "the server's answer is no chat completion"
    finished = choice.get("finish_reason") != "length"
    if text is None and finished:
        return Failure("the judge's answer has no text")
    if not isinstance(text, str | None) or not isinstance(thoughts, str):
        return "the server's answer is no chat completion"
    return Reply(text or "", thoughts, finished)


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise UsageError(f"`--judge-url {url}`: no address", hint="http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise UsageError("`--judge-url` holds a password", hint=f"the key goes into {KEY}")
    base = url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return f"{base if parts.path.strip('/') else base + '/v1'}/chat/completions"
