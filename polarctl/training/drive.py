"""What goes on around the steps: metrics, progress, validation, checkpoints, the stop signal."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson
import torch

from polarctl import console
from polarctl.config import resolved
from polarctl.storage import run_folder
from polarctl.training import flops, state
from polarctl.training.batches import Candidates
from polarctl.training.loop import NotFinite, StepLog, Trainer
from polarctl.training.options import TrainConfig
from polarctl.training.progress import Meter, Trackers


@dataclass(kw_only=True)
class Drive:
    """A run from its newest checkpoint to its end.

    Attributes:
        stage: Name of the stage.
        config: Its options.
        trainer: Takes the steps.
        run: The output folder.
        stream: Begins this process's stream of groups at the trainer's step.
        held_out: This process's share of the validation groups; empty: no validation.
        parameters: Weights of the model, without its input embedding.
        half: Computing in bfloat16.
        write: Writes the model into a folder; every process calls it.
        best: Lowest validation loss so far, or None.
    """

    stage: str
    config: TrainConfig
    trainer: Trainer
    run: run_folder.Run
    stream: Callable[[], Iterator[Candidates]]
    held_out: Sequence[Candidates]
    parameters: int
    half: bool
    write: Callable[[Path], None]
    best: float | None = None

    def to_the_end(self) -> dict[str, Any]:
        """Train, watch and save; the last step's numbers.

        Raises:
            Interrupted: SIGTERM or Ctrl-C; the state is saved.
            NotFinite: A loss or gradient is not finite.
        """
        first = self.trainer.engine.accelerator.is_main_process
        path = self.run.folder / run_folder.METRICS
        kept = run_folder.keep_lines(path, self.trainer.step) if first else b""
        last = orjson.loads(kept) if kept else {}
        trackers = self._trackers() if first else None
        meter = self._meter()
        stop = run_folder.StopFlag()
        steps = self.trainer.plan.steps
        with (
            open(path if first else os.devnull, "ab") as log,
            stop,
            console.progress(self.stage, steps, "steps") as bar,
        ):
            try:
                for entry in self.trainer.train(self.stream()):
                    last = {**dataclasses.asdict(entry), **self._validated(entry)}
                    log.write(orjson.dumps(last) + b"\n")
                    meter.update(entry.step, steps, entry.tokens, entry.computed)
                    bar.update(entry.step, meter.line(entry.loss, entry.accuracy))
                    if trackers is not None:
                        trackers.log(entry.step, {**last, **meter.rates()})
                    self._save_or_stop(entry, log, self._agreed(stop))
            except NotFinite as error:
                log.write(orjson.dumps(error.figures) + b"\n")
                raise
            finally:
                if trackers is not None:
                    trackers.close()
        return {f"last_{key}": value for key, value in last.items()} | meter.summary()

    def _validated(self, entry: StepLog) -> dict[str, float]:
        """Loss and accuracy on the held-out groups, when it is time; the best model is kept."""
        every = self.config.val_steps or self.config.save_steps
        due = entry.step % every == 0 or entry.step == self.trainer.plan.steps
        if not self.held_out or not due:
            return {}
        loss, accuracy = self.trainer.evaluate(self.held_out)
        console.note(f"step {entry.step:,}: held out: loss {loss:.4f}, accuracy {accuracy:.3f}")
        if self.best is None or loss < self.best:
            self.best = loss
            self._keep_best()
        return {"val_loss": loss, "val_accuracy": accuracy}

    def _keep_best(self) -> None:
        """Write the model beside the last one, whole or not at all."""
        half_written = self.run.checkpoints / run_folder.BEST
        accelerator = self.trainer.engine.accelerator
        if accelerator.is_main_process:
            shutil.rmtree(half_written, ignore_errors=True)
            half_written.mkdir()
        accelerator.wait_for_everyone()
        self.write(half_written)
        if accelerator.is_main_process:
            target = self.run.folder / run_folder.BEST
            shutil.rmtree(target, ignore_errors=True)
            os.replace(half_written, target)
        accelerator.wait_for_everyone()

    def _agreed(self, stop: run_folder.StopFlag) -> int:
        """The signal that asks this run to stop, or 0."""
        accelerator = self.trainer.engine.accelerator
        several = accelerator.num_processes > 1
        return stop.agreed(accelerator.reduce if several else None, accelerator.device)

    def _save_or_stop(self, entry: StepLog, log: IO[bytes], asked: int) -> None:
        if asked or entry.step % self.config.save_steps == 0:
            log.flush()
            if self.trainer.engine.accelerator.is_main_process:
                os.fsync(log.fileno())
            state.save(self.run.checkpoints, self.trainer, self.run.identity, best=self.best)
        if asked:
            raise run_folder.stopped(asked, entry.step, self.trainer.plan.steps)

    def _meter(self) -> Meter:
        accelerator = self.trainer.engine.accelerator
        peak = None
        if accelerator.device.type == "cuda":
            name = torch.cuda.get_device_name(accelerator.device)
            peak = flops.peak(name, half=self.half)
        total = None if peak is None else peak * accelerator.num_processes
        return Meter(parameters=self.parameters, peak=total)

    def _trackers(self) -> Trackers | None:
        if not self.config.report_to:
            return None
        given = {key: value for key, value in resolved(self.config).items() if value is not None}
        name = f"{self.stage}-{self.run.target.name}"
        return Trackers(self.config.report_to, self.run.folder, given, run_name=name)
