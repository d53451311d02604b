r"""Compare rewards with what is known: preference or discrimination accuracy with intervals.

Reads scored records: triples (chosen is better than rejected) or groups with labels. With --model
it scores plain triples and groups first. Writes a verdict per case; the table goes to stderr, the
full report to --report.

\b
polarctl score triples.jsonl -m runs/rm | polarctl eval - -o verdicts.jsonl --report runs/report
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

from polarctl.config import Needs
from polarctl.scoring.options import WINDOW_ROWS, ScoreConfig


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    """Options of `polarctl eval`."""

    ABSENT = frozenset({"resume"})  # figures need every case: an interrupted one begins again
    NEEDS = [
        Needs("no_reference batch_tokens device dtype", lambda c: c.model is not None, "--model"),
    ]
    # A check of the figures, not a part of them.
    NEUTRAL: ClassVar[frozenset[str]] = frozenset({"min_accuracy"})

    report: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write report.html, .json and plots here.")
    ] = None
    by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Field that groups the table; default: `category`, if it is there.",
        ),
    ] = None
    min_accuracy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit with status 5 when the accuracy is below this."),
    ] = None


def run(config: Config) -> None:
    """Judge every record of the input and report."""
    from polarctl import console
    from polarctl.evaluation import report as eval_report
    from polarctl.evaluation.cases import (
        Cases,
        check_by,
        require_cases,
        require_rewards,
        summarise,
        verdicts,
    )
    from polarctl.evaluation.page import terminal_table
    from polarctl.records import Record, check_scorable
    from polarctl.scoring import engines
    from polarctl.scoring.scorer import Cuts, score_records
    from polarctl.storage import manifest, read, replace, windows
    from polarctl.storage.write import Output

    paths = windows.inputs_of("eval", config)
    verify: Callable[[Record], None] = require_rewards
    chat = config.model is not None and engines.is_chat(config.model, "auto")
    no_reference = config.no_reference or chat
    if config.model is not None:
        verify = functools.partial(check_scorable, reference=not no_reference)
    fields: set[str] = set()

    def look(record: Record) -> None:
        fields.update(record)
        verify(record)

    if config.dry_run:
        windows.dry_run(
            "eval", config, paths, None, verify=look, check=lambda: check_by(config.by, fields)
        )
        return
    if config.report:
        replace.check_report(config.report, eval_report.FILES)
    identity = {"model_identity": manifest.folder_identity(config.model)} if config.model else {}
    cases = Cases()
    with Output("eval", config, read.sizes(paths), identity) as out:
        if out.complete:
            # The check is asked for again, so it is made again, on the figures in the manifest.
            _check_accuracy(config, out.counts["overall"])
            return
        scorer = config.model and engines.open_here(
            config.model,
            chat=chat,
            device=config.device,
            dtype=config.dtype,
            batch_tokens=config.batch_tokens,
            no_reference=config.no_reference,
        )
        cuts = Cuts()
        reader = windows.reader_of(config, paths, None, on_bad=out.reject, verify=look)

        def work(window: list[Record]) -> Any:
            if scorer:
                scored = list(score_records(window, scorer, no_reference=no_reference))
                for _, details in scored:
                    cuts.add(details)
                window = [
                    Record(fields, old.where)
                    for old, (fields, _) in zip(window, scored, strict=True)
                ]
            for record in window:
                yield from verdicts(record, config.by or "category", cases)

        # Figures need every case, so an interrupted evaluation begins again.
        for window in reader.windows(WINDOW_ROWS):
            for verdict in work(window.records):
                out.write(verdict)
        cuts.say()
        check_by(config.by, fields)
        require_cases(cases, reader.rows)
        report = summarise(cases, config.seed)
        out.counts.update(skipped=report["skipped"], overall=report["overall"])
        if config.report:
            source = ", ".join(paths) if paths != ["-"] else "standard input"
            eval_report.write(config.report, report, cases.margins, source)
            console.note(f"report: {config.report}/report.html")
    tables = [
        eval_report.table(report),
        eval_report.best_of_n_table(report),
        eval_report.ranking_table(report),
    ]
    for part in tables:
        if part is not None:
            console.show(terminal_table(part))
    for reason, number in report["skipped"].items():
        console.warn(f"{number:,} records left out: {reason}")
    _check_accuracy(config, report["overall"])


def _check_accuracy(config: Config, overall: dict[str, Any]) -> None:
    """Raise CheckFailed when the model's accuracy is below `--min-accuracy`."""
    from polarctl.errors import CheckFailed

    accuracy = overall["model"]["value"]
    if config.min_accuracy is not None and accuracy < config.min_accuracy:
        raise CheckFailed(f"accuracy {accuracy:.4f} is below {config.min_accuracy}")
