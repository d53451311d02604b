r"""A conversation as a plain reward model reads it: the tokenizer's chat template, nothing added.

    user: prompt        assistant: output        reward at the last token

A reference, which plain models were not trained to read, can be put into the last user message:

    {prompt}\n\nReference answer:\n{reference}

The text is the chat template over the messages. The one exception is a checkpoint that names a
`reward_token_id` (InternLM2-Reward): that token comes last. A special token that is spelled out in
a record's text becomes a space, or an answer could close its own turn and write the next one.

An input that is too long loses the first tokens of its messages, oldest message first; only when
nothing of the prompt is left the end of the answer is cut. Both are reported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from polarctl.errors import MissingError, RecordError, UsageError
from polarctl.model import chat_template
from polarctl.model.template import Encoded, Text, content_text

REFERENCE = "{prompt}\n\nReference answer:\n{reference}"
_FIELD = re.compile(r"\{(prompt|reference)\}")
_NO_LIMIT = 10**9  # tokenizers without one say 10**30
_Turns = list[dict[str, str]]


class ChatEncoder:
    """Encodes (prompt, candidate) by a tokenizer's chat template.

    Args:
        tokenizer: The reward model's tokenizer, with a chat template.
        limit: Tokens of one input at most.
        end: Id of a token that comes last, or None.
        reference: Template of the last user message, with `{prompt}` and `{reference}`; None:
            references are not shown.

    Raises:
        UsageError: A template without its two fields.
    """

    def __init__(
        self,
        tokenizer: Any,
        limit: int,
        *,
        end: int | None = None,
        reference: str | None = None,
    ):
        if reference and set(_FIELD.findall(reference)) != {"prompt", "reference"}:
            raise UsageError(
                "the reference's template must have `{prompt}` and `{reference}`", hint=REFERENCE
            )
        self.tokenizer, self.limit, self.end, self.reference = tokenizer, limit, end, reference
        special = sorted(_special_tokens(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @property
    def limits(self) -> dict[str, int]:
        """Tokens at most, by the option that sets them."""
        return {"max-length": self.limit}

    def report(self, prompt: Text, reference: Text, output: Text, wrapper: str = "sft") -> Encoded:
        """Return the token ids of one input together with what was cut.

        Args:
            prompt: Text or messages.
            reference: Text or messages; not read where references are not shown.
            output: Text or messages.
            wrapper: POLAR's; a chat template has none, so it is not read.

        Raises:
            RecordError: The chat template refuses a conversation, or nothing of it fits.
        """
        made = self._fitted(prompt, reference, output)
        return Encoded(made.ids, *made.cut())

    def report_group(
        self,
        prompt: Text,
        reference: Text,
        outputs: Sequence[Text],
        wrapper: str = "sft",
    ) -> list[Encoded]:
        """Encode candidates of one prompt, as training does.

        Where the prompt has to be cut for one candidate it is cut so for all: the difference of two
        rewards then cannot come from unequal prompts. For the other arguments see `report`.

        Raises:
            RecordError: See `report`.
        """
        made = [self._fitted(prompt, reference, output) for output in outputs]
        least = min(made, key=lambda one: sum(len(turn["content"]) for turn in one.asking))
        for one in made:
            if one.asking != least.asking:
                one.asking = least.asking
                one.ids = self._ids(one.turns)
        return [Encoded(one.ids, *one.cut()) for one in made]

    def _fitted(self, prompt: Text, reference: Text, output: Text) -> _Conversation:
        """The messages of an input, cut until they fit."""
        asking = self._turns(prompt, "user")
        shown = ""
        if self.reference:
            shown = self._clean(content_text(reference))
            _put_reference(asking, self.reference, shown)
        made = _Conversation(asking, self._turns(output, "assistant"), shown)
        made.ids = self._ids(made.turns)
        # Oldest message of the prompt first, then the answer from its end. A cut text can take a
        # token more than its tokens were, so it is cut until it fits.
        first = [turn for turn in made.asking if turn["role"] != "system"]
        for turn in [*first, *reversed(made.answer)]:
            keep_end = any(turn is one for one in first)
            while len(made.ids) > self.limit and turn["content"]:
                self._shorten(turn, len(made.ids) - self.limit, keep_end=keep_end)
                made.ids = self._ids(made.turns)
        if len(made.ids) > self.limit:
            raise RecordError(
                f"the chat template and the system message alone take {len(made.ids):,} tokens of "
                f"{self.limit:,}"
            )
        return made

    def _ids(self, turns: _Turns) -> list[int]:
        try:
            text = chat_template.render(self.tokenizer, turns)
        except UsageError:
            raise
        except Exception as error:  # templates raise what they like
            raise RecordError(f"the chat template refuses the record: {error}") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]

    def _shorten(self, turn: dict[str, str], excess: int, *, keep_end: bool) -> None:
        """Take at least one character and about so many tokens off a message, in place."""
        text = turn["content"]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        kept = max(0, len(ids) - excess)
        part = ids[len(ids) - kept :] if keep_end else ids[:kept]
        shorter: str = self.tokenizer.decode(part, clean_up_tokenization_spaces=False)
        # A cut through the bytes of a character leaves a replacement character.
        shorter = shorter.lstrip("\ufffd") if keep_end else shorter.rstrip("\ufffd")
        if len(shorter) >= len(text):
            shorter = text[1:] if keep_end else text[:-1]
        turn["content"] = shorter

    def _turns(self, value: Any, role: str) -> _Turns:
        """A text field as messages without special tokens."""
        turns = [{"role": role, "content": value}] if isinstance(value, str) else value
        return [{"role": t["role"], "content": self._clean(content_text([t]))} for t in turns]

    def _clean(self, text: str) -> str:
        # A space, not nothing: what is left on both sides must not spell a marker again.
        return self._special.sub(" ", text)


class _Conversation:
    """The messages of an input, and what they were before they were cut.

    Attributes:
        asking: Those of the prompt.
        answer: Those of the candidate.
        ids: Token ids of both.
    """

    def __init__(self, asking: _Turns, answer: _Turns, reference: str):
        self.ids: list[int] = []
        self.asking, self.answer, self._reference = asking, answer, reference
        self._whole = self._texts(asking), self._texts(answer)

    @property
    def turns(self) -> _Turns:
        """All messages."""
        return [*self.asking, *self.answer]

    def cut(self) -> tuple[bool, bool, bool]:
        """Whether the prompt, the reference and the candidate were cut."""
        asking, answer = self._texts(self.asking), self._texts(self.answer)
        shorter = asking != self._whole[0]
        carries = [turn["content"] for turn in self.asking if turn["role"] == "user"]
        lost = shorter and self._reference not in (carries or [""])[-1]
        return shorter, lost, answer != self._whole[1]

    @staticmethod
    def _texts(turns: _Turns) -> list[str]:
        return [turn["content"] for turn in turns]


def _put_reference(turns: _Turns, template: str, reference: str) -> None:
    """Put a reference into the last user message, in place."""
    asking = [turn for turn in turns if turn["role"] == "user"]
    if not asking:
        raise RecordError("the prompt has no user message that could carry the reference")
    texts = {"prompt": asking[-1]["content"], "reference": reference}
    asking[-1]["content"] = _FIELD.sub(lambda match: texts[match[1]], template)


def check_template(path: str, tokenizer: Any) -> None:
    """Raise MissingError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise MissingError(
            f"{path}: its tokenizer has no chat template",
            hint="--tokenizer of the model's chat version (finetune), or save a "
            "chat_template.jinja beside the tokenizer",
        )


def limit_of(config: Any, tokenizer: Any) -> int:
    """Tokens of one input that a model and its tokenizer take."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    told = tokenizer.model_max_length
    return min(longest or _NO_LIMIT, told if told and told > 0 else _NO_LIMIT)


def _special_tokens(tokenizer: Any) -> set[str]:
    """Tokens that a text must not spell, but for those that are blank."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {token.content for token in added if token.special}
    return {token for token in tokens | set(tokenizer.all_special_tokens) if token.strip()}
