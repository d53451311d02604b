"""A run of `pretrain` or `finetune`, from top to bottom.

options ─> data ─> model ─> resume or start ─> steps, with saves and validation ─> finished folder
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from polarctl import console
from polarctl.config import resolved
from polarctl.errors import RecordError, UsageError
from polarctl.parallel import launcher, rank, stopping
from polarctl.records import Record, Triple, check
from polarctl.storage import atomic, checkpoint, run_folder, windows
from polarctl.storage import rejects as reject_file
from polarctl.training import data
from polarctl.training.options import TrainConfig

if TYPE_CHECKING:  # torch is loaded when the options are known to be good
    from polarctl.model.reward_model import PolarModel
    from polarctl.training.loop import Hyperparameters, StepLog, Trainer
    from polarctl.training.plan import Sample
    from polarctl.training.progress import Meter, Trackers
    from polarctl.training.setup import Place, Trained

# Where and how often, not what: these may differ at a resume.
_FREE = frozenset(
    "save_steps save_minutes device workers report_to gpus nnodes plan_for tokens_per_s".split()
)
_SOURCES = ("model", "init_from_config", "tokenizer")
T = TypeVar("T")


# From the lines of metrics.jsonl, the run's figures, a folder and a title to the files made there.
Draw = Callable[[list[dict[str, Any]], dict[str, Any], Path, str], list[str]]


def run(
    stage: str, config: TrainConfig, *, reference_field: str, max_response_length: int, draw: Draw
) -> None:
    """Train on the input and leave a checkpoint folder; print its path on stdout.

    Args:
        stage: Name of the stage.
        config: Its options.
        reference_field: The field that holds the reference.
        max_response_length: The stage's default, in tokens.
        draw: Makes pictures of the finished run (`polarctl.evaluation.course.draw`).

    Raises:
        UsageError: The folder is taken, or a resume does not fit.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
        NotFinite: A loss or a gradient is not finite.
    """
    if not config.dry_run and launcher.launch(
        stage, gpus=config.gpus, nnodes=config.nnodes, device=config.device, inputs=config.input
    ):
        return
    job = Job(stage, config, reference_field, max_response_length, draw)
    paths = windows.inputs_of(stage, config)
    if config.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            say_plan(prepare(job, data.on_disk(paths, Path(scratch))))
        return
    with run_folder.opened(stage, config, paths, sources=_SOURCES, free=_FREE) as folder:
        if folder is None:
            return  # complete already
        if rank.is_first():
            folder.checkpoints.mkdir(exist_ok=True)
        paths = data.on_disk(paths, folder.checkpoints)
        identity = {**folder.identity, "input_digest": run_folder.input_digest(paths)}
        folder = dataclasses.replace(folder, identity=identity)
        with reject_file.rejects_of(folder, config) as rejects:
            train(prepare(job, paths, rejects), folder)


@dataclass(frozen=True)
class Job:
    """What is asked for; the arguments of `run`."""

    stage: str
    config: TrainConfig
    reference_field: str
    response_length: int
    draw: Draw

    def verify(self, record: Record) -> None:
        """Raise RecordError for a record that does not fit; put the reference into its field."""
        if self.config.no_reference or self.config.chat:
            record["reference"] = ""
        elif self.reference_field != "reference":
            if self.reference_field not in record:
                raise RecordError(f"missing field `{self.reference_field}`")
            record["reference"] = record[self.reference_field]
        check(record, Triple)
        if record["chosen"] in (record["rejected"], *record.get("negatives", ())):
            raise RecordError("`chosen` and `rejected` are the same")


# -- before the first step -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Known:
    """Everything that is known before the first step.

    Attributes:
        job: What is asked for.
        place: Where it computes.
        source: The training data.
        survey: What one pass over it has found.
        sample: What a sample of its triples shows.
        reward_model: The model, its tokenizer and template.
        encode: From a triple to its token ids.
        parameters: Weights of the model.
        plan: How to train.
    """

    job: Job
    place: Place
    source: data.Source
    survey: data.Survey
    sample: Sample
    reward_model: PolarModel
    encode: data.TripleEncoder
    parameters: int
    plan: Hyperparameters

    @property
    def triples(self) -> int | None:
        """Training triples of one epoch, or None when they were not counted."""
        return self.survey.triples if self.survey.complete else None


def prepare(job: Job, paths: list[str], rejects: reject_file.Rejects | None = None) -> Known:
    """Check the options, look at the data, load the model, choose what was not given.

    Args:
        job: What is asked for.
        paths: The input, as files.
        rejects: Where bad rows go.

    Raises:
        UsageError: Options that do not work together, or with the data.
        MissingError: A model, device or package is not there.
        RecordError: A bad row, and no `rejects`; nothing to train on.
    """
    from polarctl.training import plan, progress, recipe, setup

    config = job.config
    recipe.loss_of(config)  # options first: the data may take hours
    progress.check_trackers(config.report_to)
    place = setup.place_of(config)
    world = _processes(config, place)
    source = data.Source(
        paths=paths,
        verify=job.verify,
        on_bad=rejects.reject if rejects is not None and config.rejects else None,
        limit=config.limit,
        val_fraction=config.val_fraction,
        seed=config.seed,
        window=config.shuffle_window,
    )
    # With --max-steps the beginning of the data is enough. But bad rows are set aside in one pass,
    # by one process, so --rejects needs all of it.
    counted = config.max_steps is None or bool(config.rejects) or config.dry_run
    survey = first_says(
        place.accelerator,
        lambda: data.survey(source, stop_after=None if counted else data.SAMPLE),
    )
    if rejects is not None:
        rejects.read()
    if config.val_fraction and len(survey.held_out_records) < world:
        raise UsageError(
            f"--val-fraction {config.val_fraction} holds out {len(survey.held_out_records)} "
            "triples",
            hint="a larger share, or 0",
        )
    reward_model = setup.reward_model_of(config, job.response_length)
    parameters = sum(p.numel() for p in reward_model.model.parameters())
    encode = data.TripleEncoder(reward_model.encoder, config.negatives)
    sample = plan.look([encode(record) for record in survey.sample], place.batch_tokens)
    plan.warn_of_cuts(sample, reward_model.encoder.limits)
    facts = recipe.Facts(
        parameters=parameters,
        triples=survey.triples if survey.complete else None,
        triple_tokens=sample.tokens,
        processes=world,
    )
    return Known(
        job=job,
        place=place,
        source=source,
        survey=survey,
        sample=sample,
        reward_model=reward_model,
        encode=encode,
        parameters=parameters,
        plan=recipe.resolve(job.stage, config, facts, place.batch_tokens),
    )


def say_plan(known: Known) -> None:
    """Say what the run would be."""
    from polarctl.training import plan
    from polarctl.training.memory import Model

    config, survey, made = known.job.config, known.survey, known.reward_model
    outline = plan.Outline(
        config=config,
        hyper=known.plan,
        sample=known.sample,
        triples=known.triples,
        model=Model.of(made.model, len(made.new_tokens)),
        processes=_processes(config, known.place),
        half=known.place.half,
        zero=known.place.zero,
        gpu=known.place.gpu,
    )
    console.note(
        f"{known.job.stage}: options and input are good: {survey.triples:,} triples"
        + (f", {survey.held_out:,} held out" if survey.held_out else "")
        + (f", {survey.bad:,} bad rows" if survey.bad else ""),
        config=resolved(config),
        records=survey.triples,
        bad=survey.bad,
        parameters=known.parameters,
        tokens_per_triple=known.sample.tokens,
        computed_per_triple=known.sample.computed,
        fill=known.sample.fill,
        steps=known.plan.steps,
        lr=known.plan.lr,
        batch_size=known.plan.batch_size,
        memory_bytes=outline.memory().total,
        hours=outline.hours,
    )
    for line in plan.lines(outline):
        console.note(f"  {line}")


def _processes(config: TrainConfig, place: Place) -> int:
    """Processes of the run; a plan may be made for some that are not there."""
    return max(place.accelerator.num_processes, config.gpus * config.nnodes)


def first_says(accelerator: Any, question: Callable[[], T]) -> T:
    """The answer that the first process finds, in all processes."""
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [question() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    found: T = answer[0]
    return found


# -- from the first step to the last ---------------------------------------------------------------


def train(known: Known, folder: run_folder.Run) -> None:
    """Resume or start, take the steps, finish the folder."""
    from polarctl.model import devices
    from polarctl.model.forward import Packed
    from polarctl.training import outcome, setup
    from polarctl.training.loop import Trainer

    job, plan, accelerator = known.job, known.plan, known.place.accelerator
    model = setup.trained(job.config, known.place, known.reward_model, plan)
    trainer = Trainer(model.engine, plan, known.reward_model.tokenizer.pad_token_id)
    best = _resume(folder, trainer)
    console.note(
        f"{job.stage}: "
        + (f"{known.triples:,} triples, " if known.triples else "")
        + f"{plan.steps:,} steps of {plan.batch_size:,}, {known.parameters:,} parameters, "
        + (f"{known.sample.saved:.0%}" if isinstance(model.module, Packed) else "none")
        + " of the tokens shared"
    )
    start = time.monotonic()
    with devices.threads_for(model.module):
        last = _steps(known, folder, model, trainer, best)
    console.note(
        f"{job.stage}: done after {trainer.step:,} steps in {time.monotonic() - start:.0f} s"
    )
    part = folder.part()
    setup.write(job.config, known.place, model, part, job.response_length)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        entries = outcome.read(folder.folder / run_folder.METRICS)
        found = outcome.figures(entries)
        drawn = job.draw(entries, found, part, f"{job.stage}: {folder.target.name}")
        counts = {
            "triples": known.survey.triples,
            "held_out": known.survey.held_out,
            "sampled": known.sample.triples,
            "sampled_cut": known.sample.cut["any"],
            # N of a scaling law, without the embedding: `polarctl eval scaling` reads it.
            "parameters": known.parameters,
            "scaling_parameters": _scaling_parameters(known),
            **last,
            **found,
        }
        folder.finish(job.stage, job.config, counts)
        trackers = job.config.report_to
        for line in outcome.lines(job.stage, folder.target, found, drawn, trackers):
            console.note(line)
    accelerator.end_training()


def _resume(folder: run_folder.Run, trainer: Trainer) -> float | None:
    """Go on from the newest whole checkpoint, if any; the lowest validation loss until then."""
    accelerator = trainer.engine.accelerator
    found = first_says(accelerator, lambda: checkpoint.newest(folder.checkpoints))
    if found is None:
        return None
    target, mark = found
    folder.same(mark["identity"])
    trainer.engine.load(target)
    trainer.step = mark["step"]
    console.note(f"{folder.target}: going on after step {trainer.step} of {trainer.plan.steps}")
    lowest: float | None = mark.get("best")
    return lowest


def _steps(
    known: Known, folder: run_folder.Run, model: Trained, trainer: Trainer, best: float | None
) -> dict[str, Any]:
    """Take the remaining steps, validate, save, stop when asked; the last step's numbers.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
        NotFinite: A loss or a gradient is not finite.
    """
    from polarctl.training.loop import NotFinite

    config, accelerator = known.job.config, trainer.engine.accelerator
    first, total = accelerator.is_main_process, trainer.plan.steps
    metrics = folder.folder / run_folder.METRICS
    kept = run_folder.keep_lines(metrics, trainer.step) if first else b""
    last: dict[str, Any] = orjson.loads(kept) if kept else {}
    held_out = _held_out(known)
    meter, trackers = _meter(known), _trackers(known, folder) if first else None
    several = accelerator.reduce if accelerator.num_processes > 1 else None
    clock = stopping.SaveClock(config.save_minutes)
    with (
        open(metrics if first else os.devnull, "ab") as log,
        stopping.StopFlag() as stop,
        console.progress(known.job.stage, total, "steps", eta=False) as bar,
    ):
        try:
            for entry in trainer.train(_stream(known, trainer.used)):
                last = dataclasses.asdict(entry)
                if held_out and _is_time(config, entry, total):
                    loss, accuracy = trainer.evaluate(held_out)
                    last |= {"val_loss": loss, "val_accuracy": accuracy}
                    console.note(
                        f"step {entry.step:,}: held out: loss {loss:.4f}, accuracy {accuracy:.3f}"
                    )
                    if best is None or loss < best:
                        best = loss
                        _keep_best(known, folder, model)
                log.write(orjson.dumps(last) + b"\n")
                meter.update(entry.step, total, entry.tokens, entry.computed)
                bar.update(entry.step, meter.line(entry.loss, entry.accuracy))
                if trackers is not None:
                    trackers.log(entry.step, {**last, **meter.rates()})
                asked, save = stop.agreed(clock, several, accelerator.device)
                if asked or save or entry.step % config.save_steps == 0:
                    log.flush()
                    if first:
                        os.fsync(log.fileno())
                    _save(folder, trainer, best)
                    clock.restart()
                if asked:
                    raise stopping.stopped(asked, entry.step, total)
        except NotFinite as error:
            log.write(orjson.dumps(error.figures) + b"\n")
            raise
        finally:
            if trackers is not None:
                trackers.close()
    return {f"last_{key}": value for key, value in last.items()} | meter.summary()


def _is_time(config: TrainConfig, entry: StepLog, total: int) -> bool:
    """Whether the model is validated after this step."""
    every = config.val_steps or config.save_steps
    return entry.step % every == 0 or entry.step == total


def _save(folder: run_folder.Run, trainer: Trainer, best: float | None) -> None:
    """Write a checkpoint; all processes call it, the first one marks it as whole."""
    accelerator = trainer.engine.accelerator
    target = folder.checkpoints / f"step-{trainer.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)  # what a killed run has begun
        target.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        trainer.engine.save(target)
        if accelerator.is_main_process:
            checkpoint.commit(target, trainer.step, folder.identity, best=best)
    except Exception:  # a full disk, mostly: what is left of it would only take room
        shutil.rmtree(target, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def _keep_best(known: Known, folder: run_folder.Run, model: Trained) -> None:
    """Write the model beside the last one, whole or not at all."""
    from polarctl.training import setup

    half_written = folder.checkpoints / run_folder.BEST
    accelerator = known.place.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(half_written, ignore_errors=True)
        half_written.mkdir()
    accelerator.wait_for_everyone()
    setup.write(known.job.config, known.place, model, half_written, known.job.response_length)
    if accelerator.is_main_process:
        atomic.sync_files(half_written)  # the next checkpoint says that it is there
        target = folder.folder / run_folder.BEST
        shutil.rmtree(target, ignore_errors=True)
        os.replace(half_written, target)
    accelerator.wait_for_everyone()


# -- what the steps are fed with, and who watches --------------------------------------------------


def _stream(known: Known, skip: int) -> Iterator[data.Group]:
    """This process's encoded triples, without the first `skip`."""
    at = known.place.accelerator
    count = known.job.config.workers
    if count is None:
        local = rank.count_here()
        count = data.default_workers(at.device.type, local)
    records = data.stream(known.source, world=at.num_processes, rank=at.process_index, skip=skip)
    return data.encoded(
        records,
        known.encode,
        workers=count,
        ahead=2 * -(-known.plan.batch_size // at.num_processes),
    )


def _held_out(known: Known) -> list[data.Group]:
    """This process's share of the encoded validation triples."""
    at = known.place.accelerator
    mine = known.survey.held_out_records[at.process_index :: at.num_processes]
    return [known.encode(record) for record in mine]


def _meter(known: Known) -> Meter:
    from polarctl.training import progress

    peak = progress.peak_of(known.place.accelerator, half=known.place.half)
    return progress.Meter(parameters=_scaling_parameters(known), peak=peak)


def _scaling_parameters(known: Known) -> int:
    """Weights without the input embedding, N of 6 N FLOPs a token."""
    embedding: int = known.reward_model.model.get_input_embeddings().weight.numel()
    return known.parameters - embedding


def _trackers(known: Known, folder: run_folder.Run) -> Trackers | None:
    from polarctl.training.progress import Trackers

    config = known.job.config
    if not config.report_to:
        return None
    given = {key: value for key, value in resolved(config).items() if value is not None}
    name = f"{known.job.stage}-{folder.target.name}"
    return Trackers(config.report_to, folder.folder, given, run_name=name)
