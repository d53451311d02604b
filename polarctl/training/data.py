"""The training data as a stream: any number of triples in the memory of a few.

    files, shuffled by epoch ─> rows, checked ─> held out or kept ─> shuffle buffer ─> this process
    ─> token ids, made ahead of the model

Nothing is written and nothing is tokenized beforehand. The order follows from the seed, the epoch
and the files alone, so a run goes on at item N by passing over N items. Of several processes each
reads its own files, where there are enough of them; else all read everything in one order and
take turns, so that two processes train on the batches of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from polarctl import console, seeding
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.model.conversation import ChatEncoder
from polarctl.model.template import Encoder, content_text
from polarctl.parallel import rank as ranks
from polarctl.parallel.pool import in_order
from polarctl.records import Record
from polarctl.storage.read import REJECTS, STDIN, OnBad, Reader

VAL_TRIPLES = 1024  # validation triples that are kept; all that are held out stay out of training
SAMPLE = 512  # triples that stand for the whole, for estimates
_LOOK_FOR_VAL = 200_000  # training triples to read on for them where the data is not counted
_SAY_EVERY = 1000  # rows
_MESSAGE = 8  # records a message to a worker
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where training data comes from.

    Attributes:
        paths: Files; a pipe has to be on disk first (`on_disk`).
        verify: Raises RecordError for a record that does not fit.
        on_bad: What happens to a bad row; None: the first one is an error.
        limit: Rows to read at most, or None.
        val_fraction: Share of the prompts that are held out.
        seed: Seed of the order.
        window: Rows in the shuffle buffer.
    """

    paths: list[str]
    verify: Callable[[Record], None]
    on_bad: OnBad | None = None
    limit: int | None = None
    val_fraction: float = 0.0
    seed: int = 0
    window: int = 10_000

    def reader(self, paths: list[str], on_bad: OnBad | None) -> Reader:
        """A reader of some of the files."""
        return Reader(
            paths, None, on_bad=on_bad, limit=self.limit, verify=self.verify, hint=REJECTS
        )

    def holds_out(self, record: Record) -> bool:
        """Whether a record is for validation: its prompt decides, not its place or the seed."""
        if not self.val_fraction:
            return False
        text = content_text(record["prompt"]).encode("utf-8", "surrogatepass")
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return number < self.val_fraction * 2**64


@dataclass(kw_only=True)
class Survey:
    """What one pass over the data finds.

    Attributes:
        triples: Training triples.
        held_out: Validation triples.
        bad: Bad rows.
        bytes: Bytes of all rows that were read, uncompressed.
        complete: Everything was read; else these are the figures of its beginning.
        sample: A random sample of the training triples.
        held_out_records: The first validation triples.
    """

    triples: int = 0
    held_out: int = 0
    bad: int = 0
    bytes: int = 0
    complete: bool = True
    sample: list[Record] = field(default_factory=list)
    held_out_records: list[Record] = field(default_factory=list)


def survey(source: Source, *, stop_after: int | None = None) -> Survey:
    """Check and count every row, and keep a sample.

    Args:
        source: The data.
        stop_after: Training triples after which to stop; None: read everything. Where triples are
            held out it reads on until validation has enough, or has had 200,000 more to find them.

    Raises:
        RecordError: A bad row and no `on_bad`; no good row.
    """
    found = Survey()
    rng = seeding.rng(source.seed, "sample")
    reader = source.reader(source.paths, source.on_bad)
    with console.progress("read", None, "rows") as bar:
        for number, (where, line) in enumerate(reader.lines(), 1):
            if number % _SAY_EVERY == 0:
                bar.update(number)
            found.bytes += len(line)
            record = reader.parse(where, line)
            if record is None:
                continue
            if source.holds_out(record):
                found.held_out += 1
                if len(found.held_out_records) < VAL_TRIPLES:
                    found.held_out_records.append(record)
            else:
                found.triples += 1
                # Vitter's algorithm R: every triple so far is in the sample with equal chance.
                if len(found.sample) < SAMPLE:
                    found.sample.append(record)
                elif (place := rng.randrange(found.triples)) < SAMPLE:
                    found.sample[place] = record
            if stop_after is not None and found.triples >= stop_after:
                enough = not source.val_fraction or found.held_out >= VAL_TRIPLES
                if enough or found.triples >= stop_after + _LOOK_FOR_VAL:
                    found.complete = False
                    break
    found.bad = reader.bad
    if not found.triples:
        raise RecordError("no good record to train on", where=", ".join(source.paths))
    if found.held_out > VAL_TRIPLES:
        console.note(f"validation uses {VAL_TRIPLES:,} of {found.held_out:,} held-out triples")
    return found


def stream(source: Source, *, world: int, rank: int, skip: int = 0) -> Iterator[Record]:
    """This process's training records, epoch after epoch without end.

    Where processes read their own files, one with fewer rows begins its next epoch earlier. Bad
    rows are passed over where there is an `on_bad`: the survey has set them aside.

    Args:
        source: The data.
        world: Number of processes.
        rank: Number of this one.
        skip: Records to pass over: those that earlier steps have used.

    Raises:
        RecordError: A bad row and no `on_bad`; nothing to train on for this process.
    """
    by_files = 1 < world <= len(source.paths) and source.limit is None
    if world > 1:
        how = "its own files" if by_files else "every row of all files, in turn"
        console.choice("data", how, f"{len(source.paths)} files for {world} processes")
    part, parts = (rank, world) if by_files else (0, 1)
    # The survey has said and kept them.
    pass_over = None if source.on_bad is None else lambda *bad: None
    position = epoch = 0
    while True:
        for item in _epoch(source, epoch, part, parts, pass_over):
            if by_files or position % world == rank:
                if skip:
                    skip -= 1
                else:
                    record = item()
                    if record is not None:
                        yield record
            position += 1
        if not position:  # a later share without a triple only makes way for the next epoch
            raise RecordError(
                f"no training triple for process {rank} of {world}",
                hint="fewer processes, or files of like size",
            )
        epoch += 1


_Item = Callable[[], "Record | None"]


def _epoch(
    source: Source, epoch: int, part: int, parts: int, on_bad: OnBad | None
) -> Iterator[_Item]:
    """One pass over a share of the files, shuffled; each item is called for its record."""
    paths = list(source.paths)
    if source.limit is None:  # a limit means the first rows
        seeding.rng(source.seed, "files", epoch).shuffle(paths)
    rng = seeding.rng(source.seed, "rows", epoch, part)
    buffer: list[_Item] = []
    for item in _items(source, paths[part::parts], on_bad):
        if len(buffer) < source.window:
            buffer.append(item)
            continue
        place = rng.randrange(source.window)
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer


def _items(source: Source, paths: list[str], on_bad: OnBad | None) -> Iterator[_Item]:
    """The training rows of some files.

    Where no row can turn out to be bad or held out, rows are only parsed when their turn comes: a
    resume passes over the others at the speed of reading.
    """
    reader = source.reader(paths, on_bad)
    lazy = not source.val_fraction and on_bad is None
    for where, line in reader.lines():
        if lazy:
            yield lambda where=where, line=line: reader.parse(where, line)  # type: ignore[misc]
        else:
            record = reader.parse(where, line)
            if record is not None and not source.holds_out(record):
                yield lambda record=record: record  # type: ignore[misc]


def on_disk(paths: list[str], scratch: Path) -> list[str]:
    """The paths, with a pipe replaced by a copy: it is read more than once.

    Args:
        paths: Files, named pipes, or `-` for stdin.
        scratch: Folder of the copies.

    Raises:
        UsageError: A pipe, and this is one of several processes.
        PolarctlError: A copy cannot be written.
    """
    pipes = [path for path in paths if not os.path.isfile(path)]
    if pipes and ranks.count() > 1:
        raise UsageError(
            "several processes cannot read one pipe", hint="write the triples to a file"
        )
    copies = {path: scratch / f"pipe-{number}" for number, path in enumerate(pipes)}
    if "-" in copies:
        copies["-"] = scratch / STDIN
    for path, copy in copies.items():
        try:
            _copy(path, copy)
        except OSError as error:
            raise PolarctlError(
                f"{copy}: cannot be written: {error.strerror}", hint="write the triples to a file"
            ) from None
    return [str(copies.get(path, path)) for path in paths]


def _copy(path: str, copy: Path) -> None:
    with contextlib.ExitStack() as stack, open(copy, "wb") as target:
        pipe = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        shutil.copyfileobj(pipe, target, 1 << 20)


# -- tokenizing, ahead of the model ----------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """An encoded triple.

    Attributes:
        ids: Token ids: chosen, then the rejected ones.
        margin: The record's own margin.
        cut: Pieces that were longer than the template.
    """

    ids: tuple[list[int], ...]
    margin: float = 0.0
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class TripleEncoder:
    """From a triple to its token ids.

    Attributes:
        encoder: The reward model's template.
        negatives: Rejected trajectories that are used at most.
    """

    encoder: Encoder | ChatEncoder
    negatives: int = 1

    def __call__(self, record: Record) -> Group:
        """The triple's group, with one prompt budget for all of its candidates.

        Raises:
            RecordError: A text that cannot be encoded.
        """
        rejected = [record["rejected"], *record.get("negatives", ())][: self.negatives]
        try:
            found = self.encoder.report_group(
                record["prompt"],
                record["reference"],
                [record["chosen"], *rejected],
                record.get("wrapper", "sft"),
            )
        except (ValueError, RecordError) as error:
            raise RecordError(str(error), where=record.where) from None
        cut = {piece for encoded in found for piece in encoded.cut}
        return Group(tuple(e.ids for e in found), record.get("margin", 0.0), tuple(sorted(cut)))


def default_workers(device_type: str, processes: int) -> int:
    """Workers of a process, said with the reason.

    Args:
        device_type: Where the model computes: `cpu` or `cuda`.
        processes: Processes of this machine that train.
    """
    cores = os.cpu_count() or 1
    if device_type == "cpu":
        console.choice("workers", "0", "the model computes on the same cores")
        return 0
    count = min(8, max(0, cores // processes - 1))
    console.choice("workers", str(count), f"{cores} cores for {processes} training processes")
    return count


def encoded(
    records: Iterator[Record], encode: Callable[[Record], T], *, workers: int, ahead: int
) -> Iterator[T]:
    """What `encode` gives for each record, in order; see `polarctl.parallel.pool.in_order`.

    Args:
        records: What to encode; read `ahead` records before their turn.
        encode: A function that can be pickled; importable, not of the main program.
        workers: Processes; 0: none beside this one.
        ahead: Records that are under way.
    """
    return in_order(
        records,
        encode,
        environments=[{"OMP_NUM_THREADS": "1"}] * workers,
        ahead=ahead,
        message=_MESSAGE,
        task="tokenizes",
        hint="fewer --workers need less memory; the same command goes on from the checkpoint",
    )
