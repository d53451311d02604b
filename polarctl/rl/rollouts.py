"""What a step of reinforcement fine-tuning leaves behind: rollout records, a line of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
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
    "token_accuracy": "mean_token_accuracy",
    "clip_ratio": "clip_ratio/region_mean",
    "completion_length": "completions/mean_length",
    "completion_cut": "completions/clipped_ratio",
    "equal_groups": "frac_reward_zero_std",
    "tokens": "num_tokens",
    # How far the trainer's log-probabilities of the sampled tokens are from vLLM's.
    "sampling_gap": "sampling/sampling_logp_difference/mean",
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
        check: What `--check` says to it; None: it was not asked, or is not applicable.
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
    check: float | None = None


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
        **({"check": rollout.check} if rollout.check is not None else {}),
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
    judged = [r.check for r in rollouts if r.check is not None]
    if judged:
        entry["accuracy"] = statistics.fmean(judged)
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


def curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Plots by file name: the reward (or the loss) with what watches it, the KL if measured."""
    known = {key for entry in entries for key in entry}
    parts = sorted(key for key in known if key.startswith("reward/"))
    models = [p for p in parts if p.partition("/")[2].partition(":")[0] in ("polar", "rm")]
    shares = [p for p in parts if p not in models and p != "reward/overlong"]
    panels = {
        "Mean raw reward of a step's rollouts": ["reward", *(models if len(parts) > 1 else ())],
        "Negative log-likelihood (nats per token)": [] if "reward" in known else ["loss"],
        "Verifiers: rewards, accuracy of the rollouts, check on held-out prompts": [
            *shares,
            "accuracy",
            "check",
        ],
        "Share of different words and pairs of words in a rollout": ["distinct_1", "distinct_2"],
    }
    shown = {title: _points(entries, keys) for title, keys in panels.items()}
    images: dict[str, bytes] = {}
    if any(shown.values()):
        shown = {title: series for title, series in shown.items() if series}
        images["curves.png"] = plots.stacked_curves(shown, xlabel="step")
    kl = _points(entries, ["kl"])
    if kl:
        label = "KL to the policy at the start (nats per token)"
        images["kl.png"] = plots.curves(kl, xlabel="step", ylabel=label, title="KL")
    return images


def _points(
    entries: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Key to its points, for the keys that have any."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key in keys:
        points = [(e["step"], e[key]) for e in entries if isinstance(e.get(key), int | float)]
        if key == "check" and points:
            points = [(0, entries[0]["check_start"]), *points]
        if points:
            found[key] = points
    return found
