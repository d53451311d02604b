"""A policy behind an OpenAI-compatible server, asked over HTTP.

A base policy is asked by `/v1/completions`, a chat policy by `/v1/chat/completions`, a request for
each sample. Faults that pass are tried again (`polarctl.parallel.http_client`), also a reply
without a reason for its end or without token counts: neither is guessed. Any other refusal ends the
run with the server's message, but for a prompt that is too long, which that policy cannot take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from polarctl import console
from polarctl.config import KEY_VARIABLE
from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.model.template import content_text
from polarctl.parallel import served
from polarctl.parallel.http_client import (
    Answer,
    Fault,
    Remote,
    Request,
    check_url,
    refuse_errors,
)
from polarctl.policies.continuation import Continuation, Unfit, messages_of
from polarctl.policies.pool import Policy

MOST_SEED = 2**31  # servers take no larger one
_OURS = ("model", "prompt", "messages", "seed", "n", "stream")
_REQUEST_S = 600.0


class ServedWriter:
    """A policy of a server; see `continuation.PolicyWriter`. Threads may share it.

    Args:
        policy: Name of the model there, address, sampling.
        concurrency: Requests under way at most.
        deadline_s: Seconds for which a failed request is sent again without any good reply.
        pause_s: First pause before a request is sent again; it doubles up to 10 s.

    Attributes:
        wrapper: `sft` for a chat policy, `pretrain` for a base policy.
        context: Tokens that prompt and answer may have together, where the server lists them.

    Raises:
        UsageError: No address, or a field of `engine` that is not the user's.
        MissingError: No server answers, it refuses the key, or does not list the model.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        concurrency: int = 16,
        deadline_s: float = 300.0,
        pause_s: float = 0.5,
    ):
        assert policy.url is not None
        check_url(policy.url, f"{policy.where}: `url`")
        for name in _OURS:
            if name in policy.engine:
                raise UsageError(f"{policy.where}: `engine`: `{name}` is set by the stage itself")
        self.policy, self.chat = policy, policy.kind == "chat"
        self.wrapper = "sft" if self.chat else "pretrain"
        self._root = _root(policy.url)
        self.remote = Remote(
            self._root,
            concurrency=concurrency,
            timeout_s=_REQUEST_S,
            deadline_s=deadline_s,
            pause_s=pause_s,
            hint="vllm serve MODEL, and its address as `url`",
        )
        self._named = served.ReplyName(self._root)
        self._thinks = False
        try:
            self._row = self._listed()
        except BaseException:
            self.close()
            raise
        self._checked = self.remote.again
        self._vllm = self._row.get("owned_by") == "vllm"
        context = self._row.get("max_model_len")
        self.context = context if isinstance(context, int) and context > 1 else None

    def encode(self, prompts: Sequence[Any]) -> list[str | list[dict[str, str]] | Unfit]:
        """Texts for a base policy, messages for a chat policy."""
        if self.chat:
            return [messages_of(prompt) for prompt in prompts]
        texts = map(content_text, prompts)
        return [text or Unfit("the prompt is empty, and a server continues none") for text in texts]

    def write(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Continuation | Unfit]:
        """Continue prompts, a request each.

        Raises:
            MissingError: No good reply until the deadline, a refused key, or no such model.
            PolarctlError: Another refusal, or a reply by another model.
        """
        url = f"{self._root}/{'chat/completions' if self.chat else 'completions'}"
        found = self.remote.ask(
            [
                Request("POST", url, self._body(prompt, seed), self._read)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        )
        if self._checked != self.remote.again:
            self._check()
        return found

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it: the policy, and what the server lists of it."""
        owner = self._row.get("owned_by")
        by = {"served_by": console.plain(owner)} if isinstance(owner, str) else {}
        return {**self.policy.facts(), "url": self._root, **by, **served.fields(self._row)}

    def close(self) -> None:
        """Give the connections back; say how often the server had to be asked again."""
        self.remote.close()

    def _listed(self) -> dict[str, Any]:
        """The row of the model in the server's list; empty when it has no list."""
        try:
            rows = served.models(self.remote, f"{self._root}/models")
        except MissingError as error:
            raise MissingError(f"{self.policy.where}: {error}", hint=error.hint) from None
        if rows is None:
            return {}
        for row in rows:
            if row["id"] == self.policy.model:
                return row
        names = console.plain(", ".join(sorted(row["id"] for row in rows)))
        raise MissingError(
            f"{self.policy.where}: no model `{self.policy.model}` at {self._root}",
            hint=f"`model` is one of: {names}",
        )

    def _check(self) -> None:
        """After faults: is it still the same model? The server may have been started anew."""
        again = self.remote.again
        served.refuse_another(self._root, served.fields(self._row), served.fields(self._listed()))
        self._checked = again

    def _body(self, prompt: Any, seed: int) -> dict[str, Any]:
        how = self.policy.sampling
        body: dict[str, Any] = {
            "model": self.policy.model,
            "messages" if self.chat else "prompt": prompt,
            "max_tokens": min(how.max_new_tokens, self.context or how.max_new_tokens),
            "temperature": how.temperature,
            "top_p": how.top_p,
            "seed": seed % MOST_SEED,
        }
        if how.top_k:
            body["top_k"] = how.top_k
        if self._vllm:  # else it takes what the model's generation_config.json says
            body |= {"top_k": how.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
        body |= self.policy.engine
        return {name: value for name, value in body.items() if value is not None}

    def _read(self, answer: Answer) -> Continuation | Unfit:
        """What a reply says."""
        name = self.policy.name
        said = f"{answer.status} {answer.said()}".strip()
        if answer.status == 413 or (
            answer.status == 400 and "context" in said and "length" in said
        ):
            return Unfit(f"policy `{name}` cannot take the prompt: {said}")
        if answer.status in (401, 403):
            raise MissingError(
                f"{self._root}: the server refuses the key: {said}", hint=f"set {KEY_VARIABLE}"
            )
        if answer.status == 404:
            raise MissingError(
                f"{self._root}: no model `{self.policy.model}`, or no such API: {said}",
                hint="kind `base` needs /v1/completions, kind `chat` /v1/chat/completions",
            )
        if answer.status != 200:
            raise PolarctlError(
                f"policy `{name}`: {self._root} answers {said}",
                hint='a field that it refuses is left out by `"engine": {"FIELD": null}`',
            )
        value = answer.value()
        refuse_errors(value)
        if not isinstance(value, dict):
            raise Fault("a reply that is no completion")
        self._named.check(value)
        return self._continuation(value)

    def _continuation(self, value: dict[str, Any]) -> Continuation | Unfit:
        try:
            (choice,) = value["choices"]
            text = choice["message"]["content"] if self.chat else choice["text"]
            end = choice["finish_reason"]
            said = choice["message"] if self.chat else {}
        except (ValueError, KeyError, TypeError):
            raise Fault("a reply that is no completion") from None
        if end == "content_filter":
            return Unfit(f"the server has filtered the answer of `{self.policy.name}`")
        if end not in ("stop", "length"):
            raise Fault(f"a reply with `finish_reason` {console.plain(str(end), 40)}")
        read, written = _counts(value.get("usage"))
        if not self._thinks and (said.get("reasoning_content") or said.get("reasoning")):
            self._thinks = True
            console.warn(f"policy `{self.policy.name}`: its thinking comes apart, and is left out")
            text = text or ""
        if not isinstance(text, str) and not (text is None and self._thinks):
            raise Fault("a reply without a text")
        reason: Literal["stop", "length"] = end
        # vLLM counts the token that ends a text, too.
        tokens = max(0, written - 1) if self._vllm and end == "stop" else written
        usage = {"prompt_tokens": read, "completion_tokens": written}
        return Continuation(text or "", reason, tokens, usage)


def _counts(usage: Any) -> tuple[int, int]:
    """Tokens read and written, as the server counts them."""
    found = usage if isinstance(usage, dict) else {}
    read, written = found.get("prompt_tokens"), found.get("completion_tokens")
    if type(read) is not int or type(written) is not int or read < 0 or written < 0:
        raise Fault("a reply without token counts (`usage`)")
    return read, written


def _root(url: str) -> str:
    """An address with its path, such as `/v1`, which an address without any is given."""
    base = url.rstrip("/")
    for route in ("/chat/completions", "/completions"):
        base = base.removesuffix(route)
    return base if urlsplit(base).path.strip("/") else base + "/v1"
