"""The options of the stages that compute rewards: shared by `score` and `eval`, and of engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import typer

from polarctl.config import Common, Device, Dtype, Needs, Ray, RayResource, ServerDeadline

WINDOW_ROWS = 512  # records that are scored together: a reward's last digit depends on it


def _here(config: Any) -> bool:
    """Whether transformers computes, in this process."""
    return bool(config.backend == "hf" and config.server is None)


def _judged(config: Any) -> bool:
    return bool(config.backend == "principle")


PromptStyle = Annotated[
    Literal["auto", "polar", "chat"],
    typer.Option(
        help="How the input is written: POLAR's template, or the tokenizer's chat template (other "
        "reward models)."
    ),
]
MODEL = typer.Option("--model", "-m", help="Reward model: a folder or a Hub id.")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Common):
    """Options of a stage that scores with a reward model."""

    model: Annotated[str | None, MODEL] = None
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Score against an empty reference.")
    ] = False
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one forward pass, padding included.")
    ] = 8192
    device: Device = "auto"
    dtype: Dtype = "auto"


@dataclass(frozen=True, kw_only=True)
class ServedConfig(Common):
    """Options of a stage that may ask a server for rewards."""

    NEUTRAL: ClassVar[frozenset[str]] = frozenset(
        "server server_model concurrency server_deadline".split()
    )

    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask a server that holds the model; here it is then named for its tokenizer and "
            "template, and a judge by its name there.",
        ),
    ] = None
    server_type: Annotated[
        Literal["auto", "vllm", "sglang", "lmdeploy", "polarctl"],
        typer.Option(help="What it is."),
    ] = "auto"
    server_model: Annotated[
        str | None, typer.Option(help="Name of the model there; default: the first it lists.")
    ] = None
    server_batch: Annotated[int, typer.Option(min=1, help="Inputs of a request at most.")] = 32
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests to the server under way at most.")
    ] = 16
    server_deadline: ServerDeadline = 300.0


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ScoreConfig, ServedConfig):
    """Options that say which engine computes the rewards, and what it is shown."""

    NEUTRAL: ClassVar[frozenset[str]] = ServedConfig.NEUTRAL | {"gpus", "ray", "ray_resource"}
    NEEDS = [
        Needs("batch_tokens prompt_style", _here, "--backend hf, without --server"),
        Needs(
            "reference_in_prompt",
            lambda c: _here(c) and c.prompt_style != "polar" and not c.no_reference,
            "--backend hf and --prompt-style chat, with a reference",
        ),
        Needs(
            "device",
            lambda c: c.server is None and (c.backend != "vllm" or c.gpus > 1 or c.ray),
            "an engine of this process; vLLM takes the GPUs of CUDA_VISIBLE_DEVICES",
        ),
        Needs("dtype gpus ray", lambda c: c.server is None, "engines of our own, not --server"),
        Needs("ray_resource", lambda c: c.ray is not None, "--ray"),
        Needs("engine_option", lambda c: c.backend == "vllm", "--backend vllm"),
        Needs(
            "server_model concurrency server_deadline", lambda c: c.server is not None, "--server"
        ),
        Needs(
            "server_type server_batch",
            lambda c: c.server is not None and not _judged(c),
            "--server with a reward model",
        ),
        Needs("orders max_new_tokens", _judged, "--backend principle"),
        Needs("seed", _judged, "--backend principle: a reward needs no random choice"),
        Needs("no_reference", lambda c: not _judged(c), "reward models"),
        Needs(
            "reference_pooling",
            lambda c: not _judged(c) and not c.no_reference,
            "reward models that read a reference",
        ),
    ]

    model: Annotated[str, MODEL] = field()  # required here
    backend: Annotated[
        Literal["hf", "vllm", "principle"],
        typer.Option(
            help="Engine: transformers, vLLM, or a generative judge that scores by each record's "
            "`principle`."
        ),
    ] = "hf"
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes, one for each GPU; a record stays in one. With --ray: workers, by "
            "default as many as the cluster has room for.",
        ),
    ] = 1
    ray: Ray = None
    ray_resource: RayResource = ()
    engine_option: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="KEY=VALUE", help="Argument of vLLM's engine, JSON or text; may be repeated."
        ),
    ] = ()
    prompt_style: PromptStyle = "auto"
    reference_in_prompt: Annotated[
        bool,
        typer.Option(
            "--reference-in-prompt", help="chat: put the reference into the last user message."
        ),
    ] = False
    orders: Annotated[
        int, typer.Option(min=1, help="principle: orders in which a judge sees the candidates.")
    ] = 1
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="principle: tokens of a judge's answer at most.")
    ] = 4096


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(EngineConfig):
    """Options that say what is asked for beside a reward."""

    condition_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field whose value picks a system prompt."),
    ] = None
    conditions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="YAML: values of that field to system prompts, for scoring only."
        ),
    ] = None
    reference_pooling: Annotated[
        Literal["mean", "max"],
        typer.Option(help="A candidate's reward among several `references`."),
    ] = "mean"
    strip_thinking: Annotated[
        bool, typer.Option("--strip-thinking", help="Score without <think>...</think>.")
    ] = False
    reward_floor: Annotated[
        str,
        typer.Option(
            metavar="VALUE",
            help="Raw reward of an output without an answer: empty, in an unfinished thought, or "
            "`finish_reason: length`. A number, none, or auto: -20 with --strip-thinking, else "
            "none. Such a record says so in `floored`.",
        ),
    ] = "auto"
    normalize: Annotated[
        Literal["none", "polar-1.8b", "polar-7b", "zscore", "rank"],
        typer.Option(
            help="Add `normalized`, rewards on another scale: as the paper trains its two models, "
            "or within a record."
        ),
    ] = "none"
    details: Annotated[
        bool, typer.Option("--details", help="Add `tokens` and `truncated` for each reward.")
    ] = False
    best_of_n: Annotated[
        bool, typer.Option("--best-of-n", help="Add `best`: index of a group's highest reward.")
    ] = False
