"""A judge on the loopback interface that answers as an OpenAI-compatible server does.

It scores a response by a rule that can be computed by eye: 1 + the number of `!` in it, 5 at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from loopback import LoopbackServer


def rule(question: dict[str, Any]) -> str:
    """The judge's reply to the JSON of a user's message."""
    scores = {name: min(5, 1 + text.count("!")) for name, text in question["responses"].items()}
    ranking = sorted(scores, key=lambda name: -scores[name])
    answer = json.dumps({"scores": scores, "best-to-worst": ranking})
    return f"<think>{ranking[0]} is the loudest</think>\n{answer}"


class JudgeServer(LoopbackServer):
    """See `LoopbackServer`.

    Attributes:
        reply: A user's question to the text of the answer.
        message: Further fields of the answer's message.
        finish_reason: Of every answer.
        named: The model that every answer names, if any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reply: Callable[[dict[str, Any]], str | None] = rule
        self.message: dict[str, Any] = {}
        self.finish_reason = "stop"
        self.named: str | None = None

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": f"no {path}"}}
        text = self.reply(json.loads(body["messages"][-1]["content"]))
        message = {"role": "assistant", "content": text, **self.message}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        named = {"model": self.named} if self.named else {}
        return 200, {"object": "chat.completion", "choices": [choice], **named}
