"""The options of `rft` that say what is rewarded, and what watches over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import typer

from polarctl.config import Needs
from polarctl.scoring.options import ServedConfig
from polarctl.verifiers.bounds import MEMORY_GIB, TIMEOUT_S


def has_polar(config: Any) -> bool:
    """Whether a POLAR model is among the rewards."""
    return "polar" in config.reward


def _has_model(config: Any) -> bool:
    return has_polar(config) or any(name.startswith("rm:") for name in config.reward)


def _has_judge(config: Any) -> bool:
    return any(name.startswith("principle:") for name in config.reward)


def _runs_programs(config: Any) -> bool:
    names = (*config.reward, config.check or "")
    return any(name.partition(":")[0] in ("math", "command") for name in names)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(ServedConfig):
    """Options about rewards."""

    NEUTRAL: ClassVar[frozenset[str]] = ServedConfig.NEUTRAL | {"judge_server"}

    NEEDS = [
        Needs("reward_model server normalize", has_polar, "`--reward polar`"),
        Needs("batch_tokens", _has_model, "rewards by a model: `polar` or `rm:PATH`"),
        Needs(
            "reward_floor",
            lambda c: _has_model(c) or _has_judge(c),
            "rewards by a model: `polar`, `rm:PATH` or `principle:MODEL`",
        ),
        Needs("judge_server", _has_judge, "`--reward principle:MODEL`"),
        Needs("server_type server_model server_batch", lambda c: c.server is not None, "--server"),
        Needs(
            "concurrency server_deadline",
            lambda c: c.server is not None or c.judge_server is not None,
            "--server or --judge-server",
        ),
        Needs("combine reward_weights", lambda c: len(c.reward) > 1, "several rewards"),
        Needs(
            "verifier_timeout verifier_memory", _runs_programs, "the verifiers `math` and `command`"
        ),
        Needs("check_prompts check_steps patience", lambda c: c.check is not None, "--check"),
    ]

    reward: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="NAME",
            help="What is rewarded; may be repeated. polar, rm:PATH (a reward model that reads a "
            "chat), principle:MODEL (a chat model that judges by the records' `principle`), or a "
            "verifier: exact[:FIELD], regex:PATTERN, regex:@FIELD, gsm8k[:FIELD], "
            "math[:FIELD], think-format, length:CHARACTERS, json-schema:FILE, json-schema:@FIELD, "
            "command:PROGRAM.",
        ),
    ] = ("polar",)
    reward_model: Annotated[
        str | None, typer.Option(help="POLAR reward model: a folder or a Hub id.")
    ] = None
    judge_server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask the MODEL of `--reward principle:MODEL` on an OpenAI-compatible server.",
        ),
    ] = None
    combine: Annotated[
        Literal["sum", "gate", "zsum"],
        typer.Option(
            help="Several rewards: their weighted sum, the verifiers where one applies and the "
            "models elsewhere, or the weighted sum of z-scores within a prompt's rollouts."
        ),
    ] = "sum"
    reward_weights: Annotated[
        tuple[float, ...],
        typer.Option(
            metavar="WEIGHT", help="Factor of each --reward, in their order; repeated. Default: 1."
        ),
    ] = ()
    overlong_buffer: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Take up to 1 off the reward of a rollout in its last TOKENS before "
            "--max-new-tokens (DAPO).",
        ),
    ] = None
    verifier_timeout: Annotated[
        float, typer.Option(min=1e-3, help="Seconds of one answer in math and command.")
    ] = TIMEOUT_S
    verifier_memory: Annotated[
        float, typer.Option(min=0.01, help="GiB of one answer in math and command.")
    ] = MEMORY_GIB
    check: Annotated[
        str | None,
        typer.Option(
            metavar="VERIFIER",
            help="Have a verifier that the reward never sees look at answers to held-out prompts; "
            "the policy that is best by it is the one that is written.",
        ),
    ] = None
    check_prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Those prompts; default: a tenth of the input, 200 at most, is set aside.",
        ),
    ] = None
    check_steps: Annotated[int, typer.Option(min=1, help="Steps between checks.")] = 10
    patience: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Stop after K checks without a better one."),
    ] = None
