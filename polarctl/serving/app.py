"""The routes of `polarctl serve`."""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from polarctl import __version__, console
from polarctl.errors import PolarctlError, RecordError
from polarctl.records import KINDS, Record, check
from polarctl.scoring import (
    Item,
    ModelScorer,
    Scored,
    kind_of_scorable,
    outputs_of,
    require_reference,
    score_ids,
    score_records,
)
from polarctl.serving import shapes
from polarctl.serving.batching import Batcher, Closed
from polarctl.serving.meters import Meters
from polarctl.serving.shapes import Refused

_THREADS = 256  # requests under way; what is beyond waits


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body_bytes: Size of its body.
        inputs: Rewards.
    """

    body_bytes: int = 32 << 20
    inputs: int = 4096


class Service:
    """A reward model that many requests share; see `polarctl.scoring.Scorer`.

    Args:
        scorer: The model.
        name: Its name in replies.
        limits: What a request may ask for.
        ends: See `polarctl.serving.shapes.rollouts_of`.
        fingerprint: What tells its weights from others, for `/v1/models`.
    """

    def __init__(
        self,
        scorer: ModelScorer,
        name: str,
        limits: Limits,
        ends: Sequence[str] = (),
        fingerprint: str = "",
    ):
        self.fingerprint = fingerprint
        self.encoder, self.name, self.limits = scorer.model.encoder, name, limits
        self.ends = tuple(ends)
        self.no_reference = scorer.model.no_reference
        self.vocabulary = scorer.model.model.config.vocab_size
        self.longest = self.encoder.max_length + 64  # other merges can make it a few longer
        self.batcher = Batcher(scorer.rewards_of, scorer.batch_tokens, self._count)
        self.meters = Meters(self.batcher.waiting)

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items."""
        found = score_ids(items, self.encoder, self._rewards_of)
        self.meters.inputs.inc(len(found))
        return found

    def close(self) -> None:
        """Stop the model's thread."""
        self.batcher.close()

    def _rewards_of(self, groups: Any) -> list[list[float]]:
        return self.batcher.rewards(groups)

    def _count(self, requests: int, tokens: int) -> None:
        self.meters.batches.inc()
        self.meters.tokens.inc(tokens)

    # -- routes: from the decoded body to the reply, in a thread of their own ---------------------

    def native(self, body: Any) -> Any:
        """`/score`: a record or a list of them, as `polarctl score` reads them."""
        rows = body if isinstance(body, list) else [body]
        records = []
        for index, row in enumerate(rows):
            where = f"record {index}" if isinstance(body, list) else "the record"
            if not isinstance(row, dict):
                raise Refused(400, f"{where} is no JSON object")
            record = Record(row, where)
            try:
                check(record, KINDS[kind_of_scorable(record)])
                if not self.no_reference:
                    require_reference(record)
            except RecordError as error:
                raise Refused(400, f"{where}: {error.reason}") from None
            records.append(record)
        self._limit(sum(len(outputs_of(record)) for record in records))
        replies = []
        for fields, details in score_records(records, self, no_reference=self.no_reference):
            many = "rewards" in fields
            name = "rewards" if many else "reward"
            tokens = [one.tokens for one in details]
            cut = [list(one.truncated) for one in details]
            replies.append(
                {
                    name: fields[name],
                    "tokens": tokens if many else tokens[0],
                    "truncated": cut if many else cut[0],
                }
            )
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
        return shapes.pooled(rewards, sum(map(len, inputs)), self.name)

    def get_reward(self, body: Any) -> Any:
        """`/get_reward`, as OpenRLHF asks."""
        items = shapes.rollouts_of(_object(body), self.ends)
        self._limit(len(items))
        rewards = [one.reward for one in self.score(items)]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    def _given(self, body: Any) -> tuple[list[list[int]], list[float]]:
        given = shapes.inputs_of(_object(body))
        self._limit(len(given))
        inputs = [shapes.ids_of(g, self.encoder, self.vocabulary, self.longest) for g in given]
        found = self.batcher.rewards(shapes.grouped(inputs))
        self.meters.inputs.inc(len(inputs))
        return inputs, [reward for group in found for reward in group]

    def _limit(self, count: int) -> None:
        if count > self.limits.inputs:
            raise Refused(413, f"{count:,} inputs; a request takes {self.limits.inputs:,}")


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
        service.close()

    app = FastAPI(title="polarctl serve", version=__version__, lifespan=life)

    @app.exception_handler(HTTPException)
    async def nowhere(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.middleware("http")
    async def watch(request: Request, go: Callable[[Request], Awaitable[Response]]) -> Response:
        start, path = time.monotonic(), request.url.path
        try:
            if key is not None and path != "/health":
                _admit(request, key)
            response = await go(request)
        except Refused as refused:
            response = _error(refused.status, str(refused))
        except Exception as error:
            response = _failed(error)
        route = path if path in _ROUTES else "other"
        service.meters.requests.labels(route, response.status_code).inc()
        service.meters.seconds.labels(route).observe(time.monotonic() - start)
        return response

    for path, answer in (
        ("/score", service.native),
        ("/classify", service.classify),
        ("/pooling", service.pooling),
        ("/get_reward", service.get_reward),
    ):
        app.post(path)(_route(answer, service.limits.body_bytes))

    @app.get("/v1/models")
    async def models() -> Any:
        """The one model, as OpenAI's API lists it."""
        row = {"id": service.name, "object": "model", "owned_by": "polarctl"}
        row |= {"root": service.name, "fingerprint": service.fingerprint}
        return {"object": "list", "data": [{**row, "max_model_len": service.longest}]}

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """Ready."""
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' numbers."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")

    return app


_ROUTES = ("/score", "/classify", "/pooling", "/get_reward", "/v1/models", "/health", "/metrics")


def _route(answer: Callable[[Any], Any], most: int) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        body = await _read(request, most)
        try:
            decoded = orjson.loads(body)
        except ValueError:
            raise Refused(400, "the body is no JSON") from None
        reply = await run_in_threadpool(answer, decoded)
        return Response(orjson.dumps(reply), media_type="application/json")

    handle.__doc__ = answer.__doc__
    return handle


async def _read(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Refused(413, f"a body of more than {most:,} bytes")
        parts.append(part)
    return b"".join(parts)


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
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Response(orjson.dumps(body), status, headers, "application/json")


def _failed(error: Exception) -> Response:
    """What the client is told of a failure: never where it happened."""
    if isinstance(error, Closed):
        return _error(503, "the server is stopping")
    if isinstance(error, RecordError):
        return _error(400, error.reason)
    if isinstance(error, ClientDisconnect):
        return _error(400, "the body ends too early")
    console.warn(f"a request failed: {type(error).__name__}: {error}")
    said = str(error) if isinstance(error, PolarctlError) else "the server failed at this request"
    return _error(500, said)
