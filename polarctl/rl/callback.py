"""A GRPO run and what watches its trainer: records, checkpoint marks, signals, broken losses."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
import transformers

from polarctl import console, seeding
from polarctl.errors import PolarctlError, UsageError
from polarctl.model.template import content_text
from polarctl.parallel import rank, stopping
from polarctl.policies.pool import Policy
from polarctl.rl.rollouts import Rollout, record_of, step_entry
from polarctl.storage import checkpoint, run_folder


def check_shape(config: Any) -> None:
    """Raise UsageError for batch sizes that do not divide."""
    processes = rank.count()
    micro = (config.micro_batch_size or max(1, config.batch_size // processes)) * processes
    for part, what in (
        (config.num_generations, f"`--num-generations {config.num_generations}`"),
        (micro, f"{micro} rollouts at a time (`--micro-batch-size` on {processes} processes)"),
    ):
        if config.batch_size % part:
            raise UsageError(
                f"`--batch-size {config.batch_size}` is not a multiple of {what}",
                hint=f"--batch-size {math.ceil(config.batch_size / part) * part}",
            )


@dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """A training run.

    Attributes:
        config: The options of `polarctl rft`.
        run: Folder, records and identity.
        rows: For each record: `prompt` (messages or text), `reference`, `wrapper`.
        policy: What to train.
        tokenizer: Its tokenizer, which is saved with it.
        thinking_opened: Prompts end in `<think>`.
    """

    config: Any
    run: run_folder.Run
    rows: list[dict[str, Any]]
    policy: Policy
    tokenizer: Any
    thinking_opened: bool = False

    @property
    def prompts_per_step(self) -> int:
        """Different prompts of one optimiser step."""
        return int(self.config.batch_size // self.config.num_generations)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.config.max_steps is not None:
            return int(self.config.max_steps)
        return max(1, math.ceil(len(self.rows) * self.config.epochs / self.prompts_per_step))

    def order(self) -> list[int]:
        """Rows of all steps, one after another: a new shuffle for each epoch."""
        total, found = self.steps * self.prompts_per_step, list[int]()
        for epoch in range(math.ceil(total / len(self.rows))):
            rows = list(range(len(self.rows)))
            seeding.rng(self.config.seed, "epoch", epoch).shuffle(rows)
            found += rows
        return found[:total]


class Recorder(transformers.TrainerCallback):
    """Writes what each step did, marks checkpoints, and stops at a signal or at a broken loss."""

    trainer: Any = None

    def __init__(self, job: PolicyRun):
        self.job = job
        self.stop = stopping.StopFlag()
        self.stopped_by = 0
        self.warned = False

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Have the files open, cut back to what they were after a step."""
        run, total = self.job.run, self.job.steps
        if not rank.is_first():
            with self.stop:
                yield
            return
        paths = [run.folder / name for name in (run_folder.METRICS, run_folder.ROLLOUTS)]
        for path, lines in zip(paths, (step, step * self.job.config.batch_size), strict=True):
            run_folder.keep_lines(path, lines)
        bar = console.progress("rft", total, "steps")
        with open(paths[0], "ab") as self.metrics, open(paths[1], "ab") as self.rollouts:
            with self.stop, bar as self.bar:
                yield

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the step's rollouts and numbers."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        seen = self._rollouts()
        entry = step_entry(state.global_step, seen, logs)
        self.metrics.write(orjson.dumps(entry) + b"\n")
        for one in seen:
            record = record_of(
                one,
                self.job.run.records[one.row],
                step=state.global_step,
                policy=self.job.policy.name,
                wrapper=self.job.rows[one.row]["wrapper"],
            )
            self.rollouts.write(orjson.dumps(record) + b"\n")
        if entry["floored"] == 1 and not self.warned:
            self.warned = True
            console.warn(
                f"step {state.global_step}: no rollout has an answer, all got the reward floor and "
                "nothing is learned from them: more --max-new-tokens, or --reward-floor none"
            )
        # A half-precision scaler meets infinite gradients as a matter of course and skips them.
        watched = ("loss",) if args.fp16 else ("loss", "grad_norm")
        if not all(math.isfinite(logs.get(name, 0.0)) for name in watched):
            raise PolarctlError(
                f"step {state.global_step}: loss {logs['loss']}, gradient norm "
                f"{logs.get('grad_norm')}: not finite, stopped",
                hint="a lower --lr, or --dtype float32",
            )
        text = f"reward {entry['reward']:.3f}"
        self.bar.update(
            state.global_step, text + (f" kl {entry['kl']:.4f}" if "kl" in entry else "")
        )

    def _rollouts(self) -> list[Rollout]:
        logs = self.trainer._logs  # of all processes; TRL offers no other way to the advantages
        extra = logs["extra"]
        columns = zip(
            extra["row"],
            logs["completion"],
            extra["tokens"],
            extra["ended"],
            extra["raw"],
            extra["used"],
            logs["advantages"],
            extra["floored"],
            extra["components"],
            strict=True,
        )
        group = self.job.config.num_generations
        return [
            Rollout(row, number % group, content_text(text), *rest)
            for number, (row, text, *rest) in enumerate(columns)
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop when asked to; save nothing at the end, where the policy is written."""
        accelerator = self.trainer.accelerator
        several = accelerator.num_processes > 1
        asked = self.stop.agreed(accelerator.reduce if several else None, args.device)
        if state.global_step >= self.job.steps:
            control.should_save = False
        elif asked:
            self.stopped_by = asked
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as whole, once all that was written before it is durable."""
        if not state.is_world_process_zero:
            return
        for stream in (self.metrics, self.rollouts):
            stream.flush()
            os.fsync(stream.fileno())
        run, step = self.job.run, state.global_step
        checkpoint.commit(run.checkpoints / f"checkpoint-{step}", step, run.identity)
