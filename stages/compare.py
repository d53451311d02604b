r"""Compare reward models on the same items: paired differences with intervals, in words.

Reads two or more scored files (or folders of `eval run`), each the same records with the rewards
of another model; the first is what the others are compared with. Items are matched by id and
content. Writes the cases that the models disagree on; the tables go to stderr.

\b
polarctl compare main-scores.jsonl new-scores.jsonl -o disagreements.jsonl
polarctl compare runs/main runs/new --fail-if-worse --report runs/comparison
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from polarctl.config import Common

UNIT = 512  # cases that are written at a time


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl compare`."""

    # Figures need every case, and a window of one file is none of the others'.
    ABSENT = frozenset({"resume", "limit", "shard", "rejects"})
    # A check of the figures, not a part of them.
    NEUTRAL: ClassVar[frozenset[str]] = frozenset({"fail_if_worse"})

    input: Annotated[
        tuple[str, ...],
        typer.Argument(
            metavar="FIRST OTHER...", help="Scored files, or folders that hold a `scores.jsonl`."
        ),
    ] = ()
    by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Field that groups the table; default: `category`, else `subset`, if it is there.",
        ),
    ] = None
    report: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write report.html, report.json and report.md here."),
    ] = None
    no_text: Annotated[
        bool,
        typer.Option("--no-text", help="In the output, a hash and the length of each text alone."),
    ] = False
    fail_if_worse: Annotated[
        bool,
        typer.Option(
            "--fail-if-worse",
            help="Exit with status 5 when another is worse than the first, beyond the interval.",
        ),
    ] = False


def run(config: Config) -> None:
    """Compare the files."""
    from polarctl import console
    from polarctl.errors import RecordError, UsageError
    from polarctl.evaluation import comparison, heading
    from polarctl.evaluation.cases import check_by, require_rewards
    from polarctl.evaluation.page import terminal_table
    from polarctl.evaluation.paired import Sheet, matched
    from polarctl.storage import read, windows
    from polarctl.storage import replace as replacing
    from polarctl.storage.write import Output

    paths = [_file_of(path) for path in config.input]
    if len(paths) < 2:
        raise UsageError("two scored files or more are compared", hint="polarctl compare --help")
    names = comparison.names_of(paths)
    fields: set[str] = set()

    def sheet_of(name: str, path: str) -> Sheet:
        sheet = Sheet(name)
        for record in windows.reader_of(config, [path], None, verify=require_rewards):
            fields.update(record)
            by = config.by or ("category" if "category" in record else "subset")
            sheet.add(record, by)
        return sheet

    if config.report:
        replacing.check_report(config.report, comparison.FILES)
    if config.dry_run:
        for name, path in zip(names, paths, strict=True):
            console.note(f"compare: {path}: {len(sheet_of(name, path).items):,} items")
        check_by(config.by, fields)
        return
    # An interrupted comparison begins again: its units of work are only what leaves the memory.
    with Output("compare", replace(config, resume=False), read.sizes(paths)) as out:
        if out.complete:
            _check(config, out.counts["comparison"])
            return
        sheets = [sheet_of(name, path) for name, path in zip(names, paths, strict=True)]
        check_by(config.by, fields)
        keys = matched(sheets)
        if not keys:
            raise RecordError(
                "the files have no item in common",
                hint="the same records (id, prompt, answers, labels), scored by several models",
            )
        report = comparison.compare(sheets, keys, config.seed)
        first = windows.reader_of(config, paths[:1], None)
        cases = comparison.disagreements(first, sheets, set(keys), text=not config.no_text)
        for place, case in enumerate(cases, 1):
            out.write(case)
            if place % UNIT == 0:
                out.commit(out.units + 1)
        out.counts["comparison"] = report
        if config.report:
            comparison.write(config.report, report, heading.facts(paths, report["items"]))
            console.note(f"report: {config.report}/report.html")
    for part in comparison.tables(report):
        console.show(terminal_table(part))
    for sentence in report["verdicts"]:
        console.note(sentence)
    for name, left in report["unmatched"].items():
        if left["absent"]:
            console.warn(f"{name}: {left['absent']:,} items are not in every file: left out")
        if left["content"]:
            console.warn(
                f"{name}: {left['content']:,} items have an id of another file and other content: "
                "left out"
            )
    _check(config, report)


def _file_of(path: str) -> str:
    """A scored file, or that of a folder."""
    from polarctl.errors import UsageError

    inside = Path(path, "scores.jsonl")
    if os.path.isdir(path) and inside.is_file():
        return str(inside)
    if not os.path.isfile(path):
        what = "holds no scores.jsonl" if os.path.isdir(path) else "no such file"
        raise UsageError(f"{path}: {what}", hint="files that `polarctl score` writes")
    return path


def _check(config: Config, report: dict[str, Any]) -> None:
    """Raise CheckFailed when another is worse, and that was to be an error."""
    from polarctl.errors import CheckFailed
    from polarctl.evaluation.paired import sign

    worse = [name for name, found in report["differences"].items() if sign(found) < 0]
    if config.fail_if_worse and worse:
        raise CheckFailed(f"worse than {report['first']}: {', '.join(worse)}")
