"""What `pretrain` and `finetune` share: read triples, encode them, train, checkpoint, finish."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from polarctl import console, folder
from polarctl.errors import Interrupted, RecordError
from polarctl.records import Record, Triple, check
from polarctl.scoring import PIECES
from polarctl.train_config import TrainConfig

# Where and how often, not what: these may differ at a resume.
_FREE = frozenset({"save_steps", "device"})
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
        Interrupted: SIGTERM; the state is saved.
    """
    folder.run(
        stage,
        config,
        lambda run: _train(stage, config, max_response_length, run),
        verify=_verifier(config, reference_field),
        sources=_SOURCES,
        free=_FREE,
    )


def _verifier(config: TrainConfig, reference_field: str) -> Callable[[Record], None]:
    def verify(record: Record) -> None:
        if config.no_reference:
            record["reference"] = ""
        elif reference_field != "reference":
            if reference_field not in record:
                raise RecordError(f"missing field `{reference_field}`")
            record["reference"] = record[reference_field]
        check(record, Triple)
        if record["chosen"] == record["rejected"]:
            raise RecordError("`chosen` and `rejected` are the same")

    return verify


def _train(stage: str, config: TrainConfig, default_response_length: int, run: folder.Run) -> None:
    from polarctl import checkpoint, launch, model
    from polarctl.training import Hyperparameters, Trainer

    launch.quiet_libraries()
    device = launch.device_of(config.device)
    reward_model = model.create(
        base=config.model,
        config_path=config.init_from_config,
        tokenizer_path=config.tokenizer,
        max_length=config.max_length,
        max_response_length=config.max_response_length,
        default_response_length=default_response_length,
        cut_side=config.cut_side,
        device=device,
        dtype=launch.dtype_of(config.dtype, device),
        seed=config.seed,
    )
    reward_model.model.config.polar_no_reference = config.no_reference
    pairs, truncated = _encode(reward_model.encoder, run.records)
    plan = Hyperparameters(
        lr=config.lr,
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        warmup=config.warmup,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )
    trainer = Trainer(reward_model, plan, len(pairs))
    found = checkpoint.newest(run.checkpoints)
    if found is not None:
        run.same(found[1]["identity"])
        checkpoint.restore(*found, trainer)
        console.note(f"{run.folder}: going on after step {trainer.step} of {trainer.steps}")
    console.note(
        f"{stage}: {len(pairs):,} triples, {trainer.steps:,} steps of {config.batch_size}, "
        f"{sum(p.numel() for p in reward_model.model.parameters()):,} parameters"
    )
    start = time.monotonic()
    with launch.threads_for(trainer.model):
        last = _loop(stage, config, trainer, pairs, run)
    console.note(
        f"{stage}: done after {trainer.step:,} steps in {time.monotonic() - start:.0f} s; the last "
        f"step's loss {last['last_loss']:.4f}, accuracy {last['last_accuracy']:.3f}"
    )
    reward_model.model = trainer.accelerator.unwrap_model(trainer.model)
    reward_model.save(run.folder)
    run.finish(stage, config, {"triples": len(pairs), "truncated": truncated, **last})


def _encode(encoder: Any, triples: list[Record]) -> tuple[list[Any], int]:
    pairs, truncated = [], 0
    cuts: Counter[str] = Counter()
    with console.progress("encode", len(triples), "triples") as bar:
        for number, t in enumerate(triples):
            group = encoder.report_group(
                t["prompt"], t["reference"], [t["chosen"], t["rejected"]], t.get("wrapper", "sft")
            )
            pairs.append((group[0].ids, group[1].ids))
            cut = {piece for e in group for piece in PIECES if getattr(e, f"truncated_{piece}")}
            truncated += bool(cut)
            cuts.update(cut)
            bar.update(number + 1)
    if truncated:
        console.warn(
            f"{truncated:,} of {len(triples):,} triples are longer than --max-length and "
            f"--max-response-length allow and were cut ("
            + ", ".join(f"{piece}: {count:,}" for piece, count in sorted(cuts.items()))
            + ")"
        )
    return pairs, truncated


def _loop(
    stage: str, config: TrainConfig, trainer: Any, pairs: list[Any], run: folder.Run
) -> dict[str, Any]:
    """Train to the end, logging and checkpointing; the last step's numbers."""
    import orjson

    from polarctl import checkpoint

    metrics = run.folder / folder.METRICS
    kept = folder.keep_lines(metrics, trainer.step)
    last = orjson.loads(kept) if kept else {}
    stop = folder.StopFlag()
    with open(metrics, "ab") as log, stop, console.progress(stage, trainer.steps, "steps") as bar:
        for entry in trainer.train(pairs):
            last = dataclasses.asdict(entry)
            log.write(orjson.dumps(last) + b"\n")
            bar.update(entry.step, f"loss {entry.loss:.4f} accuracy {entry.accuracy:.3f}")
            if stop.asked or entry.step % config.save_steps == 0:
                log.flush()
                checkpoint.save(run.checkpoints, trainer, run.identity)
            if stop.asked:
                raise Interrupted(
                    f"stopped by SIGTERM after step {entry.step} of {trainer.steps}",
                    hint="the same command goes on from here",
                )
    return {f"last_{key}": value for key, value in last.items()}
