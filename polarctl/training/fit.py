"""What `pretrain` and `finetune` share, in the order in which it happens."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarctl import console
from polarctl.config import resolved
from polarctl.errors import RecordError, UsageError
from polarctl.parallel import launcher
from polarctl.records import Record, Triple, check
from polarctl.storage import run_folder
from polarctl.training import data
from polarctl.training.options import TrainConfig

# Where and how often, not what: these may differ at a resume.
_FREE = frozenset("save_steps device workers report_to gpus nnodes".split())
_SOURCES = ("model", "init_from_config", "tokenizer")


def run(stage: str, config: TrainConfig, *, reference_field: str, max_response_length: int) -> None:
    """Train on the input and leave a checkpoint folder; print its path on stdout.

    Args:
        stage: Name of the stage.
        config: Its options.
        reference_field: The field that holds the reference.
        max_response_length: The stage's default, in tokens.

    Raises:
        UsageError: The folder is taken, or a resume does not fit.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    if not config.dry_run and launcher.launch(
        stage, gpus=config.gpus, nnodes=config.nnodes, device=config.device, inputs=config.input
    ):
        return
    job = Job(stage, config, reference_field, max_response_length)
    run_folder.run(stage, config, job.train, dry_run=job.dry_run, sources=_SOURCES, free=_FREE)


@dataclass(frozen=True)
class Job:
    """A run of a training stage; the arguments of `run`."""

    stage: str
    config: TrainConfig
    reference_field: str
    response_length: int

    def verify(self, record: Record) -> None:
        """Raise RecordError for a record that does not fit; put the reference into its field."""
        if self.config.no_reference:
            record["reference"] = ""
        elif self.reference_field != "reference":
            if self.reference_field not in record:
                raise RecordError(f"missing field `{self.reference_field}`")
            record["reference"] = record[self.reference_field]
        check(record, Triple)
        if record["chosen"] in (record["rejected"], *record.get("negatives", ())):
            raise RecordError("`chosen` and `rejected` are the same")

    def source(self, paths: list[str], rejects: run_folder.Rejects | None) -> data.Source:
        """The input as training data."""
        return data.Source(
            paths=paths,
            verify=self.verify,
            rejects=rejects if self.config.rejects else None,
            limit=self.config.limit,
            val_fraction=self.config.val_fraction,
            seed=self.config.seed,
            window=self.config.shuffle_window,
        )

    def survey(self, source: data.Source) -> data.Survey:
        """What the data is: of its beginning, where --max-steps says how much of it is wanted.

        Bad rows are set aside in one pass, by one process, so --rejects needs all of it.
        """
        config = self.config
        counted = config.max_steps is None or bool(config.rejects) or config.dry_run
        return data.survey(source, stop_after=None if counted else data.SAMPLE)

    def dry_run(self, paths: list[str]) -> None:
        """Check options and input, and say what the run would be."""
        with tempfile.TemporaryDirectory() as scratch:
            _Run(self, data.on_disk(paths, Path(scratch))).say_plan()

    def train(self, run: run_folder.Run) -> None:
        """Train and finish the folder."""
        if run_folder.is_first_process():
            run.checkpoints.mkdir(exist_ok=True)
        paths = data.on_disk(run.paths, run.checkpoints)
        identity = {**run.identity, "input_digest": run_folder.input_digest(paths)}
        run = dataclasses.replace(run, identity=identity)
        with run_folder.rejects_of(run, self.config) as rejects:
            _Run(self, paths, rejects).train(run)


class _Run:
    """Everything that is known before the first step.

    Args:
        job: What to do.
        paths: Its input, as files.
        rejects: Where bad rows go.
    """

    def __init__(self, job: Job, paths: list[str], rejects: run_folder.Rejects | None = None):
        from polarctl.training import encode, plan, progress, recipe, setup, state

        self.job, self.config = job, job.config
        recipe.loss_of(job.config)  # options first: the data may take hours
        progress.check_trackers(job.config.report_to)
        self.place = setup.place_of(job.config)
        self.accelerator = self.place.accelerator
        # A plan may be made for processes that are not there.
        world = max(self.accelerator.num_processes, job.config.gpus * job.config.nnodes)
        self.source = job.source(paths, rejects)
        self.survey = state.first_says(self.accelerator, lambda: job.survey(self.source))
        if rejects is not None:
            rejects.read()
        if self.config.val_fraction and len(self.survey.held_out_records) < world:
            raise UsageError(
                f"--val-fraction {self.config.val_fraction} holds out "
                f"{len(self.survey.held_out_records)} triples",
                hint="a larger share, or 0",
            )
        self.reward_model = setup.reward_model_of(job.config, job.response_length)
        self.parameters = sum(p.numel() for p in self.reward_model.model.parameters())
        self.encode = encode.TripleEncoder(self.reward_model.encoder, job.config.negatives)
        self.sample = plan.look(
            [self.encode(r) for r in self.survey.sample], self.place.batch_tokens
        )
        plan.warn_of_cuts(self.sample)
        facts = recipe.Facts(
            parameters=self.parameters,
            triples=self.survey.triples if self.survey.complete else None,
            triple_tokens=self.sample.tokens,
            processes=world,
        )
        self.plan = recipe.resolve(job.stage, job.config, facts, self.place.batch_tokens)
        self.facts = facts

    def say_plan(self) -> None:
        """Say what the run would be."""
        from polarctl.training import lora, plan

        config = self.config
        classifier = self.reward_model.model
        if config.lora_rank is not None:
            classifier = lora.adapt(
                classifier,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                new_tokens=self.reward_model.new_tokens,
            )
        weights = list(classifier.parameters())
        memory = plan.memory(
            self.reward_model.model.config,
            sum(p.numel() for p in weights),
            sum(p.numel() for p in weights if p.requires_grad),
            self.place.batch_tokens,
            half=self.place.half,
            checkpointing=config.gradient_checkpointing,
            zero=self.place.zero,
            processes=self.facts.processes,
        )
        said = plan.lines(self.sample, self.plan, self.facts.triples, memory)
        console.note(
            f"{self.job.stage}: options and input are good: {self.survey.triples:,} triples"
            + (f", {self.survey.held_out:,} held out" if self.survey.held_out else "")
            + (f", {self.survey.bad:,} bad rows" if self.survey.bad else ""),
            config=resolved(config),
            records=self.survey.triples,
            bad=self.survey.bad,
            tokens_per_triple=self.sample.tokens,
            computed_per_triple=self.sample.computed,
            fill=self.sample.fill,
            steps=self.plan.steps,
            lr=self.plan.lr,
            batch_size=self.plan.batch_size,
            memory_bytes=memory.total,
        )
        for line in said:
            console.note(f"  {line}")

    def train(self, run: run_folder.Run) -> None:
        """Train to the end and finish the folder."""
        from polarctl.model import devices
        from polarctl.training import setup, state
        from polarctl.training.drive import Drive
        from polarctl.training.loop import Trainer

        config, stage = self.config, self.job.stage
        model = setup.trained(config, self.place, self.reward_model, self.plan)
        pad_id = self.reward_model.tokenizer.pad_token_id
        trainer = Trainer(model.engine, self.plan, pad_id)
        best = None
        found = state.newest(run.checkpoints, trainer)
        if found is not None:
            run.same(found[1]["identity"])
            state.restore(*found, trainer)
            best = found[1].get("best")
            console.note(f"{run.target}: going on after step {trainer.step} of {self.plan.steps}")
        console.note(
            f"{stage}: "
            + (f"{self.facts.triples:,} triples, " if self.facts.triples else "")
            + f"{self.plan.steps:,} steps of {self.plan.batch_size:,}, "
            f"{self.parameters:,} parameters, {self.sample.saved:.0%} of the tokens shared"
        )

        def write(target: Path) -> None:
            setup.write(config, self.place, model, target, self.job.response_length)

        drive = Drive(
            stage=stage,
            config=config,
            trainer=trainer,
            run=run,
            stream=lambda: self._stream(trainer.used),
            held_out=self._held_out(),
            parameters=self.parameters
            - self.reward_model.model.get_input_embeddings().weight.numel(),
            half=self.place.half,
            write=write,
            best=best,
        )
        start = time.monotonic()
        with devices.threads_for(model.module):
            last = drive.to_the_end()
        console.note(
            f"{stage}: done after {trainer.step:,} steps in {time.monotonic() - start:.0f} s; the "
            f"last step's loss {last['last_loss']:.4f}, accuracy {last['last_accuracy']:.3f}"
        )
        write(run.part())
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            counts = {
                "triples": self.survey.triples,
                "held_out": self.survey.held_out,
                "sampled": self.sample.triples,
                "sampled_cut": self.sample.cut["any"],
                **last,
            }
            run.finish(stage, config, counts)
        self.accelerator.end_training()

    def _stream(self, skip: int) -> Iterator[Any]:
        """This process's encoded triples, without the first `skip`."""
        from polarctl.training import encode

        at = self.accelerator
        count = self.config.workers
        if count is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            count = encode.default_count(at.device.type, local)
        records = data.stream(self.source, world=at.num_processes, rank=at.process_index, skip=skip)
        return encode.encoded(
            records,
            self.encode,
            workers=count,
            ahead=2 * -(-self.plan.batch_size // at.num_processes),
        )

    def _held_out(self) -> list[Any]:
        """This process's share of the encoded validation triples."""
        at = self.accelerator
        mine = self.survey.held_out_records[at.process_index :: at.num_processes]
        return [self.encode(record) for record in mine]
