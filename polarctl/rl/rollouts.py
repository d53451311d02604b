"""What a step of reinforcement fine-tuning leaves behind: rollout records, a line of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polarctl.evaluation import plots
from polarctl.records import Record, prompt_id

# Ours to TRL's. `clip_ratio` is missing from losses that do not clip, `kl` without a KL term.
_TRL_METRICS = {
    "kl": "kl",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "lr": "learning_rate",
    "entropy": "entropy",
    "accuracy": "mean_token_accuracy",
    "clip_ratio": "clip_ratio/region_mean",
    "completion_length": "completions/mean_length",
    "completion_cut": "completions/clipped_ratio",
    "equal_groups": "frac_reward_zero_std",
    "tokens": "num_tokens",
}


@dataclass(frozen=True)
class Rollout:
    """One completion as the trainer saw it.

    Attributes:
        row: Index of its prompt.
        sample: Its index among the rollouts of that prompt in this step.
        output: Its text.
        tokens: Tokens generated.
        ended: The policy ended it itself.
        reward: Raw reward.
        normalized: The reward that was trained on.
        advantage: How much better than its group, in the group's standard deviations.
        floored: Why its reward is the floor; empty: the reward model gave it.
        components: Reward name to raw value; None: not applicable.
    """

    row: int
    sample: int
    output: str
    tokens: int
    ended: bool
    reward: float
    normalized: float
    advantage: float
    floored: str = ""
    components: Mapping[str, float | None] = field(default_factory=dict)


def record_of(
    rollout: Rollout, prompt: Record, *, step: int, policy: str, wrapper: str
) -> dict[str, Any]:
    """A trajectory record: the prompt with its fields, what was written, and the rewards."""
    return {
        **prompt,
        "id": prompt_id(prompt),
        "output": rollout.output,
        "policy": policy,
        "sample": rollout.sample,
        "wrapper": wrapper,
        "finish_reason": "stop" if rollout.ended else "length",
        "num_tokens": rollout.tokens,
        "step": step,
        "reward": rollout.reward,
        "reward_normalized": rollout.normalized,
        "advantage": rollout.advantage,
        "components": dict(rollout.components),
        **({"floored": rollout.floored} if rollout.floored else {}),
    }


def distinct(text: str, n: int) -> float | None:
    """The share of a text's n-grams of words that are different from each other, 0 to 1.

    "Distinct-n" of Li et al. (arXiv 1510.03055), within one text, so that it falls when a policy
    repeats itself and not when all rollouts of a prompt agree. Words stand between blank space.

    Returns:
        None for a text of fewer than `n` words.
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def step_entry(
    step: int, rollouts: Sequence[Rollout], trl: Mapping[str, float | None]
) -> dict[str, Any]:
    """A line of `metrics.jsonl`; numbers that are not finite become the words `nan` and `inf`.

    Args:
        step: Number of the step, from 1.
        rollouts: All rollouts of the step.
        trl: What TRL logs for it.
    """
    raw = [rollout.reward for rollout in rollouts]
    used = [rollout.normalized for rollout in rollouts]
    entry: dict[str, Any] = {
        "step": step,
        "reward": statistics.fmean(raw),
        "reward_std": statistics.pstdev(raw),
        "reward_normalized": statistics.fmean(used),
        "reward_normalized_std": statistics.pstdev(used),
        "floored": statistics.fmean(bool(rollout.floored) for rollout in rollouts),
    }
    for name in rollouts[0].components:
        given = [v for r in rollouts if (v := r.components[name]) is not None]
        if given:
            entry[f"reward/{name}"] = statistics.fmean(given)
    for n in (1, 2):
        shares = [share for r in rollouts if (share := distinct(r.output, n)) is not None]
        if shares:
            entry[f"distinct_{n}"] = statistics.fmean(shares)
    return entry | numbers_of(trl)


def numbers_of(trl: Mapping[str, float | None]) -> dict[str, Any]:
    """TRL's numbers of a step under our names."""
    found: dict[str, Any] = {}
    for name, theirs in _TRL_METRICS.items():
        value = trl.get(theirs)
        if value is not None:
            found[name] = value if math.isfinite(value) else str(value)
    return found


def curves(entries: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """Plots by file name: the reward (or the loss), and the KL where it was measured."""
    entries = list(entries)
    first = ("curves.png", "reward", "mean raw reward of a step's rollouts", "Reward")
    if entries and "reward" not in entries[0]:
        first = ("curves.png", "loss", "negative log-likelihood (nats per token)", "Loss")
    wanted = (
        first,
        ("kl.png", "kl", "KL to the policy at the start (nats per token)", "KL"),
    )
    images = {}
    for file, key, label, title in wanted:
        points = [(e["step"], e[key]) for e in entries if isinstance(e.get(key), int | float)]
        if points:
            images[file] = plots.curves({title: points}, xlabel="step", ylabel=label, title=title)
    return images
