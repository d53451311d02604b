"""What every record stage does around its own work: open, check, window by window, commit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from polarctl import console
from polarctl.config import Common, resolved, shard_of, shown
from polarctl.errors import RecordError, UsageError
from polarctl.parallel import ray_pool
from polarctl.parallel.pool import in_order, in_threads
from polarctl.records import Record
from polarctl.storage.read import REJECTS, OnBad, Reader, Window, expand, stdin_is_missing
from polarctl.storage.write import Output


def inputs_of(
    stage: str, config: Common, paths_of: Callable[[Iterable[str]], list[str]] = expand
) -> list[str]:
    """The input paths of a stage.

    Args:
        stage: Its name.
        config: Its options.
        paths_of: From what the user names to paths; a stage may read more than files.

    Raises:
        UsageError: Nothing is piped in, or no such file.
    """
    if stdin_is_missing(config.input):
        raise UsageError(
            "no input: name a file or pipe records in", hint=f"polarctl {stage} --help"
        )
    return paths_of(config.input)


def reader_of(
    config: Common,
    paths: list[str],
    kind: str | Callable[[dict[str, Any]], str] | None,
    *,
    on_bad: OnBad | None = None,
    verify: Callable[[Record], None] | None = None,
    make: Callable[..., Reader] = Reader,
) -> Reader:
    """A reader with the common options, by `make`; `on_bad` is called if `--rejects` is given."""
    return make(
        paths,
        kind,
        on_bad=on_bad if config.rejects else None,
        limit=config.limit,
        shard=shard_of(config.shard) if config.shard else (0, 1),
        verify=verify,
        hint=None if "rejects" in config.ABSENT else REJECTS,
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
    placement: ray_pool.Placement | None = None,
    threads: int = 1,
    counted: bool = False,
) -> None:
    """Run `work` over each window of rows and commit its records, passing over finished ones.

    Args:
        out: Where the records go.
        reader: Where they come from.
        work: From the records of a window to what is known of them; picklable where there are
            `environments` or a `placement`.
        take: From that to the records that are written; runs here, in order.
        size: Rows of a window.
        title: For the progress bar.
        environments: See `polarctl.parallel.pool.in_order`; the windows are dealt to the processes.
        placement: See `polarctl.parallel.ray_pool.in_order`, in place of `environments`.
        threads: Windows that are worked on at a time in this process.
        counted: Count the rows first, so that the time left can be said: for slow work.
    """
    if out.complete:
        return
    # A window is read before its turn, and its bad rows belong to its own commit.
    waiting: deque[tuple[Window, list[Any]]] = deque()
    held: list[tuple[str, str, Any]] = []
    if reader.on_bad is not None:
        reader.on_bad = lambda *row: held.append(row)

    def windows() -> Iterator[list[Record]]:
        for window in reader.windows(size, done=out.done, digest=out.digest):
            waiting.append((window, held.copy()))
            held.clear()
            yield window.records

    task, hint = f"computes for `{title}`", "the same command goes on where this one stopped"
    if threads > 1:
        found = in_threads(windows(), work, threads=threads)
    elif placement is not None:
        found = ray_pool.in_order(windows(), work, placement=placement, task=task, hint=hint)
    else:
        found = in_order(
            windows(),
            work,
            environments=environments,
            ahead=2 * len(environments),
            task=task,
            hint=hint,
        )
    total = reader.total() if counted else None
    with console.progress(title, total) as bar:
        for result in found:
            window, bad = waiting.popleft()
            for row in bad:
                out.reject(*row)
            for record in take(result):
                out.write(record)
            out.commit(out.units + 1, window.digest)
            bar.update(reader.rows)


class BadRows:
    """Says what is wrong with rows: each reason once, and at the end how often it came again.

    Args:
        say: Called with a message.
    """

    most_reasons = 20  # in memory and on the screen

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.again: dict[str, tuple[int, str]] = {}
        self.others = 0

    def __call__(self, where: str, reason: str, raw: Any) -> None:
        """Take a bad row; see `polarctl.storage.read.OnBad`."""
        if reason in self.again:
            self.again[reason] = (self.again[reason][0] + 1, where)
        elif len(self.again) < self.most_reasons:
            self.again[reason] = (0, where)
            self.say(f"{where}: {reason}")
        else:
            self.others += 1

    def finish(self) -> None:
        """Say how often each reason came again."""
        for reason, (count, last) in self.again.items():
            if count:
                self.say(f"{reason}: {count:,} more such rows, the last is {last}")
        if self.others:
            self.say(f"{self.others:,} more rows are bad for other reasons")


def dry_run(
    stage: str,
    config: Common,
    paths: list[str],
    kind: str | Callable[[dict[str, Any]], str] | None,
    *,
    verify: Callable[[Record], None] | None = None,
    check: Callable[[], Any] = lambda: None,
    make: Callable[..., Reader] = Reader,
    **facts: Any,
) -> None:
    """Check every input row, name the bad ones, and say what would be done; write nothing.

    Rows that are bad for the same reason are named once, with their number.

    `check` may refuse the run once all rows are read.

    Raises:
        RecordError: There are bad rows, and no `--rejects` that would set them aside.
    """
    reader = reader_of(config, paths, kind, verify=verify, make=make)
    bad = BadRows(console.warn)
    reader.on_bad = bad
    good = sum(1 for _ in reader)
    bad.finish()
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


def set_aside(out: Output, rows: Iterable[tuple[str, str, Any]]) -> None:
    """Reject the bad rows of an input that was read before its output was opened.

    They go with the first unit of work, so an earlier run may have done it.
    """
    if not out.done:
        for row in rows:
            out.reject(*row)
