"""The training loop of the reward model, for pre-training and fine-tuning alike.

One optimiser step takes a global batch of groups, whatever the number of processes and however it
is cut into forward passes: the loss is the sum over groups divided by the groups of the whole
batch. The order of the data and every random choice follow from the seed and the step alone, so
weights, optimiser and step number are the whole state of a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polarctl import seeding
from polarctl.errors import PolarctlError
from polarctl.model.forward import Packed, Padded
from polarctl.training.batches import Candidates, Micro, idle, micro_batches, terms
from polarctl.training.engine import Engine
from polarctl.training.losses import Loss


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """How to train. The defaults of betas, decay, clip, warm-up and floor are the paper's.

    Attributes:
        lr: Peak learning rate.
        batch_size: Groups of one optimiser step, over all processes.
        steps: Optimiser steps.
        warmup: Share of the steps with a rising rate.
        min_lr_ratio: Final learning rate as a share of the peak (cosine).
        clip: Largest gradient norm.
        betas: AdamW's.
        weight_decay: AdamW's.
        batch_tokens: Tokens of one forward pass at most, padding included.
        shared: Share prefixes where the model allows it, else pad whole sequences.
        loss: The loss of a pair.
        seed: Seed of the data's order and of dropout.
    """

    lr: float
    batch_size: int
    steps: int
    warmup: float = 0.03
    min_lr_ratio: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    batch_tokens: int = 4096
    shared: bool = True
    loss: Loss = Loss()
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then cosine to the floor."""
        warm = max(1, math.ceil(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        floor = self.lr * self.min_lr_ratio
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class StepLog:
    """What one optimiser step saw.

    `loss`, `accuracy` and `margin` (of rewards) are means over its groups. `tokens` are those of
    all candidates as whole sequences; `computed` went through the model.
    """

    step: int
    loss: float
    accuracy: float
    margin: float
    lr: float
    grad_norm: float
    pairs: int
    tokens: int
    computed: int


class NotFinite(PolarctlError):
    """A loss or gradient is not finite; the weights are those of the step before.

    Args:
        step: The step that was not taken.
        loss: Its mean loss.
        norm: Norm of its gradient, or None when the loss alone was seen.
    """

    def __init__(self, step: int, loss: float, norm: float | None):
        super().__init__(
            f"step {step}: loss {loss}"
            + ("" if norm is None else f", gradient norm {norm}")
            + ": not finite, stopped",
            hint="a lower --lr, or --dtype float32; the last checkpoint is kept",
        )
        # JSON has no such numbers: as text they stay what they were.
        self.figures = {"step": step, "loss": str(loss), "grad_norm": str(norm)}


def steps_of(triples: int, epochs: float, batch_size: int) -> int:
    """Optimiser steps of so many passes; the last batch is filled up from the next pass."""
    return max(1, math.ceil(triples * epochs / batch_size))


def share_before(step: int, batch_size: int, processes: int, rank: int) -> int:
    """Groups that a process has used before a step: those at positions p % processes == rank."""
    return max(0, -(-(step * batch_size - rank) // processes))


class Trainer:
    """A model in training and the number of steps done.

    Args:
        engine: Holds the model and takes the steps.
        plan: How to train.
        pad_id: Token id of the padding.

    Attributes:
        step: Steps done.
    """

    def __init__(self, engine: Engine, plan: Hyperparameters, pad_id: int):
        self.engine, self.plan, self.pad_id = engine, plan, pad_id
        self.step = 0
        self._module: Packed | Padded = engine.accelerator.unwrap_model(engine.module)

    @property
    def used(self) -> int:
        """Groups of this process's stream that earlier steps have used."""
        at = self.engine.accelerator
        return share_before(self.step, self.plan.batch_size, at.num_processes, at.process_index)

    def train(self, groups: Iterator[Candidates]) -> Iterator[StepLog]:
        """Do the remaining steps, one at a time.

        Args:
            groups: This process's stream, from `used` on.

        Raises:
            NotFinite: A loss or gradient is not finite; the model keeps its last good weights.
        """
        at = self.engine.accelerator
        self.engine.module.train()
        while self.step < self.plan.steps:
            torch.manual_seed(seeding.derive(self.plan.seed, "step", self.step))
            begin, self.step = self.used, self.step + 1
            mine = list(itertools.islice(groups, self.used - begin))
            yield self._step(mine, at.num_processes)

    def _step(self, groups: list[Candidates], processes: int) -> StepLog:
        engine, plan = self.engine, self.plan
        micros = self._cut(groups)
        # Sums over groups: loss, ranked right, margin; then tokens, computed. Shape: (5,)
        sums = torch.zeros(5, dtype=torch.float64, device=engine.accelerator.device)
        for number, micro in enumerate(micros):
            last = number == len(micros) - 1
            with engine.exchanging(last):
                found = terms(plan.loss, self._rewards(micro), micro.groups)
                sums[:3] += found.figures * micro.weight
                sums[4] += micro.computed * micro.weight
                if last:  # before the backward pass: NaN must not reach the weights
                    sums[3] = sum(len(ids) for group in groups for ids in group.ids)
                    loss, right, margin, tokens, computed = self._summed(sums)
                    self._finite(loss / plan.batch_size, None)
                # The mean over processes that is taken there becomes a sum over all groups.
                scale = micro.weight * processes / plan.batch_size
                engine.backward(found.loss * scale, last)
        rate = plan.rate(self.step - 1)
        norm = engine.finish(rate)
        self._finite(loss / plan.batch_size, norm)
        size = plan.batch_size
        return StepLog(
            self.step,
            loss / size,
            right / size,
            margin / size,
            rate,
            norm,
            size,
            int(tokens),
            int(computed),
        )

    def _cut(self, groups: Sequence[Candidates]) -> list[Micro]:
        """Micro-batches of a share, as many on every process, which exchange gradients."""
        options: dict[str, Any] = {
            "shared": isinstance(self._module, Packed),
            "pad_id": self.pad_id,
            "kind": self._module.kind,
        }
        micros = micro_batches(groups, self.plan.batch_tokens, **options)
        accelerator = self.engine.accelerator
        if accelerator.num_processes > 1:
            count = torch.tensor([len(micros)], device=accelerator.device)
            most = int(accelerator.gather(count).max())
            micros += [idle(groups, **options)] * (most - len(micros))
        return micros

    def _rewards(self, micro: Micro) -> Tensor:
        rewards: Tensor = self.engine.module(*micro.inputs(self.engine.accelerator.device))
        return rewards.flatten()

    def _summed(self, sums: Tensor) -> list[float]:
        """Sums over all processes."""
        total: Tensor = self.engine.accelerator.reduce(sums)
        return total.tolist()

    def _finite(self, loss: float, norm: float | None) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm or 0.0)):
            raise NotFinite(self.step, loss, norm)

    @torch.no_grad()
    def evaluate(self, groups: Sequence[Candidates]) -> tuple[float, float]:
        """Mean loss and accuracy over all processes' groups.

        Args:
            groups: This process's share, not empty.
        """
        self.engine.module.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.accelerator.device)
        for micro in self._cut(groups):
            found = terms(self.plan.loss, self._rewards(micro), micro.groups)
            sums[:3] += found.figures * micro.weight
        sums[3] = len(groups)
        self.engine.module.train()
        loss, right, _, count = self._summed(sums)
        return loss / count, right / count
