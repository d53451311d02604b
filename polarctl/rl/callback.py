"""A run and what watches its trainer: records, checkpoint marks, signals, broken losses."""

from __future__ import annotations

import functools
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import torch
import transformers
from accelerate.utils import gather_object

from polarctl import console, seeding
from polarctl.errors import PolarctlError, UsageError
from polarctl.model.template import content_text
from polarctl.parallel import rank, stopping
from polarctl.policies.pool import Policy
from polarctl.rl.check import Check, alarms
from polarctl.rl.rollouts import Rollout, numbers_of, record_of, step_entry
from polarctl.storage import checkpoint, run_folder


def check_shape(config: Any) -> None:
    """Raise UsageError for batch sizes that do not divide."""
    processes, group = rank.count(), config.num_generations
    # A step of `sft` learns from one reference where the others sample a group.
    one = group if config.method == "sft" else 1
    texts = config.batch_size // one
    micro = (config.micro_batch_size or max(1, texts // processes)) * processes
    at_a_time = f"{micro} rollouts"
    if one > 1:
        at_a_time = f"`--num-generations {group}` x {micro} references"
    for part, what in (
        (group, f"`--num-generations {group}`"),
        (micro * one, f"{at_a_time} at a time (`--micro-batch-size` on {processes} processes)"),
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
        check: Looks at the policy on held-out prompts.
    """

    config: Any
    run: run_folder.Run
    rows: list[dict[str, Any]]
    policy: Policy
    tokenizer: Any
    thinking_opened: bool = False
    check: Check | None = None

    @property
    def samples(self) -> bool:
        """The policy writes rollouts, which are scored."""
        return bool(self.config.method != "sft")

    @property
    def texts_per_step(self) -> int:
        """Rollouts of one optimiser step, or references."""
        return int(self.config.batch_size) if self.samples else self.prompts_per_step

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
        self.clock = stopping.SaveClock(job.config.save_minutes)
        self.stopped_by = 0
        self.warned = False
        self.failed = False
        self.before: dict[str, Any] = {}
        self.entries: list[dict[str, Any]] = []

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Have the files open, cut back to what they were after a step."""
        run, total = self.job.run, self.job.steps
        self.entries = run_folder.first_lines(run.folder / run_folder.METRICS, step)
        if self.job.check is not None:
            self.job.check.resume(self.entries)
        if not rank.is_first():
            with self.stop:
                yield
            return
        metrics, rollouts = (run.folder / n for n in (run_folder.METRICS, run_folder.ROLLOUTS))
        run_folder.keep_lines(metrics, step)
        if self.job.samples:
            run_folder.keep_lines(rollouts, step * self.job.config.batch_size)
        bar = console.progress("rft", total, "steps")
        kept = rollouts if self.job.samples else os.devnull
        with open(metrics, "ab") as self.metrics, open(kept, "ab") as self.rollouts:
            with self.stop, bar as self.bar:
                yield

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the step's rollouts and numbers."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        seen = self._rollouts() if self.job.samples else []
        entry = {"step": state.global_step, **numbers_of(logs)}
        if seen:
            entry = step_entry(state.global_step, seen, logs)
        self._watch(entry)
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
        if entry.get("floored") == 1 and not self.warned:
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
        text = f"reward {entry['reward']:.3f}" if seen else f"loss {entry['loss']:.4f}"
        self.bar.update(
            state.global_step, text + (f" kl {entry['kl']:.4f}" if "kl" in entry else "")
        )

    def _watch(self, entry: dict[str, Any]) -> None:
        """Add what the check found, and raise the alarm where the reward is exploited."""
        check, window = self.job.check, self.job.config.check_steps
        if check is not None:
            entry |= check.entry(entry["step"])
        before = [set(e["alarms"]) for e in self.entries if "alarms" in e]
        self.entries.append(entry)
        if entry["step"] % window and "check" not in entry:
            return
        found = alarms(self.entries, window, len(check.records) if check else 0)
        entry["alarms"] = sorted(found)
        for name, text in found.items():
            if not before or name not in before[-1]:
                console.warn(f"step {entry['step']}: {text}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the policy that the run starts from."""
        if self.job.check is not None and state.global_step == 0:
            self.job.check.look(self.trainer, 0)

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
        found = [
            Rollout(row, number % group, content_text(text), *rest)
            for number, (row, text, *rest) in enumerate(columns)
        ]
        if self.job.check is None:
            return found
        records = [self.job.run.records[one.row] for one in found]
        values = self.job.check.judged(records, [one.output for one in found])
        return [replace(one, check=v) for one, v in zip(found, values, strict=True)]

    @property
    def early(self) -> bool:
        """Whether the check has ended the run before its last step."""
        return self.job.check is not None and self.job.check.over

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop when asked to; save nothing at the end, where the policy is written."""
        accelerator = self.trainer.accelerator
        several = accelerator.num_processes > 1
        add = accelerator.reduce if several else None
        asked, save = self.stop.agreed(self.clock, add, args.device)
        control.should_save |= save
        check = self.job.check
        if check is not None and check.due(state.global_step, self.job.steps):
            check.look(self.trainer, state.global_step)
        if state.global_step >= self.job.steps or self.early:
            control.should_save = False
            control.should_training_stop |= self.early
        elif asked:
            self.stopped_by = asked
            control.should_save = control.should_training_stop = True
        self.before = _state_of(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as whole, once all that was written before it is durable."""
        self.clock.restart()
        if not state.is_world_process_zero:
            return
        for stream in (self.metrics, self.rollouts):
            stream.flush()
            if stream.name != os.devnull:
                os.fsync(stream.fileno())
        run, step = self.job.run, state.global_step
        checkpoint.commit(run.checkpoints / f"checkpoint-{step}", step, run.identity)
        if self.job.check is not None:
            self.job.check.forget()

    def guarded(self, reward: Callable[..., Any]) -> Callable[..., Any]:
        """A reward function that fails in all processes when it fails in one.

        What was done until then can so be saved by all of them together.
        """

        @functools.wraps(reward)
        def call(**given: Any) -> Any:
            try:
                found, error = reward(**given), None
            except PolarctlError as caught:
                found, error = None, caught
            fault = error
            if self.trainer.accelerator.num_processes > 1:
                faults = gather_object([error])
                fault = next((one for one in faults if one is not None), None)
            if fault is not None:
                self.failed = True
                raise error or fault
            return found

        return call

    def keep_if_failed(self) -> None:
        """Save the steps that were done when the reward failed, as after the last of them."""
        trainer, before = self.trainer, self.before
        if not self.failed or not before:
            return  # no step was done since the last checkpoint
        step = trainer.state.global_step
        if (self.job.run.checkpoints / f"checkpoint-{step}" / checkpoint.MARK).exists():
            return
        # The failed step has sampled and counted already.
        trainer.state.num_input_tokens_seen = before["tokens"]
        random.setstate(before["python"])
        np.random.set_state(before["numpy"])
        torch.set_rng_state(before["torch"])
        if before["cuda"]:
            torch.cuda.set_rng_state_all(before["cuda"])
        trainer._save_checkpoint(trainer.model, trial=None)
        self.on_save(trainer.args, trainer.state, trainer.control)


def _state_of(state: Any) -> dict[str, Any]:
    """What a step changes beside the weights: the generators and the count of tokens."""
    return {
        "tokens": state.num_input_tokens_seen,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
