"""What every record stage does around its own work: open, check, window by window, commit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from polarctl import console
from polarctl.config import Common, resolved, shard_of, shown
from polarctl.errors import RecordError, UsageError
from polarctl.parallel.pool import in_order, in_threads
from polarctl.records import Record
from polarctl.storage.read import Reader, RejectSink, Window, expand, stdin_is_missing
from polarctl.storage.write import Output


def inputs_of(stage: str, config: Common) -> list[str]:
    """The input paths of a stage.

    Raises:
        UsageError: Nothing is piped in, or no such file.
    """
    if stdin_is_missing(config.input):
        raise UsageError(
            "no input: name a file or pipe records in", hint=f"polarctl {stage} --help"
        )
    return expand(config.input)


def reader_of(
    config: Common,
    paths: list[str],
    kind: str | Callable[[dict[str, Any]], str] | None,
    *,
    sink: RejectSink | None = None,
    verify: Callable[[Record], None] | None = None,
) -> Reader:
    """A reader with the common options; bad records go to `sink` if `--rejects` is given."""
    return Reader(
        paths,
        kind,
        rejects=sink if config.rejects else None,
        limit=config.limit,
        shard=shard_of(config.shard) if config.shard else (0, 1),
        verify=verify,
    )


def map_windows(
    out: Output,
    reader: Reader,
    work: Callable[[list[Record]], Any],
    take: Callable[[Any], Iterable[dict[str, Any]]] = iter,
    *,
    size: int,
    title: str,
    environments: Sequence[Mapping[str, str]] = (),
    threads: int = 1,
) -> None:
    """Run `work` over each window of rows and commit its records, passing over finished ones.

    Args:
        out: Where the records go.
        reader: Where they come from.
        work: From the records of a window to what is known of them; picklable where there are
            `environments`.
        take: From that to the records that are written; runs here, in order.
        size: Rows of a window.
        title: For the progress bar.
        environments: See `polarctl.parallel.pool.in_order`; the windows are dealt to the processes.
        threads: Windows that are worked on at a time in this process.
    """
    if out.complete:
        return
    # A window is read before its turn, and its bad rows belong to its own commit.
    waiting: deque[tuple[Window, list[Any]]] = deque()
    held = HeldRejects()
    if reader.rejects is not None:
        reader.rejects = held

    def windows() -> Iterator[list[Record]]:
        for window in reader.windows(size, done=out.done, digest=out.digest):
            waiting.append((window, held.rows))
            held.rows = []
            yield window.records

    if threads > 1:
        found = in_threads(windows(), work, threads=threads)
    else:
        found = in_order(
            windows(),
            work,
            environments=environments,
            ahead=2 * len(environments),
            task=f"computes for `{title}`",
            hint="the same command goes on where this one stopped",
        )
    with console.progress(title) as bar:
        for result in found:
            window, bad = waiting.popleft()
            for row in bad:
                out.reject(*row)
            for record in take(result):
                out.write(record)
            out.commit(out.units + 1, window.digest)
            bar.update(reader.rows)


def dry_run(
    stage: str,
    config: Common,
    paths: list[str],
    kind: str | Callable[[dict[str, Any]], str] | None,
    *,
    verify: Callable[[Record], None] | None = None,
    check: Callable[[], None] = lambda: None,
    **facts: Any,
) -> None:
    """Check every input row, name each bad one, and say what would be done; write nothing.

    `check` may refuse the run once all rows are read.

    Raises:
        RecordError: There are bad rows, and no `--rejects` that would set them aside.
    """
    reader = reader_of(config, paths, kind, verify=verify)
    reader.rejects = _Say()
    good = sum(1 for _ in reader)
    if reader.bad and not config.rejects:
        raise RecordError(
            f"{reader.bad:,} of {reader.rows:,} records are bad",
            hint="--rejects FILE sets them aside and goes on",
        )
    check()
    console.note(
        f"{stage}: options and input are good: {good:,} records"
        + (f", {reader.bad:,} bad rows" if reader.bad else ""),
        config=resolved(config),
        records=good,
        bad=reader.bad,
        **facts,
    )
    for key, value in {**shown(config), **facts}.items():
        console.note(f"  {key}: {value}")


class _Say:
    """A sink for dry runs: bad rows are said, not stored."""

    def reject(self, where: str, reason: str, raw: Any = None) -> None:
        """Say the place and the reason."""
        console.warn(f"{where}: {reason}")


class HeldRejects:
    """Keeps bad rows of an input that is read before its output is opened."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, Any]] = []

    def reject(self, where: str, reason: str, raw: Any = None) -> None:
        """Keep one bad row."""
        self.rows.append((where, reason, raw))

    def pass_on(self, out: Output) -> None:
        """Set the rows aside with the first unit of work; an earlier run may have done so."""
        if not out.done:
            for row in self.rows:
                out.reject(*row)
