"""A judge behind an OpenAI-compatible server: `POST /v1/chat/completions`.

Faults that pass are tried again (`polarctl.parallel.http_client`), also a body without an answer;
any other refusal ends the run at once with the server's message, but for a question that is too
long, which is that record's error. So does a reply that names another model than the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from polarctl import console
from polarctl.config import KEY_VARIABLE
from polarctl.errors import MissingError, PolarctlError
from polarctl.judging.controls import Finder, published
from polarctl.judging.parsing import Failure, Reply
from polarctl.judging.prompting import question
from polarctl.parallel import served
from polarctl.parallel.http_client import (
    Answer,
    Fault,
    Remote,
    Request,
    check_url,
    refuse_errors,
)

_CUT_OFF = {"abort", "error"}  # the server's doing: the next time may be better


class ChatServer:
    """Asks a chat model over HTTP, many questions at a time.

    Args:
        url: Address of the server, with or without `/v1` or `/v1/chat/completions`.
        model: Name under which it serves the judge.
        temperature: 0 for the likeliest tokens.
        max_new_tokens: Length limit of an answer, thinking included.
        concurrency: Questions under way at a time.
        timeout_s: Seconds for one answer.
        deadline_s: Seconds for which a failed question is asked again without any good answer.
        pause_s: First pause before asking again; it doubles up to 10 s.

    Attributes:
        controls: What is a control token of the judge: its tokenizer is not known here.

    Raises:
        UsageError: The address is not an http address, or the key cannot be a header.
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
        check_url(url)
        self.controls: Finder = published
        self.url, self.model = _endpoint(url), model
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.remote = Remote(
            self.url,
            concurrency=concurrency,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            pause_s=pause_s,
            hint="is the judge's server up, and does it speak OpenAI's chat API?",
        )
        self._named = served.ReplyName(self.url)
        self._served: dict[str, Any] | None = None
        self._checked = 0

    def ask(
        self, questions: Sequence[list[dict[str, str]]], seeds: Sequence[int]
    ) -> list[Reply | Failure]:
        """The replies in the order of the questions.

        Args:
            questions: Messages each.
            seeds: A seed each, sent along; servers that know none pass over it.

        Raises:
            MissingError: No answer until the deadline, a refused key, or no such model.
            PolarctlError: Another refusal, or a reply by another model.
        """
        found = self.remote.ask(
            [
                self._request(messages, self.max_new_tokens, self._read, seed=seed % 2**31)
                for messages, seed in zip(questions, seeds, strict=True)
            ]
        )
        if self._served is not None and self._checked != self.remote.again:
            before = self._served
            served.refuse_another(self.url, before, self.served())
        return found

    def served(self) -> dict[str, Any]:
        """What tells the judge from another: what the server lists of it, and replies name.

        Raises:
            MissingError: No answer until the deadline, a refused key, or no such model.
            PolarctlError: Another refusal.
        """
        again = self.remote.again
        asked = question("Be brief", "Is it so?", ["Yes."], ["model-1"])
        self.remote.ask([self._request(asked, 1, self._read_name)])
        rows = (
            served.models(self.remote, self.url.removesuffix("chat/completions") + "models") or []
        )
        row = next((row for row in rows if row["id"] == self.model), {})
        self._checked = again
        self._served = {
            "served_by": "chat",
            "served_model": self.model,
            "served_as": self._named.name and console.plain(self._named.name),
            **served.fields(row),
        }
        return self._served

    def close(self) -> None:
        """Give the connections back; say how often the judge had to be asked again."""
        self.remote.close()

    def _request(self, messages: Any, tokens: int, read: Any, **more: Any) -> Request[Any]:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": tokens,
        }
        return Request("POST", self.url, {**body, **more}, read)

    def _read(self, answer: Answer) -> Reply | Failure:
        """The reply in an answer to a question."""
        said = f"{answer.status} {answer.said()}"
        if answer.status == 413 or (
            answer.status == 400 and "context" in said and "length" in said
        ):
            return Failure(f"the judge cannot take the question: {said}")
        value = self._value(answer)
        self._named.check(value)
        return _reply(value)

    def _read_name(self, answer: Answer) -> None:
        self._named.check(self._value(answer))

    def _value(self, answer: Answer) -> dict[str, Any]:
        """The decoded body of a good answer."""
        if answer.status != 200:
            said = f"{answer.status} {answer.said()}".strip()
            if answer.status in (401, 403):
                raise MissingError(f"the judge refuses the key: {said}", hint=f"set {KEY_VARIABLE}")
            if answer.status == 404:
                raise MissingError(
                    f"no model `{self.model}` at {self.url}: {said}",
                    hint="the name under which the server serves it",
                )
            raise PolarctlError(f"the judge at {self.url} answers {said}")
        value = answer.value()
        if not isinstance(value, dict):
            raise Fault("an answer that is no chat completion")
        refuse_errors(value)
        return value


def _reply(value: dict[str, Any]) -> Reply | Failure:
    try:
        (choice,) = value["choices"]
        message, end = choice["message"], choice.get("finish_reason")
        text = message["content"]
        # vLLM and SGLang hand the thinking over apart when told to; the name has changed once.
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Fault("an answer that is no chat completion") from None
    if not isinstance(end, str | None) or end in _CUT_OFF:
        raise Fault("an answer that was cut off")
    if end == "content_filter":
        return Failure("the judge's answer was filtered")
    finished = end != "length"
    if text is None and finished:
        return Failure("the judge's answer has no text")
    if not isinstance(text, str | None) or not isinstance(thoughts, str):
        raise Fault("an answer that is no chat completion")
    return Reply(text or "", thoughts, finished)


def _endpoint(url: str) -> str:
    base = url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return f"{base if urlsplit(url).path.strip('/') else base + '/v1'}/chat/completions"
