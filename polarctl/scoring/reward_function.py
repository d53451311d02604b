"""The POLAR reward for reinforcement fine-tuning: how close is a rollout to its reference.

`PolarReward` is a reward function for TRL's GRPO and RLOO trainers, for `polarctl rft` and for a
script of your own:

    reward = PolarReward.load("runs/rm", normalize="polar-7b", strip_thinking=True)
    trainer = GRPOTrainer(model=..., reward_funcs=reward, train_dataset=with_a_reference_column)
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from polarctl.errors import PolarctlError, UsageError
from polarctl.model.template import content_text
from polarctl.scoring.scorer import Item, Scorer, load_scorer

# Mean that the paper's scripts subtract for each released model, before they divide by 10.
PRESETS: dict[str, float | None] = {"none": None, "polar-1.8b": -10.0, "polar-7b": -5.0}
WITHIN_GROUP = ("zscore", "rank")
_SCALE, _CLIP = 10.0, 10.0

_CLOSED = re.compile(r"<think>.*?</think>", re.DOTALL)


def normalise(rewards: Sequence[float], preset: str) -> list[float]:
    """Rewards on the scale that the paper trains with: (r - mean) / 10, clipped to [-10, 10].

    GRPO compares the rollouts of one prompt with each other and divides by their spread, so a
    preset changes its result only through clipping; PPO and RLOO feel the scale.

    Args:
        rewards: Raw rewards.
        preset: `none` (as they are), `polar-1.8b` (mean -10) or `polar-7b` (mean -5).

    Raises:
        UsageError: No such preset.
    """
    if preset not in PRESETS:
        raise UsageError(f"no normalisation `{preset}`", hint=f"one of: {', '.join(PRESETS)}")
    mean = PRESETS[preset]
    if mean is None:
        return list(rewards)
    return [min(_CLIP, max(-_CLIP, (reward - mean) / _SCALE)) for reward in rewards]


def normalise_group(rewards: Sequence[float], how: str) -> list[float]:
    """The rewards of one group on another scale.

    Args:
        rewards: Raw rewards of the group's candidates.
        how: A preset of `normalise`; `zscore`: distance to the group's mean in its standard
            deviations, 0 where all are equal; `rank`: 0 for the lowest to 1 for the highest, equal
            rewards share the mean of their ranks.

    Raises:
        UsageError: No such scale.
        ValueError: `zscore` or `rank` of a single reward.
    """
    if how not in WITHIN_GROUP:
        return normalise(rewards, how)
    if len(rewards) < 2:
        raise ValueError(f"`{how}` compares the candidates of a group, and here is one")
    if how == "zscore":
        mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
        return [(reward - mean) / spread if spread else 0.0 for reward in rewards]
    ordered = sorted(rewards)
    places = {r: ordered.index(r) + (ordered.count(r) - 1) / 2 for r in set(rewards)}
    return [places[reward] / (len(rewards) - 1) for reward in rewards]


def strip_thinking(text: str, *, opened: bool = False) -> str:
    """The answer without its `<think>...</think>` parts and the blank space after them.

    A part that is never closed runs to the end: the answer was not reached, and nothing is left.
    A `</think>` without its opening closes what the prompt had opened.

    Args:
        text: What the policy wrote.
        opened: The prompt ended in `<think>`, as some chat templates do.
    """
    if "<think>" not in text and "</think>" not in text:
        return "" if opened else text
    kept = _CLOSED.sub("", "<think>" + text if opened else text)
    kept = kept.rpartition("</think>")[2].partition("<think>")[0]
    return kept.lstrip()


class PolarReward:
    """A reward function as TRL calls it: keyword arguments in, one number per completion out.

    Args:
        scorer: Computes raw rewards.
        normalize: A preset of `normalise`.
        strip_thinking: Score completions without their `<think>` parts.
        thinking_opened: The prompts end in `<think>`, so completions begin inside that part.
        wrapper: For prompts whose dataset has no `wrapper` column: `sft` or `pretrain`.

    Attributes:
        scored: Completions scored so far.
        truncated: Those of them whose input was longer than the reward model takes and was cut.
    """

    __name__ = "polar"  # TRL's metrics are named by it

    def __init__(
        self,
        scorer: Scorer,
        *,
        normalize: str = "none",
        strip_thinking: bool = False,
        thinking_opened: bool = False,
        wrapper: str = "sft",
    ):
        normalise([], normalize)
        self.scorer, self.normalize, self.wrapper = scorer, normalize, wrapper
        self.strip_thinking, self.thinking_opened = strip_thinking, thinking_opened
        self.scored = self.truncated = 0

    @classmethod
    def load(
        cls,
        path: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 8192,
        **options: Any,
    ) -> PolarReward:
        """A reward function from a reward model's folder or Hub id; see the class for options."""
        scorer = load_scorer(path, device=device, dtype=dtype, batch_tokens=batch_tokens)
        return cls(scorer, **options)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        reference: Sequence[Any] | None = None,
        wrapper: Sequence[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards in the order of the completions.

        Raw rewards go to `log_extra("polar_raw")`, their mean to `log_metric("polar_raw")`.

        Args:
            prompts: Texts or lists of messages.
            completions: Texts or lists of messages.
            reference: The dataset's column of references, texts or lists of messages.
            wrapper: The dataset's column of wrappers, if it has one.
            log_metric: Given by TRL.
            log_extra: Given by TRL.
            **columns: The other things that TRL gives; not used.

        Raises:
            PolarctlError: No reference, or the scorer failed. A failure is never a reward.
        """
        if reference is None or any(text is None for text in reference):
            raise PolarctlError(
                "the POLAR reward needs a `reference` for every prompt",
                hint="add a column `reference` to the dataset",
            )
        wrappers = wrapper or [None] * len(prompts)
        items = [
            Item(prompt, text, self.answer(completion), kind or self.wrapper)
            for prompt, text, completion, kind in zip(
                prompts, reference, completions, wrappers, strict=True
            )
        ]
        found = self.scorer.score(items)
        if len(found) != len(items):
            raise PolarctlError(f"the scorer gave {len(found)} rewards for {len(items)} rollouts")
        raw = [scored.reward for scored in found]
        self.scored += len(found)
        self.truncated += sum(bool(scored.truncated) for scored in found)
        if log_extra is not None:
            log_extra("polar_raw", raw)
        if log_metric is not None:
            log_metric("polar_raw", sum(raw) / len(raw))
        return normalise(raw, self.normalize)

    def answer(self, completion: Any) -> str:
        """The text of a completion that is scored."""
        text = content_text(completion)
        return strip_thinking(text, opened=self.thinking_opened) if self.strip_thinking else text
