"""How a step is taken: by one optimiser on whole weights, or by DeepSpeed on shards of them."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, Protocol

import accelerate
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Engine(Protocol):
    """How the loop takes a step, whoever holds weights, gradients and optimiser.

    Attributes:
        accelerator: Knows devices and processes.
        module: What the loop calls; forwards to the module it trains.
    """

    accelerator: accelerate.Accelerator
    module: Any

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; `last` as in `backward`."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; processes exchange theirs by the step's last one.

        Args:
            loss: The share of the micro-batch in the step's loss, times the processes.
            last: Whether it is the step's last micro-batch, on every process.
        """

    def finish(self, lr: float) -> float:
        """Clip the gradient, step, clear. A norm that is not finite leaves the weights alone.

        Args:
            lr: Learning rate of this step.

        Returns:
            The gradient's norm before clipping, the same on all processes; not finite when a
            gradient is not.
        """

    def save(self, folder: Path) -> None:
        """Write what a resume needs. Every process calls it; it returns when all are done."""

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote; before the first step."""

    def weights(self, part: nn.Module | None = None) -> dict[str, Tensor] | None:
        """All weights, whole and in float32, on the first process; None on the others.

        Every process calls it.

        Args:
            part: A part of the trained module whose own names to use; default: all of it.
        """


class PlainEngine:
    """Every process holds all weights and the whole state of AdamW.

    A checkpoint holds the weights that are trained (all of them, but for LoRA) and the optimiser.

    Args:
        accelerator: Knows devices, processes and mixed precision.
        module: What to train, the same on every process.
        optimizer: Of its trainable parameters.
        clip: Largest norm of the gradient.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float,
    ):
        self.accelerator, self.clip, self._own = accelerator, clip, module
        self.module, self.optimizer = accelerator.prepare(module, optimizer)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._own.named_parameters() if p.requires_grad}

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient."""
        # The exchange is armed at the forward pass already: see `exchanging`.
        self.accelerator.backward(loss)

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward: gradients are exchanged at the step's last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.module)

    def finish(self, lr: float) -> float:
        """Clip the gradient, step, clear; the norm."""
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.clip))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        """Write the trained weights and the optimiser's state; the first process does."""
        if self.accelerator.is_main_process:
            save_file(_copies(self._trained()), folder / "model.safetensors")
            moments = {
                f"{index}.{name}": value
                for index, state in self.optimizer.state_dict()["state"].items()
                for name, value in state.items()
            }
            save_file(_copies(moments), folder / "optimizer.safetensors")
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        saved = load_file(folder / "model.safetensors")
        trained = self._trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{folder}: holds other weights than the ones that are trained")
        with torch.no_grad():
            for name, value in saved.items():
                trained[name].copy_(value)
        state: dict[int, dict[str, Any]] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})

    def weights(self, part: nn.Module | None = None) -> dict[str, Tensor] | None:
        """All weights, on the first process; None on the others."""
        if not self.accelerator.is_main_process:
            return None
        return _copies((self._own if part is None else part).state_dict())


def _copies(tensors: Any) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
