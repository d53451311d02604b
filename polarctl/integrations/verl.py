"""The POLAR reward for verl.

    reward.custom_reward_function.path=pkg://polarctl.integrations.verl
    +reward.custom_reward_function.reward_kwargs.model=runs/rm
    +reward.custom_reward_function.reward_kwargs.url=http://scorer:8000

verl calls `compute_score` once a rollout. `compute_score_batch` is the form of its older batch
reward manager, which the official POLAR release uses. Rows are such as `polarctl convert --to verl`
and the official release write: `reward_model.ground_truth` is the reference (a text or messages),
`extra_info.prompt` the prompt; `ability` and `extra_info.split` may be missing. A failure raises
and ends the training.

With `url` the trainer's processes hold no second model, and the server batches what the rollouts
ask for at the same time. Without, each of verl's reward workers (`reward.num_workers`) loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polarctl.errors import UsageError
from polarctl.integrations import shared
from polarctl.scoring.answers import REWARD_FLOOR

# What verl adds to the arguments by itself.
_OF_VERL = frozenset(
    "reward_router_address reward_model_tokenizer sandbox_fusion_url concurrent_semaphore "
    "memory_limit_mb".split()
)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    model: str,
    url: str | None = None,
    **options: Any,
) -> float:
    """The reward of one rollout.

    Args:
        data_source: The row's; not used.
        solution_str: What the policy wrote. verl does not tell whether it was cut off.
        ground_truth: The reference, a text or messages.
        extra_info: The row's, with `prompt` (text or messages) and, if it is not `sft`, `wrapper`.
        model: Folder or Hub id of the reward model; with `url`, for its tokenizer and template.
        url: Address of the server that holds it; None: it is loaded into this process.
        **options: `normalize`, `strip_thinking`, `reward_floor`, `server_deadline`, ...: see
            `polarctl.integrations.shared.load`.

    Raises:
        PolarctlError: No prompt, no such option, or no good reply. A failure is never a reward.
    """
    (found,) = compute_score_batch(
        [data_source], [solution_str], [ground_truth], [extra_info], model=model, url=url, **options
    )
    return found


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None],
    *,
    model: str,
    url: str | None = None,
    prompt_key: str = "prompt",
    reward_floor: float | str | None = REWARD_FLOOR,
    **options: Any,
) -> list[float]:
    """The rewards of several rollouts; see `compute_score`.

    Args:
        data_sources: The rows'; not used.
        solution_strs: What the policy wrote.
        ground_truths: The references.
        extra_infos: The rows'.
        model: Folder or Hub id of the reward model.
        url: Address of the server that holds it.
        prompt_key: Name of the prompt in `extra_infos`.
        reward_floor: Raw reward of an empty output, and with `strip_thinking` of one that ends in a
            thought; None: what is left of it is scored.
        **options: See `polarctl.integrations.shared.load`.

    Raises:
        PolarctlError: No prompt, no such option, or no good reply.
    """
    prompts = [shared.prompt_of(extra, prompt_key) for extra in extra_infos]
    own = {name: value for name, value in options.items() if name not in _OF_VERL}
    try:
        reward = shared.load(model, url=url, reward_floor=reward_floor, **own)
    except TypeError as error:
        raise UsageError(f"reward_kwargs: {str(error).rpartition('() ')[2]}") from None
    return reward(
        prompts,
        list(solution_strs),
        reference=[shared.text_of(text) for text in ground_truths],
        wrapper=[(extra or {}).get("wrapper") for extra in extra_infos],
    )
