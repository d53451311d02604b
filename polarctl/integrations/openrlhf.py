"""The POLAR reward for OpenRLHF: a file for `--reward.remote_url reward.py`.

    from polarctl.integrations.openrlhf import reward_function
    reward_func = reward_function("runs/rm", url="http://scorer:8000", end_tokens=["<|im_end|>"])

Without a file, `polarctl serve` answers OpenRLHF itself: `--reward.remote_url
http://scorer:8000/get_reward`. Both read the same things: a label is the reference, or an object
with `reference`, `prompt` and `wrapper`. The object is for prompts with a chat template, whose
markup POLAR must not see.

A failure raises. OpenRLHF logs it, leaves the rollout without a reward, and ends the training when
it comes to use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polarctl.integrations import shared
from polarctl.scoring.reward_function import continued


def reward_function(
    model: str, *, url: str | None = None, end_tokens: Sequence[str] = (), **options: Any
) -> Callable[..., dict[str, Any]]:
    """A `reward_func(queries, prompts, labels)`.

    Args:
        model: Folder or Hub id of the reward model.
        url: Address of a server that holds it; None: it is loaded into this process.
        end_tokens: Texts of the tokens with which the policy ends; taken off an output. One without
            was cut off and gets the reward floor.
        **options: See `polarctl.integrations.shared.load`.

    Raises:
        PolarctlError: No such model, or no server.
    """
    reward = shared.load(model, url=url, **options)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any
    ) -> dict[str, Any]:
        """Rewards in the order of the queries, as tensors of shape (len(queries),)."""
        import torch

        items, cut_off = continued(queries, prompts, labels, end_tokens)
        found = reward(
            [item.prompt for item in items],
            [item.output for item in items],
            reference=[item.reference for item in items],
            wrapper=[item.wrapper for item in items],
            ended=[not cut for cut in cut_off],
        )
        rewards = torch.tensor(found, dtype=torch.float32)
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"polar": rewards}}

    return reward_func
