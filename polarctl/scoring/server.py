"""Scoring by a server that holds the model: vLLM, SGLang or lmdeploy, asked over HTTP.

Inputs are made here, by the template of the checkpoint, so that they are those of every other
engine: as token ids where the server takes them, else as the glued text. What fails for a while is
asked again (`polarctl.parallel.http_client`), and so is a reply that is not exactly one finite
number for each input. What fails for good (any other 4xx) ends the run, and so does a reply by
another model. No failure ever becomes a reward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from polarctl import console
from polarctl.config import KEY_VARIABLE
from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.model.template import Encoder
from polarctl.parallel import served
from polarctl.parallel.http_client import (
    Answer,
    Fault,
    Remote,
    Request,
    refuse_errors,
)
from polarctl.scoring.scorer import Item, Scored, score_ids

TYPES = ("auto", "vllm", "sglang", "lmdeploy", "polarctl")
_REQUEST_S = 120.0
_PROBES = ("Yes.", "No.", "a", "It is 7.", "the sea was calm", "?", "1 2 3", "def f(): pass")


class ServerScorer:
    """Scores by a server's replies; see `polarctl.scoring.scorer.Scorer`.

    Args:
        url: Where it is, such as http://127.0.0.1:8000.
        encoder: The template of the checkpoint that it serves.
        kind: One of `TYPES`; `auto` asks it.
        name: Model name in the requests; None: the first that it lists.
        concurrency: Requests under way at most.
        batch: Inputs of a request at most.
        deadline_s: Seconds for which a failed request is sent again without any good reply.

    Attributes:
        kind: What it is.
        name: Model name in the requests.

    Raises:
        MissingError: No answer within the deadline, or a refused key.
        UsageError: No such kind or model, or the server gives a function of the reward.
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
        self.remote = Remote(
            self.url,
            concurrency=concurrency,
            timeout_s=min(
                _REQUEST_S, max(1.0, deadline_s / 3)
            ),  # one that hangs is not a dead server
            deadline_s=deadline_s,
            hint="vllm serve DIR --runner pooling, and --server URL",
        )
        self._names: set[str] = set()
        try:
            row = self._row(kind, name)
            self.kind, self.name = self._known(kind, name, row)
            self._named = served.ReplyName(self.url, {self.name, *self._names})
            probe = self._probe()
            self._refuse_sigmoid(probe)
        except BaseException:
            self.close()
            raise
        self._served = self._identity(row, probe)
        self._checked = self.remote.again

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items.

        Raises:
            MissingError: The server is dead.
            PolarctlError: It refuses a request, or serves another model than at the start.
        """
        return score_ids(items, self.encoder, self.rewards_of)

    def rewards_of(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Rewards of the candidates of every group, from their token ids. Threads may share it."""
        flat = iter(self._asked(list(self._chunks(groups))))
        found = [[next(flat) for _ in group] for group in groups]
        if self._checked != self.remote.again:
            self._check()
        return found

    def served(self) -> dict[str, Any]:
        """What tells its model from another: what it lists of it, and its rewards of eight texts.

        Fields of a run's identity, all named `served_...`.
        """
        return self._served

    def close(self) -> None:
        """Give the connections back; say how often the server had to be asked again."""
        self.remote.close()

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

    # -- requests ---------------------------------------------------------------------------------

    def _asked(
        self, chunks: Sequence[Sequence[Sequence[int]]], activation: bool = False
    ) -> list[float]:
        """Rewards of the inputs of all chunks, a request each."""
        requests = []
        for ids in chunks:
            route, body = self._body(ids, activation)
            read = functools.partial(self._read, count=len(ids))
            requests.append(Request("POST", self.url + route, {"model": self.name, **body}, read))
        return [reward for rewards in self.remote.ask(requests) for reward in rewards]

    def _body(self, ids: Sequence[Sequence[int]], activation: bool) -> tuple[str, Any]:
        if self.kind in ("vllm", "polarctl"):
            return "/classify", {"input": [list(one) for one in ids], "use_activation": activation}
        decode = self.encoder.tokenizer.decode
        texts = [decode(list(one), skip_special_tokens=False) for one in ids]
        if self.kind == "sglang":
            return "/classify", {"text": texts}
        return "/pooling", {"input": texts}

    def _read(self, answer: Answer, count: int) -> list[float]:
        """The rewards in a reply to `count` inputs."""
        if answer.status in (401, 403):
            raise MissingError(
                f"{self.url}: the server refuses the key: {answer.said()}",
                hint=f"set {KEY_VARIABLE}",
            )
        if answer.status != 200:
            raise PolarctlError(
                f"{self.url}: status {answer.status}: {answer.said()}",
                hint="--server-type, or the model that the server holds",
            )
        reply = answer.value()
        rewards = rewards_in(self.kind, reply, count)
        if isinstance(reply, dict):
            self._named.check(reply)
        return rewards

    # -- who is there -----------------------------------------------------------------------------

    def _row(self, kind: str, name: str | None) -> dict[str, Any]:
        """What the server lists of the model; empty when it has no list and none is needed."""
        rows = served.models(self.remote, f"{self.url}/v1/models")
        if rows is None:
            if kind == "auto" or name is None:
                raise UsageError(
                    f"{self.url}: has no list of models (/v1/models)",
                    hint="--server-type and --server-model, or another address",
                )
            return {}
        self._names = {row["id"] for row in rows}
        if name is None:
            return rows[0]
        for row in rows:
            if row["id"] == name:
                return row
        names = console.plain(", ".join(sorted(self._names)))
        raise UsageError(f"{self.url}: no model `{name}` there", hint=f"--server-model {names}")

    def _known(self, kind: str, name: str | None, row: dict[str, Any]) -> tuple[str, str]:
        """Kind of the server and name of its model, from its list where they are not given."""
        if kind == "auto":
            owner = row.get("owned_by")
            if not isinstance(owner, str) or owner not in TYPES[1:]:
                raise UsageError(
                    f"{self.url}: what kind of server this is cannot be told "
                    f"(`{console.plain(str(owner), 60)}`)",
                    hint=f"--server-type {', '.join(TYPES[1:])}",
                )
            kind = owner
            console.choice("server", kind, f"{self.url} says so")
        return kind, name or row["id"]

    def _probe(self, activation: bool = False) -> list[float]:
        """The rewards of eight texts."""
        ids = [self.encoder.encode("Is it so?", "Yes.", text) for text in _PROBES]
        return self._asked([ids], activation)

    def _refuse_sigmoid(self, raw: Sequence[float]) -> None:
        """Refuse a server that gives sigmoid(reward), as vLLM does for some models.

        Rewards are unbounded. Where eight texts all come out between 0 and 1, with the activation
        asked for and without, the switch is not heard and the values are not rewards.
        """
        if not all(0 < value < 1 for value in raw):
            return
        again = self._probe(activation=True)
        if all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(raw, again, strict=True)):
            raise UsageError(
                f"{self.url}: gives values between 0 and 1 only, a sigmoid of the reward",
                hint='serve a model whose config.json says "problem_type": "regression" (polarctl '
                "convert checkpoint writes one)",
            )

    def _identity(self, row: dict[str, Any], probe: Sequence[float]) -> dict[str, Any]:
        return {
            "served_by": self.kind,
            "served_model": console.plain(self.name),
            **served.fields(row),
            served.PROBE: [float(f"{value:.6g}") for value in probe],
        }

    def _check(self) -> None:
        """After faults: is it still the same model? The server may have been started anew.

        Raises:
            PolarctlError: It is another.
        """
        again = self.remote.again
        row = self._row(self.kind, self.name)
        now = self._identity(row, self._probe())
        served.refuse_another(self.url, self._served, now)
        self._checked = again


def rewards_in(kind: str, reply: Any, count: int) -> list[float]:
    """The rewards in a decoded reply, in the order of the inputs.

    Args:
        kind: One of `TYPES` but `auto`.
        reply: Decoded JSON.
        count: Inputs that were sent.

    Raises:
        Fault: Not exactly one finite number for each input, or the reply tells of an error.
    """
    refuse_errors(reply)
    rows: Any = reply if isinstance(reply, list) else [reply]
    if kind != "sglang":
        rows = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Fault("a reply without rewards")
    if len(rows) != count:
        raise Fault(f"{len(rows)} rewards for {count} inputs")
    for row in rows:
        refuse_errors(row)
    if kind != "sglang":
        places = [row.get("index") for row in rows]
        if not all(type(place) is int for place in places) or sorted(places) != [*range(count)]:
            raise Fault("a reply whose `index` does not name each input once")
        rows = sorted(rows, key=lambda row: row["index"])
    field = {"sglang": "embedding", "lmdeploy": "data"}.get(kind, "probs")
    return [_reward(row.get(field)) for row in rows]


def _reward(value: Any) -> float:
    """A finite number, or a list of one."""
    if isinstance(value, list):
        if len(value) != 1:
            raise Fault(f"{len(value)} numbers where one reward belongs")
        value = value[0]
    if type(value) not in (int, float):
        raise Fault("a reward that is no number")
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise Fault("a reward that is not finite")
    return reward
