"""Model, adapters, processes and engine of a run, put together; and the model written out again."""

from __future__ import annotations

import datetime
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch

from polarctl import console
from polarctl.errors import UsageError, need
from polarctl.model import chat_model, devices
from polarctl.model import reward_model as models
from polarctl.model.forward import Packed, Padded, module_of
from polarctl.model.reward_model import PolarModel
from polarctl.parallel import rank
from polarctl.training import lora, zero
from polarctl.training.engine import Engine, PlainEngine
from polarctl.training.loop import Hyperparameters
from polarctl.training.options import TrainConfig
from polarctl.training.plan import Gpu, gpu_of

# The first process reads all of the data while the others wait for it.
_PATIENCE = datetime.timedelta(hours=12)
_BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run computes.

    Attributes:
        accelerator: Knows devices and processes.
        half: Compute in bfloat16; weights and optimiser stay in float32.
        batch_tokens: Tokens of one forward pass.
        deepspeed: DeepSpeed's config, or None.
        gpu: Of a plan: the kind of GPU that it is for.
    """

    accelerator: accelerate.Accelerator
    half: bool
    batch_tokens: int
    deepspeed: dict[str, Any] | None
    gpu: Gpu | None = None

    @property
    def zero(self) -> int:
        """ZeRO's stage, 0 without DeepSpeed."""
        found: int = (self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
        return found


def place_of(config: TrainConfig) -> Place:
    """Where to compute, chosen with reasons that are said.

    Raises:
        MissingError: No such device, or DeepSpeed is not installed.
        UsageError: A device, precision or DeepSpeed config that does not exist.
    """
    devices.quiet_libraries()
    if config.plan_for is not None:  # which need not be here
        rows = config.batch_tokens or _BATCH_TOKENS["cuda"]
        return _planned(config, config.dtype != "float32", rows, "cuda")
    device = devices.device_of(config.device)
    if config.dtype == "float16":
        raise UsageError(
            "training in float16 needs a scaled loss", hint="--dtype bfloat16 or float32"
        )
    half = devices.dtype_of(config.dtype, device) == torch.bfloat16
    kind = device.partition(":")[0]
    if config.device.startswith("cuda:") and (config.deepspeed or rank.is_one_of_several()):
        raise UsageError(
            f"`--device {config.device}`: DeepSpeed and several processes choose their own GPUs",
            hint="--device cuda; CUDA_VISIBLE_DEVICES says which ones",
        )
    tokens = config.batch_tokens
    if tokens is None:
        tokens = _BATCH_TOKENS[kind]
        console.choice("batch tokens", str(tokens), f"for a {kind.upper()}")
    if config.dry_run:
        if config.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
            raise need("deepspeed", "deepspeed")
        return _planned(config, half, tokens, device)
    if config.deepspeed is not None:
        given = _deepspeed(config.deepspeed, half)
        accelerator = zero.accelerator(given, cpu=kind == "cpu")
        return Place(accelerator=accelerator, half=half, batch_tokens=tokens, deepspeed=given)
    # Another run of this Python process may have had another precision; accelerate keeps one.
    accelerate.state.AcceleratorState._reset_state()
    if ":" in device:  # otherwise every process has its own
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    accelerator = accelerate.Accelerator(
        cpu=kind == "cpu",
        mixed_precision="bf16" if half else "no",
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    return Place(accelerator=accelerator, half=half, batch_tokens=tokens, deepspeed=None)


def _deepspeed(name: str, half: bool) -> dict[str, Any]:
    dtype = "bfloat16" if half else "float32"
    return zero.config_of(name, dtype=dtype, clip=Hyperparameters.clip)


def _planned(config: TrainConfig, half: bool, tokens: int, device: str) -> Place:
    """A place where nothing will be computed: no GPU is touched and no DeepSpeed started."""
    accelerate.state.AcceleratorState._reset_state()
    return Place(
        accelerator=accelerate.Accelerator(cpu=True),
        half=half,
        batch_tokens=tokens,
        deepspeed=None if config.deepspeed is None else _deepspeed(config.deepspeed, half),
        gpu=gpu_of(config, device),
    )


def reward_model_of(config: TrainConfig, default_response_length: int) -> PolarModel:
    """The model to be trained, in float32, on the CPU; for a plan without its weights."""
    if config.chat:
        return chat_model.create(
            base=config.model,
            config_path=config.init_from_config,
            tokenizer_path=config.tokenizer,
            max_length=config.max_length,
            device="meta" if config.dry_run else "cpu",
            seed=config.seed,
        )
    made = models.create(
        base=config.model,
        config_path=config.init_from_config,
        tokenizer_path=config.tokenizer,
        max_length=config.max_length,
        max_response_length=config.max_response_length,
        default_response_length=default_response_length,
        cut_side=config.cut_side,
        device="meta" if config.dry_run else "cpu",
        seed=config.seed,
    )
    made.model.config.polar_no_reference = config.no_reference
    return made


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model in training.

    Attributes:
        reward_model: The model, its tokenizer and template.
        module: What computes its rewards (`polarctl.model.forward.Packed` or `Padded`).
        adapted: peft's model around it, or None.
        engine: Takes the steps.
    """

    reward_model: PolarModel
    module: Packed | Padded
    adapted: Any
    engine: Engine


def trained(
    config: TrainConfig, place: Place, reward_model: PolarModel, plan: Hyperparameters
) -> Trained:
    """The model with its adapters, its attention and its optimiser.

    Raises:
        UsageError: DeepSpeed refuses its config.
        MissingError: A package is not installed.
    """
    classifier = reward_model.model.to(place.accelerator.device)
    adapted = None
    if config.lora_rank is not None:
        adapted = lora.adapt(
            classifier,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            new_tokens=reward_model.new_tokens,
        )
    if config.gradient_checkpointing:
        classifier.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    module = module_of(classifier, shared=plan.shared)
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=plan.lr,
        betas=plan.betas,
        weight_decay=plan.weight_decay,
    )
    engine: Engine
    if place.deepspeed is not None:
        engine = zero.ZeroEngine(place.accelerator, module, optimizer)
    else:
        engine = PlainEngine(place.accelerator, module, optimizer, plan.clip)
    return Trained(reward_model=reward_model, module=module, adapted=adapted, engine=engine)


def write(config: TrainConfig, place: Place, trained: Trained, folder: Path, length: int) -> None:
    """Write the model as a plain sequence classifier; every process calls it.

    Adapters are added to the weights, and written beside them in `adapter/`.

    Args:
        config: The run's options.
        place: Where it computes.
        trained: The model.
        folder: Where to.
        length: The stage's default of `--max-response-length`.
    """
    made = trained.reward_model
    weights = trained.engine.weights(part=made.model)
    if weights is None:
        return
    if trained.adapted is not None:
        # A fresh copy takes the gathered weights: under ZeRO-3 no process holds them whole.
        made = reward_model_of(config, length)
        adapted = lora.adapt(
            made.model,
            rank=config.lora_rank or 1,
            alpha=config.lora_alpha,
            new_tokens=made.new_tokens,
            quiet=True,
        )
        made.model.load_state_dict(weights)
        lora.save(adapted, folder / "adapter")
        made = PolarModel(lora.merged(adapted), made.tokenizer, made.encoder)
        weights = made.model.state_dict()
    if place.half:
        weights = {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in weights.items()
        }
    made.save(folder, weights)
