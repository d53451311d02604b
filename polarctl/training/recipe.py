"""How to train: what the user asked for, and the paper's values for the rest, said with reasons."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from polarctl import console
from polarctl.errors import UsageError
from polarctl.training import law
from polarctl.training.loop import Hyperparameters, steps_of
from polarctl.training.losses import PRESETS, Loss
from polarctl.training.options import TrainConfig

# The paper's 1.8B model started from a base model of so many tokens (polar pre-training).
_BASE_TOKENS = 2.5e12
# POLAR's fine-tuning: 320 triples; 1e-5 for the 1.8B model and 2e-5 for the 7B one.
_TUNING_BATCH, _TUNING_RATES, _LARGE = 320, (1e-5, 2e-5), 4e9


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the choices depend on.

    Attributes:
        parameters: Weights of the reward model.
        triples: Training triples of one epoch, or None when they were not counted.
        triple_tokens: Mean tokens of a triple, all its sequences counted whole.
        processes: Processes that train.
    """

    parameters: int
    triples: int | None
    triple_tokens: float
    processes: int


def loss_of(config: TrainConfig) -> Loss:
    """The loss: a preset, with what is given beside it.

    Raises:
        UsageError: No such preset, loss or penalty.
    """
    chosen = PRESETS[config.preset]
    given: dict[str, Any] = {"margin": config.margin}
    if config.loss is not None:
        given["ranking"] = config.loss
    if config.penalty is not None:
        given["penalty"] = config.penalty
        given["penalty_weight"] = chosen.penalty_weight or 0.01
    if config.penalty_weight is not None:
        given["penalty_weight"] = config.penalty_weight
    try:
        found = dataclasses.replace(chosen, **given)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if config.penalty_weight is not None and found.penalty == "none":
        raise UsageError(
            "`--penalty-weight` has no effect here: there is no penalty", hint="--penalty barrier"
        )
    if "preset" in config.given and None not in (
        config.loss,
        config.penalty,
        config.penalty_weight if config.penalty != "none" else 0,
    ):
        raise UsageError(
            "`--preset` has no effect here: the options beside it say all that it would",
            hint="leave it out",
        )
    return found


def resolve(stage: str, config: TrainConfig, facts: Facts, batch_tokens: int) -> Hyperparameters:
    """The hyper-parameters of a run; what was not given is said.

    Args:
        stage: `pretrain` follows the paper's law, `finetune` its published values.
        config: The options; explicit values win.
        facts: Sizes of model and data.
        batch_tokens: Tokens of a forward pass.

    Raises:
        UsageError: Options that do not work together.
    """
    lr, batch_size = config.lr, config.batch_size
    if lr is None or batch_size is None:
        of_law = _law(config, facts) if stage == "pretrain" else _tuning(facts)
        lr = of_law[0] if lr is None else lr
        batch_size = of_law[1] if batch_size is None else batch_size
    if batch_size < facts.processes:
        raise UsageError(
            f"a batch of {batch_size} triples for {facts.processes} processes",
            hint=f"--batch-size {facts.processes} or more",
        )
    if config.max_steps is None:
        assert facts.triples is not None
    return Hyperparameters(
        lr=lr,
        batch_size=batch_size,
        steps=config.max_steps or steps_of(facts.triples or 0, config.epochs, batch_size),
        warmup=config.warmup,
        batch_tokens=batch_tokens,
        shared=config.shared_prefix,
        loss=loss_of(config),
        seed=config.seed,
    )


def _law(config: TrainConfig, facts: Facts) -> tuple[float, int]:
    """Learning rate and batch size by the paper's law."""
    given: str | None = getattr(config, "base_tokens", None)
    try:
        base = _BASE_TOKENS if given is None else law.parse_tokens(given)
    except ValueError as error:
        raise UsageError(f"`--base-tokens {given}`: {error}") from None
    found = law.Law.of(facts.parameters, base, _tokens(config, facts))
    for name, own, value in (
        ("lr", config.lr, f"{found.lr:.4g}"),
        ("batch size", config.batch_size, str(found.batch_size)),
    ):
        if own is None:
            console.choice(name, value, f"the paper's law: {found.explain()}")
    if given is None and config.lr is None:
        console.warn(
            f"--base-tokens is not given: the law takes the {_BASE_TOKENS:.3g} tokens of the "
            "paper's 1.8B model"
        )
    if found.outside():
        console.warn(f"the law is {found.outside()}")
    return found.lr, found.batch_size


def _tokens(config: TrainConfig, facts: Facts) -> float:
    """Tokens of the whole run, as the paper counts them: both sequences of every triple."""
    if config.max_steps is not None and config.batch_size is not None:
        return config.max_steps * config.batch_size * facts.triple_tokens
    if facts.triples is None:
        raise UsageError(
            "without --batch-size and with --max-steps the law does not know the tokens of the run",
            hint="pass --batch-size, or --epochs in place of --max-steps",
        )
    return facts.triples * config.epochs * facts.triple_tokens


def _tuning(facts: Facts) -> tuple[float, int]:
    """Learning rate and batch size of POLAR's fine-tuning."""
    lr = _TUNING_RATES[facts.parameters > _LARGE]
    console.choice(
        "fine-tuning", f"lr {lr:g}, batch {_TUNING_BATCH}", "where not given: POLAR's own values"
    )
    return lr, _TUNING_BATCH
