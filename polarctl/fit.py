"""What `pretrain` and `finetune` share: read triples, encode them, train, checkpoint, finish.

DIR/checkpoints/     while training; removed at the end
DIR/metrics.jsonl    one line a step
DIR/config.json, model.safetensors, tokenizer files, manifest.json   at the end, in that order
"""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from polarctl import console, io, manifest, pipeline
from polarctl.errors import Interrupted, RecordError, UsageError
from polarctl.output import check_paths, difference, header, stdout
from polarctl.records import Record, Triple, check
from polarctl.train_config import TrainConfig

_WINDOW_ROWS = 1024


# Where and how often, not what: these may differ at a resume.
_FREE = frozenset({"save_steps", "device", "model", "init_from_config", "tokenizer"})


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
    paths = pipeline.inputs_of(stage, config)
    verify = _verifier(config, reference_field)
    if config.dry_run:
        sink = pipeline.CountRejects()
        reader = pipeline.reader_of(config, paths, None, sink=sink, verify=verify)
        pipeline.dry_run(stage, config, reader)
        return
    if config.output == "-":
        raise UsageError("a training stage writes a folder", hint="-o DIR")
    folder = Path(config.output)
    with _folder_lock(folder, config):
        identity = _identity(stage, config, paths)
        if _is_complete(folder, config, identity):
            stdout().write(f"{folder}\n".encode())
            return
        triples, digest, bad = _read(config, paths, verify)
        _train(
            stage,
            config,
            max_response_length,
            folder,
            triples,
            {**identity, "input_digest": digest},
            io.sizes(paths),
            bad,
        )
    stdout().write(f"{folder}\n".encode())


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


def _read(
    config: TrainConfig, paths: list[str], verify: Callable[[Record], None]
) -> tuple[list[Record], str, int]:
    sink = _RejectFile(config.rejects) if config.rejects else None
    reader = pipeline.reader_of(config, paths, None, sink=sink, verify=verify)
    triples: list[Record] = []
    digest = ""
    for window in reader.windows(_WINDOW_ROWS):
        triples += window.records
        digest = window.digest
    if sink is not None:
        sink.close()
    if not triples:
        raise RecordError("no good record", where=", ".join(paths))
    return triples, digest, reader.bad


class _RejectFile:
    """Bad records of a training stage, with reasons."""

    def __init__(self, path: str):
        self.stream: IO[bytes] = open(path, "wb")

    def reject(self, where: str, reason: str, raw: Any = None) -> None:
        """Keep one bad record."""
        import orjson

        line = orjson.dumps({"where": where, "reason": reason, "record": raw})
        self.stream.write(line + b"\n")

    def close(self) -> None:
        """Finish the file."""
        self.stream.close()


# -- the output folder ----------------------------------------------------------------------------


@contextmanager
def _folder_lock(folder: Path, config: TrainConfig) -> Iterator[None]:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; a training stage writes a folder")
    if not folder.exists():
        check_paths(config, [])
        folder.mkdir()
    with open(folder / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is writing it") from None
        yield
    (folder / ".lock").unlink(missing_ok=True)


def _identity(stage: str, config: TrainConfig, paths: list[str]) -> dict[str, Any]:
    sources = {
        name: manifest.folder_identity(path)
        for name in ("model", "init_from_config", "tokenizer")
        if (path := getattr(config, name))
    }
    plain = header(stage, config, io.sizes(paths), sources)
    return {key: value for key, value in plain.items() if key not in _FREE or key in sources}


def _is_complete(folder: Path, config: TrainConfig, identity: dict[str, Any]) -> bool:
    import orjson

    mark = folder / "manifest.json"
    taken = [p.name for p in folder.iterdir() if p.name not in (".lock", "checkpoints")]
    if config.force or (not config.resume and not mark.exists() and "metrics.jsonl" in taken):
        for path in folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
    if mark.exists():
        before = orjson.loads(mark.read_bytes()).get("fingerprint", {})
        before.pop("input_digest", None)
        changed = difference(before, identity)
        if changed or "-" in config.input:
            why = changed or "and whether the piped input is the same cannot be known"
            raise UsageError(
                f"{folder}: is complete already, {why}", hint="pass --force to replace it"
            )
        console.note(f"{folder}: complete already, with the same options and input")
        return True
    if taken and "metrics.jsonl" not in taken:
        raise UsageError(
            f"{folder}: is not empty and no interrupted run of this stage",
            hint="another -o, or --force to replace all that is in it",
        )
    return False


# -- training -------------------------------------------------------------------------------------


def _train(
    stage: str,
    config: TrainConfig,
    default_response_length: int,
    folder: Path,
    triples: list[Record],
    identity: dict[str, Any],
    inputs: list[dict[str, Any]],
    bad: int,
) -> None:
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
    pairs, truncated = _encode(reward_model.encoder, triples)
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
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None:
        changed = difference(found[1]["identity"], identity)
        if changed:
            raise UsageError(
                f"cannot resume {folder}: {changed}", hint="pass --force to start again"
            )
        checkpoint.restore(*found, trainer)
        console.note(f"{folder}: going on after step {trainer.step} of {trainer.steps}")
    console.note(
        f"{stage}: {len(pairs):,} triples, {trainer.steps:,} steps of {config.batch_size}, "
        f"{sum(p.numel() for p in reward_model.model.parameters()):,} parameters"
    )
    last = _loop(stage, config, folder, trainer, pairs, identity)
    reward_model.model = trainer.accelerator.unwrap_model(trainer.model)
    reward_model.save(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    outputs = {k: v for k, v in manifest.folder_files(folder).items() if k != ".lock"}
    record = manifest.build(
        stage,
        config,
        inputs=inputs,
        outputs=outputs,
        counts={"triples": len(pairs), "rejects": bad, "truncated": truncated, **last},
    )
    manifest.write(folder / "manifest.json", {**record, "fingerprint": identity})


def _encode(encoder: Any, triples: list[Record]) -> tuple[list[Any], int]:
    pairs, truncated = [], 0
    with console.progress("encode", len(triples), "triples") as bar:
        for number, t in enumerate(triples):
            group = encoder.report_group(
                t["prompt"], t["reference"], [t["chosen"], t["rejected"]], t.get("wrapper", "sft")
            )
            pairs.append((group[0].ids, group[1].ids))
            truncated += any(
                e.truncated_prompt or e.truncated_reference or e.truncated_output for e in group
            )
            bar.update(number + 1)
    if truncated:
        console.warn(f"{truncated:,} triples were longer than the template and were cut")
    return pairs, truncated


def _loop(
    stage: str,
    config: TrainConfig,
    folder: Path,
    trainer: Any,
    pairs: list[Any],
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Train to the end, logging and checkpointing; the last step's numbers."""
    import orjson

    from polarctl import checkpoint

    metrics = folder / "metrics.jsonl"
    kept = metrics.read_bytes().splitlines(keepends=True)[: trainer.step] if trainer.step else []
    metrics.write_bytes(b"".join(kept))
    last = orjson.loads(kept[-1]) if kept else {}
    stop = _StopFlag()
    with open(metrics, "ab") as log, stop, console.progress(stage, trainer.steps, "steps") as bar:
        for entry in trainer.train(pairs):
            last = dataclasses.asdict(entry)
            log.write(orjson.dumps(last) + b"\n")
            bar.update(entry.step, f"loss {entry.loss:.4f} accuracy {entry.accuracy:.3f}")
            if stop.asked or entry.step % config.save_steps == 0:
                log.flush()
                checkpoint.save(folder / "checkpoints", trainer, identity)
            if stop.asked:
                raise Interrupted(
                    f"stopped by SIGTERM after step {entry.step} of {trainer.steps}",
                    hint="the same command goes on from here",
                )
    return {f"last_{key}": value for key, value in last.items()}


class _StopFlag:
    """SIGTERM lets the step in hand finish, so that what is saved is whole."""

    asked = False

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)
