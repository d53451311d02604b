"""The output folder of a training stage: who may write it, when it is complete, how it is resumed.

DIR/checkpoints/     while training; removed at the end
DIR/metrics.jsonl    one line a step; marks a folder as a run of ours
DIR/config.json, model.safetensors, tokenizer files, manifest.json   at the end, in that order

With `--force` and a complete DIR all of this happens in `.polarctl-next.DIR`, which then takes the
place of DIR.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from polarctl import console
from polarctl.config import Common, resolved
from polarctl.errors import UsageError
from polarctl.parallel import rank
from polarctl.records import Record
from polarctl.storage import atomic, checkpoint, claim, manifest, read, replace
from polarctl.storage.fingerprint import difference, header
from polarctl.storage.paths import check_paths, make_folders
from polarctl.storage.write import stdout

METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"
BEST = "best"
_CHECKPOINTS = "checkpoints"
_PART, _NAMES = "final", "final.json"  # in it: the files of the result, and their names
_TRACKED = {"tensorboard": "runs", "wandb": "wandb"}


@dataclass(frozen=True)
class Run:
    """What a training stage works on, once its folder is its own.

    Attributes:
        folder: Where it writes: `target`, or with `--force` a folder beside an old complete one.
        target: The output folder, as the user named it.
        paths: The inputs.
        identity: What must be the same for a resume.
        inputs: `polarctl.storage.read.sizes` of the inputs.
        records: The good records of the input, where it was read whole.
        bad: Rows that were set aside.
    """

    folder: Path
    target: Path
    paths: list[str]
    identity: dict[str, Any]
    inputs: list[dict[str, Any]]
    records: tuple[Record, ...] = ()
    bad: int = 0

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / _CHECKPOINTS

    def part(self) -> Path:
        """An empty folder for the files of the result; `finish` gives them their places."""
        part = self.checkpoints / _PART
        if rank.is_first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        return part

    def same(self, before: dict[str, Any]) -> None:
        """Raise UsageError when a checkpoint's identity is not this run's."""
        changed = difference(before, self.identity)
        if changed:
            raise UsageError(
                f"cannot resume {self.target}: {changed}", hint="pass --force to start again"
            )

    def finish(self, stage: str, config: Common, counts: dict[str, Any]) -> None:
        """Put the files of `part` into place and write the manifest: the folder is complete.

        An old folder that this one replaces is removed only then.
        """
        part = self.checkpoints / _PART
        named = [str(file.relative_to(part)) for file in part.rglob("*") if file.is_file()]
        # Whose files these are, should this be killed before there is a manifest.
        atomic.write(self.checkpoints / _NAMES, orjson.dumps(named))
        for entry in sorted(part.iterdir()):
            place = self.folder / entry.name
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(entry, place)
        # The manifest vouches for the lines of the last steps and for `best`, too.
        atomic.sync_files(self.folder)
        whole = manifest.folder_files(self.folder)
        made = {*named, METRICS, ROLLOUTS}
        outputs = {
            name: facts
            for name, facts in whole.items()
            if name in made or Path(name).parts[0] in (BEST, *_tracked(config))
        }
        counts = {**counts, "rejects": self.bad}
        manifest.write(
            self.folder / replace.MANIFEST,
            stage,
            config,
            inputs=self.inputs,
            outputs=outputs,
            counts=counts,
            fingerprint=self.identity,
        )
        if self.folder != self.target:
            replace.exchange(self.folder, self.target)
            shutil.rmtree(self.folder)
        shutil.rmtree(self.target / _CHECKPOINTS)


def _tracked(config: Common) -> list[str]:
    """Folders that the run's trackers make in its own."""
    asked = getattr(config, "report_to", ())
    return [name for tracker, name in _TRACKED.items() if tracker in asked]


@contextmanager
def opened(
    stage: str,
    config: Common,
    paths: list[str],
    *,
    sources: tuple[str, ...],
    free: frozenset[str],
    files: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Run | None]:
    """The output folder, held alone: a run to be done and finished, or None when it is complete.

    Prints the folder on stdout at the end. Of several processes only the first locks and prints.

    Args:
        stage: Name of the stage.
        config: Its options.
        paths: The inputs.
        sources: Options that name a model or a tokenizer; their contents count.
        free: Options that may differ at a resume: where and how often, not what.
        files: Further files and model folders whose contents count, by a name for each.

    Raises:
        UsageError: The folder is taken, or a resume does not fit.
    """
    if config.output == "-":
        raise UsageError("a training stage writes a folder", hint="-o DIR")
    folder = Path(config.output)
    replace.check_unused(folder, resolved(config))
    with contextlib.ExitStack() as held:
        if rank.is_first():
            check_paths(dataclasses.replace(config, output="-"), paths)
            make_folders(config.rejects)
            held.enter_context(locked(folder))
        identity = _identity(stage, config, paths, sources, free, files)
        done = (folder / replace.MANIFEST).exists()
        place = folder
        if done and config.force:
            place = replace.next_to(folder)
            if rank.is_first():
                _prepare(place, folder, config, identity)
                held.enter_context(locked(place))
        elif rank.is_first():  # which says, for all, whether what they find is right
            done = _is_complete(folder, config, identity)
        complete = place == folder and done
        yield None if complete else Run(place, folder, paths, identity, read.sizes(paths))
    if rank.is_first():
        stdout().write(f"{folder}\n".encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone, made if needed.

    Raises:
        UsageError: It is a file, cannot be made, or another process holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; a training stage writes a folder")
    replace.mend(folder)
    made = not folder.exists()
    if made:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made: {error.strerror}") from None
    lock = claim.locked(folder / replace.LOCK, folder)
    try:
        yield
    finally:
        (folder / replace.LOCK).unlink(missing_ok=True)
        lock.close()
        if made:  # a run that failed before it wrote anything leaves no empty folder
            with contextlib.suppress(OSError):
                (folder / _CHECKPOINTS).rmdir()
            with contextlib.suppress(OSError):
                folder.rmdir()


def _identity(
    stage: str,
    config: Common,
    paths: list[str],
    names: tuple[str, ...],
    free: frozenset[str],
    files: Mapping[str, str],
) -> dict[str, Any]:
    sources = {
        name: manifest.folder_identity(path) for name in names if (path := getattr(config, name))
    }
    for name, path in files.items():
        of = manifest.file_identity if Path(path).is_file() else manifest.folder_identity
        sources[name] = of(path)
    plain = header(stage, config, read.sizes(paths), sources)
    dropped = free | set(names)
    kept = {key: value for key, value in plain.items() if key not in dropped or key in sources}
    processes = rank.count()
    return {**kept, "input_digest": input_digest(paths), "processes": processes}


def input_digest(paths: list[str]) -> list[str | None]:
    """What tells the input from another: a hash of each file, None for a pipe."""
    return [None if read.is_pipe(path) else manifest.file_identity(path) for path in paths]


def _is_complete(folder: Path, config: Common, identity: dict[str, Any]) -> bool:
    """Whether there is nothing to do; clears a folder of ours that is to begin again.

    Raises:
        UsageError: The folder is complete with another result, or is not ours.
    """
    mark = folder / replace.MANIFEST
    taken = [p.name for p in folder.iterdir() if p.name != replace.LOCK and not _is_copy(p)]
    if mark.exists():
        _same_result(folder, mark, config, identity)
        # What a run that was killed as it finished has left.
        shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
        if not (replace.next_to(folder) / _CHECKPOINTS).exists():
            shutil.rmtree(replace.next_to(folder), ignore_errors=True)
        return True
    ours = METRICS in taken or _is_result(folder, taken)
    if taken and not ours:
        replace.refuse(folder, "it is not empty and no run of this program")
    if ours and (config.force or not config.resume):
        working = _working(folder, config)
        replace.check_folder(folder, working)
        for name in working:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            elif name != replace.LOCK:
                path.unlink(missing_ok=True)
    return False


def _is_copy(path: Path) -> bool:
    """Whether this is a folder of checkpoints that holds at most copies of piped input."""
    return path.name == _CHECKPOINTS and all(
        inside.is_file() and (inside.name == read.STDIN or inside.name.startswith("pipe-"))
        for inside in path.iterdir()
    )


def _is_result(folder: Path, taken: list[str]) -> bool:
    """Whether a run without steps, which writes its result at once, was killed at it."""
    inside = folder / _CHECKPOINTS
    return (inside / _NAMES).exists() or (taken == [_CHECKPOINTS] and (inside / _PART).exists())


def _working(folder: Path, config: Common) -> list[str]:
    """What a run that has not finished makes in its folder."""
    try:
        moved = orjson.loads((folder / _CHECKPOINTS / _NAMES).read_bytes())
        tops = {Path(name).parts[0] for name in moved}
    except (OSError, ValueError, TypeError, IndexError):
        tops = set()
    # The metrics are the last to go: they tell that the folder is ours.
    return [replace.LOCK, ROLLOUTS, BEST, *_tracked(config), *sorted(tops), _CHECKPOINTS, METRICS]


def _same_result(folder: Path, mark: Path, config: Common, identity: dict[str, Any]) -> None:
    """Raise UsageError unless a complete folder is what this run would write."""
    try:
        record = orjson.loads(mark.read_bytes())
        before, outputs = dict(record.get("fingerprint", {})), record["outputs"]
        hashes = {name: facts["sha256"] for name, facts in outputs.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        replace.refuse(folder, f"{mark} is no manifest")
    # By how many processes it was made does not matter once it is there.
    piped = None in identity["input_digest"]
    unknown = {"processes"} | ({"input_digest"} if piped else set())
    why = difference(
        *({k: v for k, v in x.items() if k not in unknown} for x in (before, identity))
    )
    if not why and piped:
        why = "and whether the piped input is the same cannot be known"
    # All bytes are read: seconds for a large model, and what follows builds on them.
    for name, digest in hashes.items() if not why else ():
        file = folder / name
        if not file.is_file() or manifest.sha256(file) != digest:
            why = f"but {name} is not the one in its manifest"
            break
    if why:
        raise UsageError(f"{folder}: is complete already, {why}", hint="pass --force to replace it")
    console.note(f"{folder}: complete already, with the same options and input")


def _prepare(place: Path, folder: Path, config: Common, identity: dict[str, Any]) -> None:
    """Make ready the folder beside a complete one that is to be replaced.

    It is kept when an earlier start of the same command was interrupted there.
    """
    replace.check_folder(folder, [_CHECKPOINTS])
    replace.check_exchange(folder)
    found = checkpoint.newest(place / _CHECKPOINTS) if place.exists() else None
    same = found is not None and not difference(found[1]["identity"], identity)
    if not (same and config.resume):
        shutil.rmtree(place, ignore_errors=True)
    # It was complete but for the exchange: its last steps are done again.
    (place / replace.MANIFEST).unlink(missing_ok=True)


def first_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The first records of a file of lines, as many as there are up to `count`."""
    if not count or not path.exists():
        return []
    with open(path, "rb") as stream:
        return [orjson.loads(line) for line in itertools.islice(stream, count)]


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
        try:
            orjson.loads(last or b"{}")
        except ValueError as error:
            raise UsageError(
                f"{path}:{count}: no JSON: {error}", hint="pass --force to start again"
            ) from None
        stream.truncate(size)
    return last
