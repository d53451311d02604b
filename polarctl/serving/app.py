"""The routes of `polarctl serve`."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import anyio.to_thread
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polarctl import __version__, console
from polarctl.errors import PolarctlError, RecordError
from polarctl.records import Record, outputs_of
from polarctl.scoring.answers import AS_THEY_ARE, Answers
from polarctl.scoring.chat_classifier import ClassifierScorer
from polarctl.scoring.scorer import (
    Item,
    ModelScorer,
    Scored,
    check_scorable,
    references_of,
    score_answers,
    score_ids,
    score_records,
)
from polarctl.serving import shapes
from polarctl.serving.batching import Batcher, Closed, Gone, Ticket
from polarctl.serving.limits import Gate, InTurns, Limits, Refused, Size, Turns, check_values
from polarctl.serving.meters import Meters

_THREADS = 256  # requests under way; what is beyond waits
_TOKENIZING = 4  # of them
_AT_ONCE = 4  # the largest requests that are held at the same time
_LEFT = 499  # what nginx counts a request as whose client has left; nobody gets it

_ticket: contextvars.ContextVar[Ticket | None] = contextvars.ContextVar("ticket", default=None)


class Service:
    """A reward model that many requests share; see `polarctl.scoring.scorer.Scorer`.

    Args:
        scorer: The model. One that reads conversations takes records and rollouts alone.
        name: Its name in replies.
        limits: What a request may ask for.
        ends: See `polarctl.serving.shapes.rollouts_of`.
        fingerprint: What tells its weights from others, for `/v1/models`.
        answers: What of an output is scored, where a request has outputs of their own.
        pooling: How a reward stands in a reply of `/pooling` (`polarctl.serving.shapes.POOLING`).
    """

    def __init__(
        self,
        scorer: ModelScorer | ClassifierScorer,
        name: str,
        limits: Limits,
        ends: Sequence[str] = (),
        fingerprint: str = "",
        answers: Answers = AS_THEY_ARE,
        pooling: str = "list",
    ):
        self.pooling_data = pooling
        self._said: set[str] = set()
        self.name, self.limits, self.ends = name, limits, tuple(ends)
        self.fingerprint, self.answers = fingerprint, answers
        self._turns = Turns(_TOKENIZING, self.check)
        self.bodies = Gate(_AT_ONCE * limits.body_bytes)
        self._texts = Gate(_AT_ONCE * limits.chars)
        self.chat: ClassifierScorer | None = None
        if isinstance(scorer, ClassifierScorer):
            self.chat, engine, self.tokenizer = scorer, scorer.engine, scorer.tokenizer
            self.no_reference = scorer.encoder.reference is None
            self.longest = scorer.encoder.limit
        else:
            engine = scorer
            self.encoder, self.tokenizer = copy.copy(engine.model.encoder), engine.model.tokenizer
            self.encoder.tokenizer = InTurns(self.encoder.tokenizer, self._turns)
            self.no_reference = engine.model.no_reference
            self.longest = self.encoder.max_length + 64  # other merges can make it a few longer
            self.vocabulary = engine.model.model.config.vocab_size
        self.batcher = Batcher(engine.rewards_of, engine.batch_tokens, self._count)
        self.meters = Meters(self.batcher.waiting)

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items."""
        if self.chat is None:
            found = score_ids(items, self.encoder, self._rewards_of)
        else:
            found = self.chat.score_with(items, self._rewards_of, self._turns)
        self.meters.inputs.inc(len(found))
        return found

    def check(self) -> None:
        """Raise Gone or Closed when nothing more is to be done for this thread's request."""
        self.batcher.check(_ticket.get())

    def close(self, patience_s: float | None = None) -> None:
        """Stop the model's thread; see `polarctl.serving.batching.Batcher.close`."""
        self.batcher.close(patience_s)

    def _rewards_of(self, groups: Any) -> list[list[float]]:
        return self.batcher.rewards(groups, _ticket.get())

    def _count(self, requests: int, tokens: int) -> None:
        self.meters.batches.inc()
        self.meters.tokens.inc(tokens)

    # -- routes: from the decoded body to the reply, in a thread of their own ---------------------

    def native(self, body: Any) -> Any:
        """`/score`: a record or a list of them, as `polarctl score` reads them."""
        rows = body if isinstance(body, list) else [body]
        if isinstance(body, dict) and {"text_1", "queries", "documents"} & body.keys():
            raise Refused(400, f"pairs of texts are scored by other models; here {_RECORDS}")
        records = []
        for index, row in enumerate(rows):
            where = f"record {index}" if isinstance(body, list) else "the record"
            if not isinstance(row, dict):
                raise Refused(400, f"{where} is no JSON object")
            record = Record(row, where)
            try:
                check_scorable(record, reference=not self.no_reference)
            except RecordError as error:
                raise Refused(400, f"{where}: {error.reason}") from None
            records.append(record)
        size = Size(self.limits)
        for record in records:
            references = [""] if self.no_reference else references_of(record)
            size.add(record["prompt"], references, outputs_of(record))
        with self._texts.holding(size.chars):
            scored = list(
                score_records(records, self, no_reference=self.no_reference, answers=self.answers)
            )
        replies = []
        for fields, details in scored:
            many = "rewards" in fields
            name = "rewards" if many else "reward"
            tokens = [one.tokens for one in details]
            cut = [list(one.truncated) for one in details]
            replies.append(
                {
                    name: fields[name],
                    "tokens": tokens if many else tokens[0],
                    "truncated": cut if many else cut[0],
                    **({"floored": fields["floored"]} if "floored" in fields else {}),
                }
            )
            self._count_floored(details)
        return replies if isinstance(body, list) else replies[0]

    def classify(self, body: Any) -> Any:
        """`/classify`, in vLLM's shape for `input` and in SGLang's for `text`."""
        inputs, rewards = self._given(body)
        counts = [len(ids) for ids in inputs]
        if "input" not in body:
            return shapes.embedded(rewards, counts)
        return shapes.classified(rewards, sum(counts), self.name)

    def pooling(self, body: Any) -> Any:
        """`/pooling`, in the shape of vLLM and lmdeploy."""
        inputs, rewards = self._given(body)
        return shapes.pooled(rewards, sum(map(len, inputs)), self.name, self.pooling_data)

    def tokenize(self, body: Any) -> Any:
        """`/tokenize`, in vLLM's shape: of a `prompt`, or of `messages` for a model of chats."""
        given = _object(body)
        if "messages" in given:
            ids = self._conversation(given)
        else:
            text = given.get("prompt")
            if not isinstance(text, str):
                raise Refused(400, "`prompt` must be a text")
            Size(self.limits).add_input(text)
            with self._turns:
                ids = self.tokenizer.encode(
                    text, add_special_tokens=given.get("add_special_tokens") is not False
                )
        return {"count": len(ids), "max_model_len": self.longest, "tokens": ids}

    def get_reward(self, body: Any) -> Any:
        """`/get_reward`, as OpenRLHF asks."""
        items, cut_off = shapes.rollouts_of(
            _object(body), self.ends, no_reference=self.no_reference
        )
        size = Size(self.limits)
        for item in items:
            size.add(item.prompt, [item.reference], [item.output])
        with self._texts.holding(size.chars):
            found = score_answers(items, self, self.answers, cut_off)
        self._count_floored(found)
        rewards = [one.reward for one in found]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    def _count_floored(self, found: Sequence[Scored]) -> None:
        for one in found:
            if one.floored is not None:
                self.meters.floored.labels(one.floored).inc()

    def _given(self, body: Any) -> tuple[list[list[int]], list[float]]:
        if "messages" in _object(body):
            ids = self._conversation(body)
            ((reward,),) = self._rewards_of([[ids]])
            self.meters.inputs.inc()
            return [ids], [reward]
        if self.chat is not None:
            raise Refused(
                400, "the model reads conversations, not whole inputs: `messages`, or /score"
            )
        given = shapes.inputs_of(body)
        size = Size(self.limits)
        for one in given:
            size.add_input(one)
        with self._texts.holding(size.chars):
            inputs = [shapes.ids_of(g, self.encoder, self.vocabulary, self.longest) for g in given]
            found = self._rewards_of(shapes.grouped(inputs))
        self.meters.inputs.inc(len(inputs))
        return inputs, [reward for group in found for reward in group]

    def _conversation(self, body: dict[str, Any]) -> list[int]:
        """The token ids of `messages`, for a model that reads them."""
        if self.chat is None:
            raise Refused(400, f"a POLAR model reads no conversation; {_RECORDS}")
        item = shapes.conversation_of(body)
        size = Size(self.limits)
        size.add(item.prompt, [item.reference], [item.output])
        with self._texts.holding(size.chars), self._turns:
            return self.chat.encode(item)[0]

    def say_once(self, message: str) -> None:
        """Warn of a refusal that its client does not show, of the first few kinds of it."""
        if len(self._said) < _SAID and message not in self._said:
            self._said.add(message)
            console.warn(f"/get_reward: {message}")


def create(service: Service, key: str | None = None) -> FastAPI:
    """The application.

    Args:
        service: Who answers.
        key: What `Authorization: Bearer` must say on every route but `/health`.
    """

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
        yield
        service.close(0)

    app = FastAPI(
        title="polarctl serve", version=__version__, lifespan=life, redirect_slashes=False
    )

    @app.exception_handler(HTTPException)
    async def nowhere(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.scope['path']}: {error.detail}"
        if error.status_code in (404, 405):
            said += f"; served: {', '.join(_ROUTES)}"
        return _error(error.status_code, said)

    app.add_middleware(_Watch, service=service, key=key)

    for path, answer in (
        ("/score", service.native),
        ("/v1/score", service.native),
        ("/classify", service.classify),
        ("/pooling", service.pooling),
        ("/tokenize", service.tokenize),
        ("/get_reward", service.get_reward),
    ):
        app.post(path)(_route(answer, service))

    @app.get("/v1/models")
    async def models() -> Any:
        """The one model, as OpenAI's API lists it."""
        row = {"id": service.name, "object": "model", "owned_by": "polarctl"}
        row |= {"root": service.name, "fingerprint": service.fingerprint}
        return {"object": "list", "data": [{**row, "max_model_len": service.longest}]}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Ready."""
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' numbers."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")

    return app


_ROUTES = (
    "/score /v1/score /classify /pooling /tokenize /get_reward /v1/models /health /metrics".split()
)
_RECORDS = '/score takes {"prompt", "reference", "output" or "candidates"}'
_SAID = 20  # refusals that are said


class _Watch:
    """Admits, counts, and says what has gone wrong.

    Args:
        app: The routes.
        service: See `create`.
        key: See `create`.
    """

    def __init__(self, app: ASGIApp, service: Service, key: str | None):
        self.app, self.service, self.key = app, service, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # What the router goes by. `request.url` is put together with what a client sends as Host.
        start, path, status = time.monotonic(), scope["path"], 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self.key is not None and path != "/health":
                _admit(Request(scope), self.key)
            await self.app(scope, receive, noted)
        except Exception as error:
            if status:
                raise
            if path == "/get_reward" and isinstance(error, RecordError):
                self.service.say_once(_reason(error))  # OpenRLHF's log holds the status alone
            response = _failed(error)
            await response(scope, receive, noted)
        route = path if path in _ROUTES else "other"
        self.service.meters.requests.labels(route, status).inc()
        self.service.meters.seconds.labels(route).observe(time.monotonic() - start)


def _route(
    answer: Callable[[Any], Any], service: Service
) -> Callable[[Request], Awaitable[Response]]:
    def work(parts: list[bytes]) -> bytes:
        service.check()
        body = b"".join(parts)
        parts.clear()
        check_values(body)
        try:
            decoded = orjson.loads(body)
        except ValueError:
            raise Refused(400, "the body is no JSON") from None
        del body
        return orjson.dumps(answer(decoded))

    async def handle(request: Request) -> Response:
        ticket = Ticket()
        _ticket.set(ticket)
        parts: list[bytes] = []
        with service.bodies.growing() as take:
            await _read(request, service.limits.body_bytes, take, parts)
            leaving = asyncio.create_task(_until_it_leaves(request, service, ticket))
            try:
                reply = await run_in_threadpool(work, parts)
            finally:
                leaving.cancel()
        return Response(reply, media_type="application/json")

    handle.__doc__ = answer.__doc__
    return handle


async def _read(
    request: Request, most: int, take: Callable[[int], None], parts: list[bytes]
) -> None:
    """Add what comes of a body to `parts`; it is taken first."""
    size, sent = 0, request.headers.get("content-length", "")
    if sent.isdecimal() and int(sent) > most:
        raise _too_large(most)
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        take(len(part))
        parts.append(part)


def _too_large(most: int) -> Refused:
    return Refused(413, f"a body of more than {most:,} bytes (--max-body-mib)")


async def _until_it_leaves(request: Request, service: Service, ticket: Ticket) -> None:
    """End the work of a client that does not wait for it."""
    await request.receive()  # all of the body has been read: nothing but its end can come
    service.batcher.end(ticket, Gone())


def _admit(request: Request, key: str) -> None:
    sent = request.headers.get("Authorization", "").encode()
    if not hmac.compare_digest(sent, f"Bearer {key}".encode()):
        raise Refused(401, "a wrong key, or none: `Authorization: Bearer KEY`")


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


def _error(status: int, message: str) -> Response:
    body = {"error": {"message": message, "type": "error", "code": status}}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
    return Response(orjson.dumps(body), status, headers, "application/json")


def _failed(error: Exception) -> Response:
    """What the client is told of a failure: never where it happened."""
    if isinstance(error, Refused):
        return _error(error.status, str(error))
    if isinstance(error, Gone):
        return _error(_LEFT, "the client has left")
    if isinstance(error, Closed):
        return _error(503, "the server is stopping")
    if isinstance(error, RecordError):
        return _error(400, _reason(error))
    if isinstance(error, ClientDisconnect):
        return _error(400, "the body ends too early")
    console.warn(f"a request failed: {type(error).__name__}: {error}")
    said = str(error) if isinstance(error, PolarctlError) else "the server failed at this request"
    return _error(500, said)


def _reason(error: RecordError) -> str:
    return error.reason if error.hint is None else f"{error.reason} ({error.hint})"
