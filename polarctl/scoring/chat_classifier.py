r"""Any Bradley-Terry reward model as a scorer: a classifier with one label and a chat template.

The baselines that POLAR is compared with (Skywork-Reward and the like) read a conversation:

    user: prompt        assistant: output        reward = logit at the last token

A reference, which they were not trained to read, can be put into the last user message:

    {prompt}\n\nReference answer:\n{reference}

The text is the tokenizer's chat template over the messages, and no token is added to it. The one
exception is a checkpoint that names a `reward_token_id` (InternLM2-Reward): that token comes last.
A special token that is spelled out in a record's text becomes a space, or an answer could close its
own turn and write the next one.

An input that is too long loses the first tokens of its messages, oldest message first; only when
nothing of the prompt is left the end of the answer is cut. Both are reported in `truncated`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from polarctl import console
from polarctl.errors import MissingError, RecordError, UsageError
from polarctl.model import chat_template, devices
from polarctl.model import reward_model as models
from polarctl.model.internlm2 import config as internlm2
from polarctl.model.template import content_text
from polarctl.scoring.scorer import Item, ModelScorer, Scored

REFERENCE = "{prompt}\n\nReference answer:\n{reference}"
_FIELD = re.compile(r"\{(prompt|reference)\}")
_NO_LIMIT = 10**9  # tokenizers without one say 10**30


def is_chat_classifier(path: str) -> bool:
    """Whether a checkpoint is a reward model that reads conversations; said when it is.

    A model of ours has `polar` in its config.json, and a published POLAR model is an InternLM2.
    Those are not asked for a chat template: a POLAR model may have inherited one.

    Args:
        path: Folder or Hub id.

    Raises:
        MissingError: Config or tokenizer is not there.
    """
    if internlm2.read(path) is not None:
        return False
    config = models.load_config(path)
    if getattr(config, "polar", None) is not None or not _is_classifier(config):
        return False
    if not getattr(models.load_tokenizer(path), "chat_template", None):
        return False
    console.choice("input", "chat template", f"`{path}` has one, and no POLAR template")
    return True


class ClassifierScorer:
    """Scores conversations with a reward model in this process.

    What conversations of one prompt share is computed once where the model allows it, else they go
    through it right-padded, in batches of like length.

    Args:
        path: Folder or Hub id of a `...ForSequenceClassification` with one label.
        with_reference: Put the reference into the last user message; a text is the template to
            use instead of `REFERENCE`, with `{prompt}` and `{reference}`.
        device: `--device`.
        dtype: `--dtype`.
        batch_tokens: Tokens of one forward pass at most (a longer sequence goes alone).
        max_length: Tokens of one input, or None: what model and tokenizer can take.

    Raises:
        MissingError: No model, head, tokenizer or chat template there.
        UsageError: A template without its two fields.
    """

    def __init__(
        self,
        path: str,
        *,
        with_reference: str | bool = False,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 8192,
        max_length: int | None = None,
    ):
        devices.quiet_libraries()
        self.reference = REFERENCE if with_reference is True else with_reference or None
        if self.reference and set(_FIELD.findall(self.reference)) != {"prompt", "reference"}:
            raise UsageError(
                "the reference's template must have `{prompt}` and `{reference}`", hint=REFERENCE
            )
        where = devices.device_of(device)
        model, self.tokenizer = _load(path, devices.dtype_of(dtype, where))
        self.end = getattr(model.config, "reward_token_id", None)
        self.limit = max_length or _limit(model.config, self.tokenizer)
        special = sorted(_special_tokens(self.tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        # What the engine needs of a reward model; padding is masked, so any id will do.
        padding = SimpleNamespace(pad_token_id=self.tokenizer.pad_token_id or 0)
        model = model.to(where).eval()
        loaded = SimpleNamespace(model=model, tokenizer=padding, device=model.device)
        self.engine = ModelScorer(loaded, batch_tokens)

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items.

        Raises:
            RecordError: The chat template refuses a conversation, or nothing of it fits.
            PolarctlError: The model gave a reward that is not a finite number.
        """
        return self.score_with(items, self.engine.rewards_of)

    def score_with(
        self,
        items: Sequence[Item],
        rewards_of: Callable[[list[list[list[int]]]], list[list[float]]],
        turn: AbstractContextManager[Any] | None = None,
    ) -> list[Scored]:
        """The same with an engine of the caller's.

        Args:
            items: What to score.
            rewards_of: From the ids of each prompt's conversations to their rewards.
            turn: Entered for every conversation that is tokenized.

        Raises:
            RecordError: See `score`.
        """
        encoded = []
        for item in items:
            with turn or nullcontext():
                encoded.append(self.encode(item))
        same_prompt = itertools.groupby(
            range(len(items)), lambda i: (items[i].prompt, items[i].reference)
        )
        groups = [list(group) for _, group in same_prompt]
        found = rewards_of([[encoded[i][0] for i in group] for group in groups])
        rewards = itertools.chain.from_iterable(found)
        return [
            Scored(reward, len(ids), cut)
            for reward, (ids, cut) in zip(rewards, encoded, strict=True)
        ]

    def close(self) -> None:
        """Nothing to give back."""

    def encode(self, item: Item) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of a conversation, and which pieces were cut: prompt, reference, output.

        Raises:
            RecordError: See `score`.
        """
        turns = self._turns(item.prompt, "user")
        asked = len(turns)
        reference = ""
        if self.reference:
            reference = self._clean(content_text(item.reference))
            _put_reference(turns, self.reference, reference)
        turns += self._turns(item.output, "assistant")
        whole = [turn["content"] for turn in turns]
        ids = self._ids(turns)
        # Oldest message of the prompt first, then the answer from its end. A cut text can take a
        # token more than its tokens were, so it is cut until it fits.
        first = [i for i in range(asked) if turns[i]["role"] != "system"]
        for index in [*first, *reversed(range(asked, len(turns)))]:
            while len(ids) > self.limit and turns[index]["content"]:
                self._shorten(turns[index], len(ids) - self.limit, keep_end=index < asked)
                ids = self._ids(turns)
        if len(ids) > self.limit:
            raise RecordError(
                f"the chat template and the system message alone take {len(ids):,} tokens of "
                f"{self.limit:,}"
            )
        return ids, _cut(turns, whole, asked, reference)

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
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

    def _turns(self, value: Any, role: str) -> list[dict[str, str]]:
        """A text field as messages without special tokens."""
        turns = [{"role": role, "content": value}] if isinstance(value, str) else value
        return [{"role": t["role"], "content": self._clean(content_text([t]))} for t in turns]

    def _clean(self, text: str) -> str:
        # A space, not nothing: what is left on both sides must not spell a marker again.
        return self._special.sub(" ", text)


def _put_reference(turns: list[dict[str, str]], template: str, reference: str) -> None:
    """Put a reference into the last user message, in place."""
    asking = [turn for turn in turns if turn["role"] == "user"]
    if not asking:
        raise RecordError("the prompt has no user message that could carry the reference")
    texts = {"prompt": asking[-1]["content"], "reference": reference}
    asking[-1]["content"] = _FIELD.sub(lambda match: texts[match[1]], template)


def _cut(
    turns: list[dict[str, str]], whole: list[str], asked: int, reference: str
) -> tuple[str, ...]:
    shorter = [turn["content"] != text for turn, text in zip(turns, whole, strict=True)]
    carries = [turn["content"] for turn in turns[:asked] if turn["role"] == "user"]
    lost = {
        "prompt": any(shorter[:asked]),
        "reference": any(shorter[:asked]) and reference not in (carries or [""])[-1],
        "output": any(shorter[asked:]),
    }
    return tuple(name for name, found in lost.items() if found)


# -- loading --------------------------------------------------------------------------------------


def _is_classifier(config: Any) -> bool:
    return models.is_classifier(config) and config.num_labels == 1


def _load(path: str, dtype: Any) -> tuple[Any, Any]:
    config, tokenizer = models.load_config(path), models.load_tokenizer(path)
    if not _is_classifier(config):
        raise MissingError(f"{path}: has no reward head", hint="a classifier with one label")
    if not getattr(tokenizer, "chat_template", None):
        raise MissingError(
            f"{path}: its tokenizer has no chat template",
            hint="save a chat_template.jinja beside the tokenizer",
        )
    model, missing = models.load_classifier(path, config, dtype)
    if missing:
        raise MissingError(f"{path}: weights are missing: {', '.join(sorted(missing)[:3])}")
    if not hasattr(model, "score"):  # models that read forwards and backwards have no such head
        raise MissingError(f"{path}: does not read its reward at the last token")
    return model, tokenizer


def _limit(config: Any, tokenizer: Any) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    told = tokenizer.model_max_length
    return min(longest or _NO_LIMIT, told if told and told > 0 else _NO_LIMIT)


def _special_tokens(tokenizer: Any) -> set[str]:
    """Tokens that a text must not spell, but for those that are blank."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {token.content for token in added if token.special}
    return {token for token in tokens | set(tokenizer.all_special_tokens) if token.strip()}
