"""What the shims share: one scorer in a process for each reward model, local or on a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from polarctl.errors import PolarctlError
from polarctl.scoring.answers import REWARD_FLOOR, floor_of
from polarctl.scoring.reward_function import PolarReward
from polarctl.scoring.scorer import Scorer, load_scorer

_scorers: dict[tuple[Any, ...], Scorer] = {}
_opening = Lock()  # a trainer's first rollouts come in many threads at once


def load(
    model: str,
    *,
    url: str | None = None,
    normalize: str = "none",
    strip_thinking: bool = False,
    thinking_opened: bool = False,
    reward_floor: float | str | None = REWARD_FLOOR,
    server_deadline: float = 300.0,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = 8192,
) -> PolarReward:
    """The reward function of a reward model; all of a process share the model or its connections.

    Args:
        model: Folder or Hub id of the reward model. With `url` only its tokenizer and template are
            read, and no weights.
        url: Address of a server that holds it (`polarctl serve`, `vllm serve`, SGLang, lmdeploy);
            None: the model is loaded into this process.
        normalize: Scale, see `polarctl.scoring.reward_function.normalise`.
        strip_thinking: Score without `<think>...</think>`.
        thinking_opened: The prompts end in `<think>`.
        reward_floor: Raw reward of an output without an answer; None or `none`: what is left of it
            is scored.
        server_deadline: Seconds without a good reply of the server before giving up.
        device: Of a local model: auto, cpu, cuda or cuda:I.
        dtype: Of a local model: auto, float32, bfloat16 or float16.
        batch_tokens: Of a local model: tokens of one pass.

    Raises:
        PolarctlError: No such model, or no server.
    """
    floor = floor_of(reward_floor, REWARD_FLOOR) if isinstance(reward_floor, str) else reward_floor
    key = (model, url, server_deadline) if url else (model, None, device, dtype, batch_tokens)
    with _opening:
        if key not in _scorers:
            _scorers[key] = (
                _remote(model, url, server_deadline)
                if url
                else load_scorer(model, device=device, dtype=dtype, batch_tokens=batch_tokens)
            )
    return PolarReward(
        _scorers[key],
        normalize=normalize,
        strip_thinking=strip_thinking,
        thinking_opened=thinking_opened,
        reward_floor=floor,
    )


def _remote(model: str, url: str, deadline_s: float) -> Scorer:
    from polarctl.model.reward_model import load_encoder
    from polarctl.scoring.server import ServerScorer

    return ServerScorer(url, load_encoder(model), deadline_s=deadline_s)


def text_of(value: Any) -> Any:
    """A text, or messages as a list of dicts: Parquet readers give arrays of rows."""
    return value if isinstance(value, str) else [dict(message) for message in value]


def prompt_of(extra_info: Mapping[str, Any] | None, key: str = "prompt") -> Any:
    """The prompt that a row of verl's form keeps for the reward function.

    Raises:
        PolarctlError: It has none.
    """
    found = (extra_info or {}).get(key)
    if found is None:
        raise PolarctlError(
            f"the POLAR reward needs `extra_info.{key}`",
            hint="polarctl convert --to verl writes it",
        )
    return text_of(found)


def references_in(columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The references among a dataset's columns.

    They are `reference`, else `ground_truth`, else `reward_model.ground_truth` of verl's form.

    Raises:
        PolarctlError: There are none.
    """
    found: Sequence[Any] = columns.get("reference") or columns.get("ground_truth") or ()
    if not found:
        found = [(row or {}).get("ground_truth") for row in columns.get("reward_model") or ()]
    if not found or any(text is None for text in found):
        raise PolarctlError(
            "the POLAR reward needs a `reference` for every prompt",
            hint="add a column `reference` (or `ground_truth`) to the dataset",
        )
    return [text_of(text) for text in found]
