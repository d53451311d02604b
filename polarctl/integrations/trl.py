"""The POLAR reward for TRL's trainers (GRPO, RLOO).

    from polarctl.integrations.trl import reward_function
    reward = reward_function("runs/rm", url="http://scorer:8000")
    GRPOTrainer(model=..., reward_funcs=reward, train_dataset=dataset)

The dataset has a column `reference`, or `ground_truth`, or verl's `reward_model`. A failure raises
and ends the training; it is never a reward and never None, which TRL would take for "not
applicable".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polarctl.integrations import shared


def reward_function(
    model: str, *, url: str | None = None, end_token_ids: Sequence[int] = (), **options: Any
) -> Callable[..., list[float]]:
    """A reward function as TRL calls it.

    Args:
        model: Folder or Hub id of the reward model.
        url: Address of a server that holds it; None: it is loaded into this process.
        end_token_ids: Tokens with which the policy ends its text. With them, a completion that was
            cut off gets the reward floor; without, it is scored as far as it goes.
        **options: See `polarctl.integrations.shared.load`.

    Raises:
        PolarctlError: No such model, or no server.
    """
    reward = shared.load(model, url=url, **options)
    ends = frozenset(end_token_ids)

    def polar(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards in the order of the completions."""
        ended = None
        if ends and completion_ids is not None:
            ended = [bool(ids) and ids[-1] in ends for ids in completion_ids]
        extra = columns.get("extra_info") or [None] * len(prompts)
        return reward(
            prompts,
            completions,
            reference=shared.references_in(columns),
            wrapper=columns.get("wrapper") or [(row or {}).get("wrapper") for row in extra],
            ended=ended,
            log_metric=columns.get("log_metric"),
            log_extra=columns.get("log_extra"),
        )

    return polar
