"""The training loop of the reward model, for pre-training and fine-tuning alike.

One optimiser step takes a global batch of triples, whatever the number of processes and however it
is cut into forward passes: the loss is the sum over pairs divided by the pairs of the whole batch.
The order of the data and every random choice follow from the seed and the step alone, so weights,
optimiser and step number are the whole state of a run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import accelerate
import torch

from polarctl import seeding
from polarctl.errors import PolarctlError
from polarctl.losses import bradley_terry
from polarctl.model import RewardModel, pad, rewards
from polarctl.scoring import token_batches

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """How to train. The defaults of betas, decay, clip, warm-up and floor are the paper's.

    Attributes:
        lr: Peak learning rate.
        batch_size: Triples of one optimiser step, over all processes.
        epochs: Passes over the data; ignored when `max_steps` is given.
        max_steps: Optimiser steps, or None.
        warmup: Share of the steps with a rising rate.
        min_lr_ratio: Final learning rate as a share of the peak (cosine).
        clip: Largest gradient norm.
        betas: AdamW's.
        weight_decay: AdamW's.
        batch_tokens: Tokens of one forward pass at most, padding included.
        seed: Seed of the data's order.
    """

    lr: float
    batch_size: int
    epochs: float = 1.0
    max_steps: int | None = None
    warmup: float = 0.03
    min_lr_ratio: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    batch_tokens: int = 16384
    seed: int = 0

    def steps(self, triples: int) -> int:
        """Optimiser steps over so many triples."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(triples * self.epochs / self.batch_size))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then cosine to the floor."""
        warm = max(1, math.ceil(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        floor = self.lr * self.min_lr_ratio
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class StepLog:
    """What one optimiser step saw. `loss`, `accuracy` and `margin` are means over its pairs."""

    step: int
    loss: float
    accuracy: float
    margin: float
    lr: float
    grad_norm: float
    pairs: int
    tokens: int


def batch_indices(step: int, triples: int, plan: Hyperparameters) -> list[int]:
    """Indices of the triples of one step: consecutive pieces of a new shuffle for each epoch."""
    first = step * plan.batch_size
    result: list[int] = []
    for epoch in range(first // triples, (first + plan.batch_size - 1) // triples + 1):
        order = list(range(triples))
        seeding.rng(plan.seed, "epoch", epoch).shuffle(order)
        begin = max(0, first - epoch * triples)
        result += order[begin : first + plan.batch_size - epoch * triples]
    return result


class Trainer:
    """Model, optimiser and step number of a run.

    Args:
        reward_model: What to train, in place.
        plan: How.
        triples: Number of triples.
    """

    def __init__(self, reward_model: RewardModel, plan: Hyperparameters, triples: int):
        self.reward_model, self.plan = reward_model, plan
        self.steps = plan.steps(triples)
        self.step = 0
        self.accelerator = accelerate.Accelerator(cpu=reward_model.device.type == "cpu")
        optimizer = torch.optim.AdamW(
            reward_model.model.parameters(),
            lr=plan.lr,
            betas=plan.betas,
            weight_decay=plan.weight_decay,
        )
        self.model, self.optimizer = self.accelerator.prepare(reward_model.model, optimizer)

    def train(self, pairs: Sequence[Pair]) -> Iterator[StepLog]:
        """Do the remaining steps, one at a time.

        Args:
            pairs: Token ids of (reference, chosen) and (reference, rejected) of every triple.

        Raises:
            PolarctlError: A loss or gradient is not finite; the model keeps its last good weights.
        """
        self.model.train()
        while self.step < self.steps:
            torch.manual_seed(seeding.derive(self.plan.seed, "step", self.step))
            batch = [pairs[i] for i in batch_indices(self.step, len(pairs), self.plan)]
            yield self._step(batch)

    def _step(self, batch: list[Pair]) -> StepLog:
        accelerator, plan = self.accelerator, self.plan
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        lengths = [2 * max(map(len, pair)) for pair in mine]
        parts = list(token_batches(lengths, plan.batch_tokens))
        # Sums over pairs: loss, right ones, margin. Shape: (3,)
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        self.optimizer.zero_grad()
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            # Gradients are summed over processes once, with the last part.
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                chosen, rejected = self._rewards([mine[i] for i in part])
                losses = bradley_terry(chosen, rejected)
                # The mean over ranks that data parallelism takes becomes a sum over all pairs.
                scale = accelerator.num_processes / len(batch)
                accelerator.backward(losses.sum() * scale)
            margins = (chosen - rejected).detach().double()
            sums += torch.stack(
                [losses.detach().double().sum(), (margins > 0).sum(), margins.sum()]
            )
        loss, right, margin = (accelerator.reduce(sums) / len(batch)).tolist()
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), plan.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise PolarctlError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}: not finite, stopped",
                hint="a lower --lr, or --dtype float32",
            )
        rate = plan.rate(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        tokens = sum(len(side) for pair in batch for side in pair)
        return StepLog(self.step, loss, right, margin, rate, norm, len(batch), tokens)

    def _rewards(self, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards of the chosen and the rejected, both Shape: (B,)."""
        sequences = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        pad_id = self.reward_model.tokenizer.pad_token_id
        ids, mask = pad(sequences, pad_id, self.accelerator.device)
        values = rewards(self.model, ids, mask)
        return values[: len(pairs)], values[len(pairs) :]
