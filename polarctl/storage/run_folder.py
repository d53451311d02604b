"""The output folder of a training stage: who may write it, when it is complete, how it is resumed.

DIR/checkpoints/     while training; removed at the end
DIR/metrics.jsonl    one line a step; marks a folder as a run of ours
DIR/config.json, model.safetensors, tokenizer files, manifest.json   at the end, in that order
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from polarctl import console
from polarctl.config import Common
from polarctl.errors import Interrupted, RecordError, UsageError
from polarctl.records import Record
from polarctl.storage import manifest, read, windows
from polarctl.storage.fingerprint import difference, header
from polarctl.storage.write import check_paths, stdout

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.jsonl"
_WINDOW_ROWS = 1024


@dataclass(frozen=True)
class Run:
    """What a training stage works on, once its folder is its own.

    Attributes:
        folder: Where it writes.
        paths: The inputs.
        identity: What must be the same for a resume.
        inputs: `polarctl.storage.read.sizes` of the inputs.
        records: The good records of the input, where it was read whole.
        bad: Rows that were set aside.
    """

    folder: Path
    paths: list[str]
    identity: dict[str, Any]
    inputs: list[dict[str, Any]]
    records: tuple[Record, ...] = ()
    bad: int = 0

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def same(self, before: dict[str, Any]) -> None:
        """Raise UsageError when a checkpoint's identity is not this run's."""
        changed = difference(before, self.identity)
        if changed:
            raise UsageError(
                f"cannot resume {self.folder}: {changed}", hint="pass --force to start again"
            )

    def finish(self, stage: str, config: Common, counts: dict[str, Any]) -> None:
        """Remove the checkpoints and write the manifest: the folder is complete."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        outputs = {k: v for k, v in manifest.folder_files(self.folder).items() if k != ".lock"}
        counts = {**counts, "rejects": self.bad}
        record = manifest.build(stage, config, inputs=self.inputs, outputs=outputs, counts=counts)
        manifest.write(self.folder / "manifest.json", {**record, "fingerprint": self.identity})


def run(
    stage: str,
    config: Common,
    work: Callable[[Run], None],
    *,
    dry_run: Callable[[list[str]], None],
    sources: tuple[str, ...],
    free: frozenset[str],
) -> None:
    """Call `work` in the output folder, unless that is complete.

    Prints the folder on stdout. Of several processes only the first locks and prints.

    Args:
        stage: Name of the stage.
        config: Its options.
        work: Reads, trains and calls `Run.finish`.
        dry_run: What `--dry-run` does with the input paths instead.
        sources: Options that name a model or a tokenizer; their contents count.
        free: Options that may differ at a resume: where and how often, not what.

    Raises:
        UsageError: The folder is taken, or a resume does not fit.
    """
    paths = windows.inputs_of(stage, config)
    if config.dry_run:
        dry_run(paths)
        return
    if config.output == "-":
        raise UsageError("a training stage writes a folder", hint="-o DIR")
    folder = Path(config.output)
    with locked(folder, config) if is_first_process() else contextlib.nullcontext():
        identity = _identity(stage, config, paths, sources, free)
        if is_first_process():
            complete = _is_complete(folder, config, identity)
        else:  # the first process says whether that is right
            complete = (folder / "manifest.json").exists() and not config.force
        if not complete:
            work(Run(folder, paths, identity, read.sizes(paths)))
    if is_first_process():
        stdout().write(f"{folder}\n".encode())


def is_first_process() -> bool:
    """True in the process that writes; a launcher says its rank in RANK."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def locked(folder: Path, config: Common) -> Iterator[None]:
    """Hold a folder alone, made if needed.

    Raises:
        UsageError: It is a file, cannot be made, or another process holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; a training stage writes a folder")
    if not folder.exists():
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made: {error.strerror}") from None
        check_paths(replace(config, output="-"), [])
    with open(folder / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is writing it") from None
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def _identity(
    stage: str, config: Common, paths: list[str], names: tuple[str, ...], free: frozenset[str]
) -> dict[str, Any]:
    sources = {
        name: manifest.folder_identity(path) for name in names if (path := getattr(config, name))
    }
    plain = header(stage, config, read.sizes(paths), sources)
    dropped = free | set(names)
    kept = {key: value for key, value in plain.items() if key not in dropped or key in sources}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {**kept, "input_digest": input_digest(paths), "processes": processes}


def input_digest(paths: list[str]) -> list[str | None]:
    """What tells the input from another: a hash of each file, None for a pipe."""
    return [None if path == "-" else manifest.file_identity(path) for path in paths]


def _is_complete(folder: Path, config: Common, identity: dict[str, Any]) -> bool:
    import orjson

    mark = folder / "manifest.json"
    taken = [p.name for p in folder.iterdir() if p.name not in (".lock", "checkpoints")]
    if config.force or (not config.resume and not mark.exists() and METRICS in taken):
        for path in folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
    if mark.exists():
        before = orjson.loads(mark.read_bytes()).get("fingerprint", {})
        # By how many processes it was made does not matter once it is there.
        unknown = {"processes"} | ({"input_digest"} if "-" in config.input else set())
        changed = difference(
            *({k: v for k, v in x.items() if k not in unknown} for x in (before, identity))
        )
        if changed or "-" in config.input:
            why = changed or "and whether the piped input is the same cannot be known"
            raise UsageError(
                f"{folder}: is complete already, {why}", hint="pass --force to replace it"
            )
        console.note(f"{folder}: complete already, with the same options and input")
        return True
    if taken and METRICS not in taken:
        raise UsageError(
            f"{folder}: is not empty and no interrupted run of this stage",
            hint="another -o, or --force to replace all that is in it",
        )
    return False


def read_all(
    run: Run, config: Common, kind: str | None, verify: Callable[[Record], None] | None
) -> Run:
    """The run with all good records of its input in memory; its identity knows every byte of it.

    Args:
        run: A run that has read nothing.
        config: The stage's options.
        kind: Kind of the records, or None when `verify` checks it.
        verify: Raises RecordError for a record that does not fit this run.

    Raises:
        RecordError: A bad row and no `--rejects`; no good row.
    """
    sink = rejects_of(run, config)
    reader = windows.reader_of(config, run.paths, kind, sink=sink, verify=verify)
    records: list[Record] = []
    digest = ""
    for window in reader.windows(_WINDOW_ROWS):
        records += window.records
        digest = window.digest
    sink.close()
    if not records:
        raise RecordError("no good record", where=", ".join(run.paths))
    identity = {**run.identity, "input_digest": digest} if "-" in run.paths else run.identity
    return replace(run, identity=identity, records=tuple(records), bad=reader.bad)


def rejects_of(run: Run, config: Common) -> Rejects:
    """Where a training stage's bad rows go; of several processes the first one keeps them.

    Raises:
        UsageError: There is a file already, and no run of this folder has written it.
    """
    if not config.rejects or not is_first_process():
        return Rejects(None)
    begun = (run.folder / METRICS).exists() or config.force
    if os.path.exists(config.rejects) and not begun:
        raise UsageError(f"{config.rejects}: exists already", hint="pass --force to replace it")
    return Rejects(config.rejects)


class Rejects:
    """Bad records of a training stage, with reasons.

    Args:
        path: The file, or None to keep nothing.
    """

    def __init__(self, path: str | None):
        self.stream: IO[bytes] | None = open(path, "wb") if path else None

    def reject(self, where: str, reason: str, raw: Any = None) -> None:
        """Keep one bad record."""
        import orjson

        if self.stream is not None:
            line = orjson.dumps({"where": where, "reason": reason, "record": raw})
            self.stream.write(line + b"\n")

    def close(self) -> None:
        """Finish the file."""
        if self.stream is not None:
            self.stream.close()


def keep_lines(path: Path, count: int) -> bytes:
    """Cut a file to its first lines, made if needed, and give the last that is kept.

    What a run wrote after the checkpoint that it goes on from is written again.
    """
    last, size = b"", 0
    with open(path, "a+b") as stream:
        stream.seek(0)
        for _ in range(count):
            line = stream.readline()
            if not line.endswith(b"\n"):
                raise UsageError(
                    f"{path}: has fewer than {count:,} lines, as the checkpoint says",
                    hint="pass --force to start again",
                )
            last, size = line, size + len(line)
        stream.truncate(size)
    return last


def open_to_umask(folder: Path) -> None:
    """Give a folder's files the permissions of the umask; safetensors writes 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~umask)


class StopFlag:
    """SIGTERM or Ctrl-C lets the step in hand finish, so that what is saved is whole.

    A second Ctrl-C ends the process at once.

    Attributes:
        asked: Number of the signal that asks to stop; 0: none has.
    """

    asked = 0

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self.asked == signal.SIGINT:
                os._exit(130)
            console.note_at_once("stopping after this step; Ctrl-C again ends it at once")
        self.asked = number

    def __enter__(self) -> StopFlag:
        self.before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, add: Callable[[Tensor], Tensor] | None, device: Any) -> int:
        """The signal that any process of the run was sent: all stop after the same step.

        Args:
            add: Sums a tensor over all processes; None: there is one process.
            device: Where that tensor has to be.
        """
        if add is None:
            return self.asked
        import torch

        signals = (signal.SIGINT, signal.SIGTERM)
        seen = torch.tensor([float(self.asked == number) for number in signals], device=device)
        found = [number for number, count in zip(signals, add(seen).tolist(), strict=True) if count]
        return found[0] if found else 0


def stopped(number: int, step: int, steps: int) -> Interrupted:
    """The error of a training run that a signal has stopped after a step; its state is saved."""
    by_hand = number == signal.SIGINT
    return Interrupted(
        f"stopped by {'Ctrl-C' if by_hand else 'SIGTERM'} after step {step} of {steps}",
        hint="the same command goes on from here",
        exit_status=130 if by_hand else 75,
    )
