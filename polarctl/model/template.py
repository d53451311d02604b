r"""The POLAR input template: from text to the token ids that the reward model reads.

    sft:       <bos> prompt \n reference <|reward|> prompt \n candidate [UNUSED_TOKEN_130]
    pretrain:  <bos> prompt    reference <|reward|> prompt    candidate [UNUSED_TOKEN_130]

Every piece makes a round trip, also when nothing is cut: it is tokenized, cut, decoded without
special tokens and glued as a string, and the whole is tokenized again. Joining ids would be
shorter, but gives other ids wherever the tokenizer merges across a seam: input that a released
checkpoint was not trained on. Source: the client (`reward_func.py`) and the fine-tuning data code
(`tokenize_ref`) published with the checkpoints (github InternLM/POLAR and InternLM/xtuner).

One deliberate departure: decoding drops the special tokens in the user's text, but the rest can
spell one again (`<|rew<|reward|>ard|>`), and the published code then lets a candidate write its
own separator. Here no marker outlives the cleaning, neither in a piece nor across a seam, also
where the tokenizer does not hold it for special. Text that forms no marker gets exactly the
published ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

PIECES = ("prompt", "reference", "output")
WRAPPERS = ("sft", "pretrain")
CUT_SIDES = ("right", "left")
EMPTY_RULES = ("training", "client")
# For separator, reward token and two newlines. It stays 4 where the separator takes several tokens
# or the wrapper has no newline: the prompt's budget, so every id of a long input, depends on it.
RESERVED_TOKENS = 4

Text: TypeAlias = str | Sequence[Mapping[str, Any]]


class Tokenizer(Protocol):
    """What the template needs of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with BOS if the tokenizer adds one."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""


@dataclass(frozen=True)
class Encoded:
    """Ids of one input (the last is the reward token) and which pieces were cut to make it fit."""

    ids: list[int]
    truncated_prompt: bool
    truncated_reference: bool
    truncated_output: bool

    @property
    def cut(self) -> tuple[str, ...]:
        """The pieces that were cut, of `PIECES`."""
        return tuple(name for name in PIECES if getattr(self, f"truncated_{name}"))


class Encoder:
    r"""Encodes (prompt, reference, candidate) for one tokenizer.

    A text field is a string or a list of `{role, content}` messages. BOS is what the tokenizer
    adds by itself. Lengths count each piece as tokenized alone, with its BOS. So `max_length`
    bounds the pieces, as in the published code: the ids are mostly a few fewer, and can be a few
    more where a cut splits a character or the separator takes several tokens.

    Args:
        tokenizer: The reward model's tokenizer.
        separator: Written between the two halves. One token or several, as the tokenizer has it.
        reward_token: Ends the input; the reward is read there. Must be one token.
        max_length: Token budget of the whole input.
        max_response_length: Token limit of the reference and of the candidate, each. The released
            checkpoints: 5120 in pre-training, 4096 in fine-tuning and at inference.
        cut_side: Where a long response is cut: "right" keeps its first tokens, "left" its last (the
            default of xtuner's client). A long prompt always keeps its last tokens.
        empty: The sft wrapper around an empty trajectory: "training" writes no `\n` after the
            prompt; "client" does, as the published client (which compares an int with "" and means
            not to).

    Raises:
        ValueError: An option is out of range, or the tokenizer does not end a text with the one id
            of the reward token. The methods raise it for an unknown wrapper and for a field
            without text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        separator: str = "<|reward|>",
        reward_token: str = "[UNUSED_TOKEN_130]",
        max_length: int = 16384,
        max_response_length: int = 4096,
        cut_side: str = "right",
        empty: str = "training",
    ) -> None:
        _check_choice("cut_side", cut_side, CUT_SIDES)
        _check_choice("empty", empty, EMPTY_RULES)
        if not separator.strip() or not reward_token.strip() or separator == reward_token:
            raise ValueError("separator and reward_token must be two different, visible strings")
        # Beside two full responses the prompt must keep a token: with a budget of 0 or less "the
        # last n ids" would be all of them (`ids[-0:]`) or an arbitrary part (`ids[2:]`).
        least = 2 * max_response_length + RESERVED_TOKENS + 2
        if max_response_length < 1:
            raise ValueError(f"max_response_length must be at least 1, got {max_response_length}")
        if max_length < least:
            raise ValueError(
                f"max_length {max_length} leaves no room for a prompt beside two responses of "
                f"max_response_length {max_response_length}: it must be at least {least}"
            )
        self.tokenizer = tokenizer
        self.separator, self.reward_token = separator, reward_token
        self.max_length, self.max_response_length = max_length, max_response_length
        self.cut_side, self.empty = cut_side, empty
        self.reward_token_id = self._single_id(reward_token)
        self._separator_id = self._single_id(separator)
        if self.reward_token_id < 0:
            raise ValueError(
                f"the tokenizer does not end a text with `{reward_token}` as one token: "
                "add it to the vocabulary or choose another reward_token"
            )
        self._markers: dict[str, list[str]] = {}  # last character -> markers, longest first
        for marker in sorted({separator, reward_token, *_special_tokens(tokenizer)}, key=len)[::-1]:
            self._markers.setdefault(marker[-1], []).append(marker)

    @property
    def limits(self) -> dict[str, int]:
        """Tokens at most, by the option that sets them."""
        return {"max-length": self.max_length, "max-response-length": self.max_response_length}

    def text(self, prompt: Text, reference: Text, output: Text, wrapper: str = "sft") -> str:
        """Return the glued string, reward token included, for a server that tokenizes by itself."""
        return next(self._compose(prompt, reference, [output], wrapper, False))[0]

    def encode(
        self, prompt: Text, reference: Text, output: Text, wrapper: str = "sft"
    ) -> list[int]:
        """Return the token ids of one input."""
        return self.report(prompt, reference, output, wrapper).ids

    def encode_pair(
        self, prompt: Text, reference: Text, chosen: Text, rejected: Text, wrapper: str = "sft"
    ) -> tuple[list[int], list[int]]:
        """Return the ids of both inputs of a training triple, with one prompt budget."""
        first, second = self.report_group(prompt, reference, [chosen, rejected], wrapper)
        return first.ids, second.ids

    def report(self, prompt: Text, reference: Text, output: Text, wrapper: str = "sft") -> Encoded:
        """Return the token ids of one input together with what was cut."""
        return self.report_group(prompt, reference, [output], wrapper)[0]

    def report_group(
        self,
        prompt: Text,
        reference: Text,
        outputs: Sequence[Text],
        wrapper: str = "sft",
        *,
        shared_prompt_budget: bool = True,
    ) -> list[Encoded]:
        """Encode candidates of one prompt and reference, which are tokenized once for all.

        By default the prompt is cut for all to the smallest of their budgets, as training does:
        the difference of two rewards then cannot come from unequal prompts.
        `shared_prompt_budget=False` gives every candidate the ids that it has alone, as the
        published client does.
        """
        composed = self._compose(prompt, reference, outputs, wrapper, shared_prompt_budget)
        return [Encoded(self.glued_ids(text), *cuts) for text, cuts in composed]

    def _compose(
        self, prompt: Text, reference: Text, outputs: Sequence[Text], wrapper: str, shared: bool
    ) -> Iterator[tuple[str, tuple[bool, bool, bool]]]:
        """Yield per candidate the glued text and what was cut: prompt, reference, candidate."""
        _check_choice("wrapper", wrapper, WRAPPERS)
        prompt_ids = self._tokenize(prompt)
        reference_ids, reference_cut = self._cut(self._tokenize(reference))
        candidates = [self._cut(self._tokenize(output)) for output in outputs]
        usable = self.max_length - RESERVED_TOKENS - len(reference_ids)
        kept = [min(len(prompt_ids), (usable - len(ids)) // 2) for ids, _ in candidates]
        if shared and kept:
            kept = [min(kept)] * len(kept)

        # Most candidates keep the same part of the prompt. Where 0 are kept, the prompt has no ids.
        prompts = {count: self._detokenize(prompt_ids[-count:]) for count in set(kept)}
        reference_text = self._detokenize(reference_ids)
        for (ids, output_cut), count in zip(candidates, kept, strict=True):
            first = self._join(prompts[count], reference_text, wrapper)
            second = self._join(prompts[count], self._detokenize(ids), wrapper)
            text = first + self.separator + second + self.reward_token
            yield text, (count < len(prompt_ids), reference_cut, output_cut)

    def _tokenize(self, value: Text) -> list[int]:
        return self.tokenizer.encode(content_text(value), add_special_tokens=True)

    def _cut(self, ids: list[int]) -> tuple[list[int], bool]:
        limit = self.max_response_length
        kept = ids[:limit] if self.cut_side == "right" else ids[-limit:]
        return kept, len(ids) > limit

    def _detokenize(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _join(self, prompt: str, trajectory: str, wrapper: str) -> str:
        bare = wrapper == "pretrain" or (trajectory == "" and self.empty == "training")
        # Cleaned when joined: a prompt may end in `<|rew` and a trajectory begin with `ard|>`.
        return self._clean(prompt + ("" if bare else "\n") + trajectory)

    def _clean(self, text: str) -> str:
        """Remove markers until none is left, in one pass.

        `kept` never holds a marker: only the newest character can complete one, which is taken off
        at once. Repeated replacing would need as many passes as an attacker cares to nest.
        """
        if not any(marker in text for group in self._markers.values() for marker in group):
            return text
        kept: list[str] = []
        for char in text:
            kept.append(char)
            for marker in self._markers.get(char, ()):
                if "".join(kept[-len(marker) :]) == marker:
                    del kept[-len(marker) :]
                    break
        return "".join(kept)

    def glued_ids(self, text: str) -> list[int]:
        """Return the token ids of a glued string (`text`).

        Raises:
            ValueError: It spells the separator or the reward token a second time, or no reward.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        # Last defence: a tokenizer may read more than the exact string as a marker, which the
        # cleaning of strings cannot see.
        if ids.count(self.reward_token_id) != 1 or ids.count(self._separator_id) > 1:
            raise ValueError(
                f"the tokenizer reads a part of the text as `{self.separator}` or "
                f"`{self.reward_token}`: remove it from the record"
            )
        return ids

    def _single_id(self, marker: str) -> int:
        """Return the id that alone spells a marker at the end of a text, or -1."""
        last = self.tokenizer.encode("a" + marker, add_special_tokens=True)[-1]
        spelled = self.tokenizer.decode([last], skip_special_tokens=False).strip()
        return last if spelled == marker else -1


def content_text(value: Text) -> str:
    r"""Reduce a text field to text: a string as it is, messages to their contents joined by `\n`.

    Roles are dropped and no chat template is applied: the model was trained on bare contents. The
    parts of a content (`{"type": "text", "text": ...}`) are joined with nothing between them.

    Raises:
        ValueError: The value is neither a string nor a list of messages, or a message has more than
            text.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise ValueError(f"expected text or a list of messages, got {type(value).__name__}")
    return "\n".join(_message_text(message) for message in value)


def plain_text(value: Text) -> str:
    """What is compared where white space does not matter: the words of a text, one space between.

    Raises:
        ValueError: See `content_text`.
    """
    return " ".join(content_text(value).split())


def _message_text(message: Any) -> str:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content
    parts: list[Any] = list(content) if isinstance(content, Sequence) else [None]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError("a message needs a `content`: a string or a list of text parts")
    return "".join(part["text"] for part in parts)


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    """Return the strings that decoding skips, as far as the tokenizer lists them."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {token.content for token in added if token.special}
    tokens.update(getattr(tokenizer, "all_special_tokens", ()))
    # A blank one is left out: it must not cost the template its newline.
    return {token for token in tokens if token.strip()}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got `{value}`")
