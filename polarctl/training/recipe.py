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
_TUNING_BATCH, _TUNING_RATES, _NAMED, _LARGE = 320, (1e-5, 2e-5), 1.8e9, 4e9
_SMALLER = 1.69e9  # the 1.8B model has 1.70e9 weights without an output head
# Small runs, by measurement (docs/guides/training.md): steps that a run should have, passes that it
# takes for them at most, and the batch where the data are not counted.
_STEPS, _PASSES, _SMALL_BATCH = 100, 4.0, 32
_SLOPE, _RANDOM = 0.4, 10.0  # the learning rate over the model's size; from random weights
_FEW_STEPS = 20


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
        stage: `pretrain` follows the paper's law where it was fitted, `finetune` its published
            values where there is as much data; elsewhere both follow the rule for small runs.
        config: The options; explicit values win.
        facts: Sizes of model and data.
        batch_tokens: Tokens of a forward pass.

    Raises:
        UsageError: Options that do not work together.
    """
    found = _law(config, facts) if stage == "pretrain" else None
    if found is None:
        batch_size, epochs = _batches(config, facts)
        lr = _rate(config, facts)
    else:
        lr, batch_size = found
        epochs = _epochs(config)
    if batch_size < facts.processes:
        raise UsageError(
            f"a batch of {batch_size} triples for {facts.processes} processes",
            hint=f"--batch-size {facts.processes} or more",
        )
    if config.max_steps is None:
        assert facts.triples is not None
    steps = config.max_steps or steps_of(facts.triples or 0, epochs, batch_size)
    if steps < _FEW_STEPS:
        console.warn(
            f"only {steps} optimiser steps: the model learns little or nothing; more data, more "
            "--epochs or a smaller --batch-size help"
        )
    return Hyperparameters(
        lr=lr,
        batch_size=batch_size,
        steps=steps,
        warmup=config.warmup,
        batch_tokens=batch_tokens,
        shared=config.shared_prefix,
        loss=loss_of(config),
        seed=config.seed,
    )


def _epochs(config: TrainConfig) -> float:
    return 1.0 if config.epochs is None else config.epochs


def _law(config: TrainConfig, facts: Facts) -> tuple[float, int] | None:
    """Learning rate and batch size by the paper's law; None: it says nothing of this run.

    `--base-tokens` asks for the law, also where it was not fitted.
    """
    given: str | None = getattr(config, "base_tokens", None)
    try:
        base = _BASE_TOKENS if given is None else law.parse_tokens(given)
    except ValueError as error:
        raise UsageError(f"`--base-tokens {given}`: {error}") from None
    if config.lr is not None and config.batch_size is not None:
        return config.lr, config.batch_size
    tokens = _tokens(config, facts)
    if tokens is None:
        if given is None:
            return None
        raise UsageError(
            "without --batch-size and with --max-steps the law does not know the tokens of the run",
            hint="pass --batch-size, or --epochs in place of --max-steps",
        )
    found = law.Law.of(facts.parameters, base, tokens)
    if found.outside() and given is None:
        return None
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
    return config.lr or found.lr, config.batch_size or found.batch_size


def _tokens(config: TrainConfig, facts: Facts) -> float | None:
    """Tokens of the whole run, as the paper counts them: both sequences of every triple."""
    if config.max_steps is not None and config.batch_size is not None:
        return config.max_steps * config.batch_size * facts.triple_tokens
    if facts.triples is None or config.max_steps is not None:
        return None
    return facts.triples * _epochs(config) * facts.triple_tokens


def _rate(config: TrainConfig, facts: Facts) -> float:
    """Peak learning rate where no law holds: published from 1.8B weights on, higher below."""
    if config.lr is not None:
        return config.lr
    size = facts.parameters
    lr, reason = _TUNING_RATES[size > _LARGE], f"POLAR's own fine-tuning, for {size:.3g} weights"
    if size < _SMALLER:
        lr *= (_NAMED / size) ** _SLOPE
        reason = (
            f"1e-5 x (1.8e9 / N)^{_SLOPE} for N = {size:.3g} weights, by measurement: no value is "
            "published for so few"
        )
    if config.init_from_config is not None:
        lr *= _RANDOM
        reason += f"; {_RANDOM:g} times that from random weights"
    lr = float(f"{lr:.2g}")
    console.choice("lr", f"{lr:g}", reason)
    return lr


def _batches(config: TrainConfig, facts: Facts) -> tuple[int, float]:
    """Batch size and passes over the data where no law holds.

    POLAR's own batch where the data give it enough steps; else the largest power of two from 8 on
    that does, and where 8 is too many, more passes over the data.
    """
    epochs, batch_size = _epochs(config), config.batch_size
    if facts.triples is None or config.max_steps is not None:
        if batch_size is None:
            batch_size = _TUNING_BATCH if facts.parameters >= _SMALLER else _SMALL_BATCH
            console.choice("batch size", str(batch_size), f"for {facts.parameters:.3g} weights")
        return batch_size, epochs
    if batch_size is None:
        use = facts.triples * epochs
        powers = [2**power for power in range(3, 9) if use / 2**power >= _STEPS]
        enough = use / _TUNING_BATCH >= _STEPS
        batch_size = _TUNING_BATCH if enough else max(powers, default=8)
        console.choice(
            "batch size",
            str(batch_size),
            "POLAR's own fine-tuning"
            if enough
            else f"{facts.triples:,} triples; {_TUNING_BATCH} as in POLAR's fine-tuning would be "
            f"{steps_of(facts.triples, epochs, _TUNING_BATCH):,} steps",
        )
    if config.epochs is None:
        epochs = min(_PASSES, max(1.0, float(-(-_STEPS * batch_size // facts.triples))))
        if epochs > 1:
            steps = steps_of(facts.triples, 1, batch_size)
            console.choice("epochs", f"{epochs:g}", f"one pass would be {steps:,} steps")
    return batch_size, epochs
