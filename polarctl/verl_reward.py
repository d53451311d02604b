"""The POLAR reward for verl: give this file as `reward.custom_reward_function.path`.

verl calls `compute_score` once a rollout, on rows such as `polarctl convert --to verl` writes:
`ground_truth` is the reference, and `extra_info` holds the prompt. The reward is asked of a server
(`vllm serve`, `polarctl serve`, SGLang, lmdeploy), so that the trainer's processes hold no second
model; the server batches what the rollouts ask for at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

from polarctl.errors import PolarctlError
from polarctl.model.reward_model import load_encoder
from polarctl.scoring.answers import REWARD_FLOOR
from polarctl.scoring.reward_function import PolarReward
from polarctl.scoring.server import ServerScorer


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str,
    model: str,
    normalize: str = "none",
    strip_thinking: bool = False,
    reward_floor: float | None = REWARD_FLOOR,
    server_deadline: float = 300.0,
    **_: Any,
) -> float:
    """The reward of one rollout.

    Args:
        data_source: The row's; not used.
        solution_str: What the policy wrote.
        ground_truth: The reference.
        extra_info: The row's, with `prompt` (text or messages) and, if it is not `sft`, `wrapper`.
        url: Address of the server that holds the reward model.
        model: Folder or Hub id of that model, for its tokenizer and template.
        normalize: Scale, see `polarctl.scoring.reward_function.normalise`.
        strip_thinking: Score without `<think>...</think>`.
        reward_floor: Raw reward of an empty output, and with `strip_thinking` of one that ends in a
            thought; None: what is left of it is scored. verl does not tell whether an output was
            cut off.
        server_deadline: Seconds without a good reply before giving up.
        **_: The other things that verl gives; not used.

    Raises:
        PolarctlError: No prompt, or no good reply. A failure is never a reward.
    """
    known = extra_info or {}
    if known.get("prompt") is None:
        raise PolarctlError(
            "the POLAR reward needs `extra_info.prompt`",
            hint="polarctl convert --to verl writes it",
        )
    reward = PolarReward(
        _scorer(url, model, server_deadline),
        normalize=normalize,
        strip_thinking=strip_thinking,
        reward_floor=reward_floor,
    )
    (found,) = reward(
        [list(known["prompt"]) if not isinstance(known["prompt"], str) else known["prompt"]],
        [solution_str],
        reference=[ground_truth],
        wrapper=[known.get("wrapper")],
    )
    return found


_scorers: dict[tuple[str, str, float], ServerScorer] = {}
_opening = Lock()  # verl's first rollouts come in many threads at once


def _scorer(url: str, model: str, deadline_s: float) -> ServerScorer:
    """One for each process and server: it probes the server once and keeps its connections."""
    with _opening:
        settings = (url, model, deadline_s)
        if settings not in _scorers:
            _scorers[settings] = ServerScorer(url, load_encoder(model), deadline_s=deadline_s)
        return _scorers[settings]
