"""Which engine computes the rewards: from the options to a scorer, each choice checked first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from polarctl import console
from polarctl.errors import UsageError
from polarctl.model import devices, reward_model
from polarctl.parallel.ray_pool import Placement, gpus_of, placement_of
from polarctl.scoring.options import EngineConfig, ServedConfig
from polarctl.scoring.scorer import ModelScorer, Scorer, load_scorer
from polarctl.storage import manifest

if TYPE_CHECKING:
    from polarctl.scoring.chat_classifier import ClassifierScorer


def check(config: EngineConfig) -> None:
    """Raise UsageError for options that do not go together; `EngineConfig.NEEDS` has others."""
    if config.backend == "vllm" and config.server:
        raise UsageError("--backend vllm is an engine of this process: leave --server out")
    if config.server is not None:
        from polarctl.parallel.http_client import check_url

        check_url(config.server)
    placement(config)


def options_of(config: EngineConfig) -> dict[str, Any]:
    """`--engine-option` as keyword arguments.

    Raises:
        UsageError: Not of the form KEY=VALUE, or a secret.
    """
    options: dict[str, Any] = {}
    for text in config.engine_option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"`--engine-option {text}`: not of the form KEY=VALUE")
        if name.endswith(("token", "key", "secret", "password")) and value not in ("true", "false"):
            raise UsageError(
                f"`--engine-option {name}`: a secret would be in the manifest",
                hint="in the environment, such as HF_TOKEN",
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def identity(config: EngineConfig) -> dict[str, Any]:
    """What tells the numbers of one engine from another's."""
    remote = config.backend == "principle" and config.server
    return {
        "model_identity": config.model if remote else manifest.folder_identity(config.model),
        "engine": "server" if config.server else config.backend,
    }


def reads_chat(config: EngineConfig) -> bool:
    """Whether the model is shown a conversation in place of POLAR's template.

    Raises:
        MissingError: Config or tokenizer is not there.
        UsageError: `--reference-in-prompt` for a model that is not, or an option about references
            for one that is shown none.
    """
    here = config.backend == "hf" and not config.server
    chat = here and is_chat(config.model, config.prompt_style)
    if config.reference_in_prompt and not chat:
        raise UsageError(f"`--reference-in-prompt`: {config.model} reads POLAR's template")
    if chat and not config.reference_in_prompt:
        for flag, given in (
            ("--no-reference", config.no_reference),
            ("--reference-pooling", "reference_pooling" in config.given),
        ):
            if given:
                raise UsageError(
                    f"`{flag}` has no effect here: {config.model} reads a conversation",
                    hint="--reference-in-prompt shows it the reference",
                )
    return chat


def is_chat(path: str, style: str) -> bool:
    """Whether a model of this process is shown a conversation, from its `--prompt-style`.

    Raises:
        MissingError: Config or tokenizer is not there.
    """
    if style != "auto":
        return style == "chat"
    from polarctl.scoring.chat_classifier import is_chat_classifier

    devices.quiet_libraries()
    return is_chat_classifier(path)


def placement(config: EngineConfig) -> Placement | None:
    """Workers of `--ray`, with as many GPUs each as one engine takes; None without it.

    Raises:
        UsageError: See `polarctl.parallel.ray_pool.placement_of`.
    """
    return placement_of(config, gpus=gpus_of(options_of(config), "tensor", "pipeline"))


def windows_at_once(config: EngineConfig) -> int:
    """Windows of records that one process works on at a time.

    Three for a server, so that it has work while a window waits for its last reply; two on a GPU,
    where one is tokenized while the other is computed; one on a CPU, where both want its cores.
    """
    if config.backend == "principle" or config.gpus > 1 or config.ray is not None:
        return 1
    if config.server is not None:
        return 3
    if config.backend == "vllm" or config.device == "cpu":
        return 1
    import torch

    return 2 if torch.cuda.is_available() else 1


def open_served(config: ServedConfig, model: str) -> Scorer:
    """A POLAR model on the server of `--server`.

    Args:
        config: Options about the server.
        model: Folder or Hub id of the model, for its tokenizer and template.
    """
    from polarctl.scoring.server import ServerScorer

    assert config.server is not None
    return ServerScorer(
        config.server,
        reward_model.load_encoder(model),
        kind=config.server_type,
        name=config.server_model,
        concurrency=config.concurrency,
        batch=config.server_batch,
        deadline_s=config.server_deadline,
    )


def open_scorer(config: EngineConfig, *, chat: bool) -> Scorer:
    """The engine that was asked for, judges left out.

    Args:
        config: Options that `check` has passed.
        chat: See `reads_chat`.
    """
    if config.server is not None:
        devices.quiet_libraries()
        return open_served(config, config.model)
    if config.backend == "vllm":
        from polarctl.scoring.vllm import VllmScorer

        return VllmScorer(config.model, dtype=config.dtype, engine_options=options_of(config))
    return open_here(
        config.model,
        chat=chat,
        with_reference=config.reference_in_prompt,
        no_reference=config.no_reference,
        device=config.device,
        dtype=config.dtype,
        batch_tokens=config.batch_tokens,
    )


def open_here(
    path: str,
    *,
    chat: bool,
    with_reference: bool = False,
    no_reference: bool | None = None,
    **options: Any,
) -> ModelScorer | ClassifierScorer:
    """A reward model in this process.

    Args:
        path: Folder or Hub id.
        chat: See `is_chat`.
        with_reference: `--reference-in-prompt`, for one that reads conversations.
        no_reference: See `polarctl.scoring.scorer.load_scorer`, for one that does not.
        **options: `device`, `dtype` and `batch_tokens`.
    """
    if chat:
        from polarctl.scoring.chat_classifier import ClassifierScorer

        return ClassifierScorer(path, with_reference=with_reference, **options)
    return load_scorer(path, no_reference=no_reference, as_polar=True, **options)


def open_judge(config: EngineConfig) -> Any:
    """A `polarctl.judging.judge.PrincipleScorer` for the options."""
    from polarctl.judging.judge import Judge, LocalJudge, PrincipleScorer

    judge: Judge
    if config.server is not None:
        from polarctl.judging.chat import ChatServer

        judge = ChatServer(
            config.server,
            config.server_model or config.model,
            max_new_tokens=config.max_new_tokens,
            concurrency=config.concurrency,
            deadline_s=config.server_deadline,
        )
    else:
        judge = LocalJudge(
            config.model,
            device=config.device,
            dtype=config.dtype,
            max_new_tokens=config.max_new_tokens,
        )
    console.choice("rewards", "1 to 5", "a judge's scores, not rewards of a model")
    return PrincipleScorer(judge, orders=config.orders, seed=config.seed)
