"""Any Bradley-Terry reward model as a scorer: a classifier with one label and a chat template.

The baselines that POLAR is compared with (Skywork-Reward and the like), and what `finetune
--prompt-style chat` writes; see `polarctl.model.conversation` for what they read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from polarctl import console
from polarctl.errors import MissingError
from polarctl.model import devices
from polarctl.model import reward_model as models
from polarctl.model.conversation import REFERENCE, ChatEncoder, check_template, limit_of
from polarctl.scoring.scorer import Item, ModelScorer, Scored


def is_chat_classifier(path: str) -> bool:
    """Whether a checkpoint is a reward model that reads conversations; said when it is.

    Args:
        path: Folder or Hub id.

    Raises:
        MissingError: Config or tokenizer is not there.
    """
    config = models.load_config(path)
    if getattr(config, "polar", None) is not None or not models.is_classifier(config):
        return False  # before a tokenizer is asked for
    if not models.reads_chat(path, config, models.load_tokenizer(path)):
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
        reference = REFERENCE if with_reference is True else with_reference or None
        where = devices.device_of(device)
        model, self.tokenizer = _load(path, devices.dtype_of(dtype, where))
        self.encoder = ChatEncoder(
            self.tokenizer,
            max_length or limit_of(model.config, self.tokenizer),
            end=getattr(model.config, "reward_token_id", None),
            reference=reference,
        )
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
        made = self.encoder.report(item.prompt, item.reference, item.output)
        return made.ids, made.cut


# -- loading --------------------------------------------------------------------------------------


def _load(path: str, dtype: Any) -> tuple[Any, Any]:
    config, tokenizer = models.load_config(path), models.load_tokenizer(path)
    if not models.is_classifier(config) or config.num_labels != 1:
        raise MissingError(f"{path}: has no reward head", hint="a classifier with one label")
    check_template(path, tokenizer)
    model, missing = models.load_classifier(path, config, dtype)
    if missing:
        raise MissingError(f"{path}: weights are missing: {', '.join(sorted(missing)[:3])}")
    if not hasattr(model, "score"):  # models that read forwards and backwards have no such head
        raise MissingError(f"{path}: does not read its reward at the last token")
    return model, tokenizer
