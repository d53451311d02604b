"""A policy on the loopback interface that answers as an OpenAI-compatible server does.

Its text can be computed by eye: the last word of the prompt, then the seed. It has a token a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopback import LoopbackServer


class CompletionServer(LoopbackServer):
    """See `LoopbackServer`.

    Attributes:
        change: From the body of a request and its good reply to what is sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda body, reply: reply
        self.models = [{"id": "m", "object": "model"}]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, self.change(body, reply_to(path, body))


def reply_to(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A good reply: `length` for odd seeds, `stop` for even ones."""
    chat = path.endswith("/chat/completions")
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    text = f" {prompt.split()[-1]} {body['seed']}"
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    end = "length" if body["seed"] % 2 else "stop"
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 2}
    return {
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": end, **said}],
        "usage": usage,
    }
