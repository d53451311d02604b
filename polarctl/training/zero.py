"""DeepSpeed ZeRO for the training loop: optimiser state, gradients and weights in shards.

    zero1   each process keeps a share of the optimiser's state
    zero2   and of the gradients
    zero3   and of the weights

`accelerate` starts the processes, fills DeepSpeed's config and builds its engine. The steps are
taken on the engine itself: `accelerator.backward` runs the optimiser inside the last backward,
before the loop could see that a loss is not finite and before the learning rate of the step is set.

DeepSpeed opens its checkpoints as pickles that may run any program; `checkpoint.data_only` has them
read as plain data.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import accelerate
import orjson
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from polarctl.errors import MissingError, PolarctlError, UsageError, need
from polarctl.parallel import rank
from polarctl.storage import checkpoint

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_HINT = f"{', '.join(STAGES)}, or the path of a JSON file"
_TAG = "zero"  # DeepSpeed's name for one saved state, a folder inside ours


def accelerator(config: dict[str, Any], *, cpu: bool) -> accelerate.Accelerator:
    """The accelerator of a run with DeepSpeed, alone or under torchrun.

    Args:
        config: What `config_of` gave.
        cpu: Stay on the CPU even where there is a GPU.

    Raises:
        MissingError: DeepSpeed is not installed.
    """
    backend = join(cpu=cpu)
    boss = accelerate.Accelerator(
        # `cpu=True` would switch DeepSpeed off; the backend is what keeps it on the CPU.
        cpu=False,
        mixed_precision="no",  # the config says it
        deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False),
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(backend=backend)],
    )
    # Told of zero3, transformers would make models without weights until the engine is there. Ours
    # are made whole and cut up by the engine: a new head and the probe of `Packed` need weights.
    unset_hf_deepspeed_config()
    return boss


def join(*, cpu: bool) -> str:
    """Load DeepSpeed and join the processes of the run; the name of what they talk by.

    Args:
        cpu: Stay on the CPU even where there is a GPU.

    Raises:
        MissingError: DeepSpeed is not installed.
    """
    if cpu:  # both are read once, at the first use
        os.environ["DS_ACCELERATOR"] = os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    _import_quietly()
    backend = "gloo" if cpu else "nccl"
    _join(backend)
    return backend


def ready_for_a_trainer(*, cpu: bool) -> None:
    """Join the processes, and tell accelerate how: transformers' trainer cannot say it for a CPU.

    Args:
        cpu: Stay on the CPU even where there is a GPU.

    Raises:
        MissingError: DeepSpeed is not installed.
    """
    backend = join(cpu=cpu)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate.PartialState(backend=backend)


def whole(module: nn.Module) -> AbstractContextManager[Any]:
    """Have the weights of a module whole on every process; all of them call it."""
    weights = list(module.parameters())
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(weights)


def _import_quietly() -> None:
    """Import DeepSpeed; what it logs goes to stderr, from warnings on."""
    try:
        import deepspeed
    except ImportError:
        raise need("deepspeed", "deepspeed") from None
    except Exception as error:  # it looks for CUDA's compiler, reads the environment, ...
        raise MissingError(
            f"DeepSpeed cannot be loaded ({error})", hint="pip install 'polarctl[deepspeed]'"
        ) from error
    logger = deepspeed.utils.logger
    logger.setLevel("WARNING")
    for handler in logger.handlers:
        handler.setStream(sys.stderr)  # stdout carries records
    # Every step warns of the collectives' names that DeepSpeed uses.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated")


def _join(backend: str) -> None:
    """Join the processes of torchrun, or be the only one."""
    import deepspeed

    if backend == "gloo":
        # DeepSpeed would compile an operator for AutoTP's inference: a minute, with g++, under a
        # lock that a killed run leaves behind. Training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not rank.is_one_of_several():
        os.environ["LOCAL_RANK"] = "0"  # the engine asks for it
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _hushed() -> AbstractContextManager[Any]:
    """Drop what DeepSpeed prints: progress of its own set-up, on stdout, where records go."""
    return redirect_stdout(io.StringIO())


class ZeroEngine:
    """A module and its optimiser in the hands of DeepSpeed; see `polarctl.training.engine`.

    Args:
        accelerator: What `accelerator` gave.
        module: What to train: whole, on every process with the same weights.
        optimizer: Of its trainable parameters.

    Raises:
        UsageError: DeepSpeed refuses the config.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
    ):
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.accelerator = accelerator
        try:
            with _hushed():
                self.module, _ = accelerator.prepare(module, optimizer)
        except (DeepSpeedConfigError, ValueError, AssertionError) as error:
            text = " ".join(str(error).split())[:200].rstrip(".")
            raise UsageError(f"DeepSpeed refuses its config: {text}") from error

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient."""
        # How many micro-batches a step has is known only now, so the boundary is set by hand.
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Nothing to arrange: DeepSpeed is told at the backward pass."""
        return nullcontext()

    def finish(self, lr: float) -> float:
        """Clip the gradient, step, clear; the norm, inf when DeepSpeed has refused to step."""
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        """Write what a resume needs; every process its own files."""
        with _hushed():
            self.module.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        if self.accelerator.is_main_process:
            for script in folder.glob("zero_to_*.py"):  # DeepSpeed's, to make weights of it
                script.unlink()
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote.

        Raises:
            UsageError: Another number of processes wrote it.
            PolarctlError: There is nothing that can be loaded, or more than data in it.
        """
        processes = len(list((folder / _TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        if processes and processes != self.accelerator.num_processes:
            raise UsageError(
                f"{folder}: saved by {processes} processes, and here are "
                f"{self.accelerator.num_processes}",
                hint="ZeRO resumes with the same number of processes",
            )
        with checkpoint.data_only(folder), _hushed():
            found = processes and self.module.load_checkpoint(str(folder), tag=_TAG)[0]
        if not found:
            raise PolarctlError(f"{folder}: no state of DeepSpeed there")

    @torch.no_grad()
    def weights(self, part: nn.Module | None = None) -> dict[str, Tensor] | None:
        """All weights, whole and in float32, on the first process; None on the others."""
        states = (self.module.module if part is None else part).state_dict(keep_vars=True)
        found: dict[str, Tensor] = {}
        for name, value in states.items():
            whole = _whole(value) if isinstance(value, nn.Parameter) else value  # or a buffer
            if self.accelerator.is_main_process:
                found[name] = whole.detach().to("cpu", copy=True)
        return found if self.accelerator.is_main_process else None

    def close(self) -> None:
        """Give back the engine and accelerate's state, so that this process can train again.

        The process group stays: there is one for as long as the processes live.
        """
        self.accelerator.free_memory()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        ours = ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_TORCH_DEVICE"]
        for name in ours + ([] if rank.is_one_of_several() else ["LOCAL_RANK"]):
            os.environ.pop(name, None)


def _whole(parameter: nn.Parameter) -> Tensor:
    """A parameter in float32, put together from all processes; all of them call it."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    full: Tensor | None = safe_get_full_fp32_param(parameter)
    if full is not None:
        return full
    with GatheredParameters([parameter]):  # frozen: the optimiser has no copy of it
        return parameter.detach().float().clone()


# -- DeepSpeed's config: one of ours by name, or a user's file that must not disagree with the run -


def config_of(name: str, *, dtype: str, clip: float) -> dict[str, Any]:
    """The config of a run.

    Args:
        name: `zero1`, `zero2`, `zero3` or the path of a JSON file. What the file leaves out or
            calls "auto" is ours to fill or DeepSpeed's default.
        dtype: `float32` or `bfloat16`.
        clip: Largest gradient norm.

    Raises:
        UsageError: No such config, or one that disagrees with the run.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"`{dtype}` does not train with ZeRO", hint="float32 or bfloat16")
    half = dtype == "bfloat16"
    ours: dict[str, Any] = {
        # A formality: DeepSpeed counts samples with it. The loop says where a step ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "bf16": {"enabled": half},
        "fp16": {"enabled": False},
    }
    if name in STAGES:
        extra: dict[str, Any] = {"zero_optimization": {"stage": STAGES[name]}}
        if half:  # else gradients of many micro-batches and processes are summed with 8 bits
            extra["data_types"] = {"grad_accum_dtype": "fp32"}
            extra["communication_data_type"] = "fp32"
        return ours | extra
    given = _read(name)
    _agree(name, given, ours)
    merged: dict[str, Any] = _without_auto(given)
    for key, value in ours.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def _read(path: str) -> dict[str, Any]:
    try:
        found = orjson.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such DeepSpeed config", hint=_HINT) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a DeepSpeed config: {error}", hint=_HINT) from None
    zero = found.get("zero_optimization") if isinstance(found, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in STAGES.values():
        raise UsageError(
            f"{path}: `zero_optimization.stage` has to be 1, 2 or 3", hint="leave DeepSpeed out"
        )
    return dict(found)


def _agree(path: str, given: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse what would change the loss, the step or what a log says of them."""
    wanted = {
        "train_batch_size": None,  # pairs, which DeepSpeed does not see
        **{k: v for k, v in ours.items() if not isinstance(v, dict)},
        "bf16.enabled": ours["bf16"]["enabled"],
        "fp16.enabled": False,
        "bf16.check_grad_overflow": True,  # what keeps NaN out of the weights
        "optimizer": None,
        "scheduler": None,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "sequence_parallel_size": 1,
        "tensor_parallel": None,
        "zero_optimization.compute_grad_norm": True,
    }
    for key, value in wanted.items():
        section, _, leaf = key.rpartition(".")
        found = given.get(section, {}) if section else given
        if not isinstance(found, dict):
            raise UsageError(f"{path}: `{section}` is not an object")
        if leaf in found and found[leaf] not in ("auto", value):
            raise UsageError(
                f"{path}: `{key}` disagrees with the run"
                + ("" if value is None else f", which has {value}"),
                hint=f'leave `{key}` out or set it to "auto": the command line decides it',
            )


def _without_auto(value: Any) -> Any:
    """A config without its "auto" entries."""
    if not isinstance(value, dict):
        return value
    return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
