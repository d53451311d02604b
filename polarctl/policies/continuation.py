"""What a policy gives back, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from polarctl.model.template import content_text
from polarctl.policies.pool import Policy


@dataclass(frozen=True)
class Continuation:
    """What a policy wrote after one prompt.

    Attributes:
        text: Its text, without the token that ended it.
        finish_reason: `stop` or `length`.
        num_tokens: Tokens of the text, without the one that ended it.
        usage: What a server counts for it (`prompt_tokens`, `completion_tokens`).
    """

    text: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    usage: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Unfit:
    """A prompt that the policy cannot take, or an answer that is withheld, and why."""

    reason: str


def messages_of(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages whose contents are texts; a text is a user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{**message, "content": content_text([message])} for message in prompt]


class PolicyWriter(Protocol):
    """A policy that writes text.

    Attributes:
        policy: Whose model and sampling.
        wrapper: `sft` for a chat policy, `pretrain` for a base policy.
        context: Tokens that prompt and answer may have together, or None where that is not known.
    """

    policy: Policy
    wrapper: str
    context: int | None

    def encode(self, prompts: Sequence[Any]) -> Sequence[Any | Unfit]:
        """Each prompt in the form that `write` takes, or why there is none."""

    def write(self, prompts: Sequence[Any], seeds: Sequence[int]) -> Sequence[Continuation | Unfit]:
        """Continuations of the prompts, each drawn with its own seed."""

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it: the same for all of its texts."""

    def close(self) -> None:
        """Give back its memory, processes and connections."""
