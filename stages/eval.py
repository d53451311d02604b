r"""Compare rewards with what is known: preference or discrimination accuracy with intervals.

Reads scored records: triples (chosen is better than rejected) or groups with labels. With --model
it scores plain triples and groups first. Writes a verdict per case; the table goes to stderr, the
full report to --report.

`eval run NAME -m MODEL` does a whole benchmark: it converts the published rows of --data (default:
from the Hub), scores them and evaluates, by the three commands that it prints, in the folder -o.
The same command goes on where it stopped.

`eval scaling RUNS...` fits scaling laws to the folders of finished training runs: how their
held-out loss falls with model size, data and compute. -o is a folder for scaling.html, .json and
plots.

\b
polarctl score triples.jsonl -m runs/rm | polarctl eval - -o verdicts.jsonl --report runs/report
polarctl eval run rm-bench -m runs/rm --no-reference -o runs/rm-bench
polarctl eval scaling runs/50m runs/100m runs/200m runs/400m -o runs/laws
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from polarctl.config import Needs
from polarctl.scoring.options import WINDOW_ROWS, ScoreConfig

# Where the published rows are: Hub id, subset, split.
_ON_HUB = {
    "rewardbench": ("allenai/reward-bench", None, "filtered"),
    "rewardbench2": ("allenai/reward-bench-2", None, "test"),
    "rm-bench": ("THU-KEG/RM-Bench", None, "train"),
    "judgebench": ("ScalerLab/JudgeBench", None, "gpt"),
    "rewardmath": ("RewardMATH/RewardMATH", None, None),
    "helpsteer3": ("nvidia/HelpSteer3", "preference", "validation"),
}


def _is_run(config: Any) -> bool:
    """Whether a whole benchmark is run: `eval run NAME`."""
    return config.input[0] == "run" and not os.path.isfile("run")


def _is_scaling(config: Any) -> bool:
    """Whether laws are fitted to runs: `eval scaling RUNS...`."""
    return config.input[0] == "scaling" and not os.path.isfile("scaling")


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    """Options of `polarctl eval`."""

    ABSENT = frozenset({"resume"})  # figures need every case: an interrupted one begins again
    NEEDS = [
        Needs(
            "model no_text by benchmark min_accuracy baseline report seed limit shard force "
            "manifest rejects",
            lambda c: not _is_scaling(c),
            "scored files, not for `eval scaling`",
        ),
        Needs("data reference_field reference_from", _is_run, "`eval run NAME`"),
        Needs(
            "reference_policy",
            lambda c: c.reference_from == "generate",
            "`--reference-from generate`",
        ),
        Needs(
            "benchmark shard manifest rejects trained_on embedding",
            lambda c: not _is_run(c),
            "scored files, not for `eval run NAME`",
        ),
        Needs("no_reference batch_tokens dtype", lambda c: c.model is not None, "--model"),
        Needs("device", lambda c: bool(c.model or c.embedding), "--model or --embedding"),
    ]
    # Checks of the figures, not a part of them.
    NEUTRAL: ClassVar[frozenset[str]] = frozenset({"min_accuracy", "baseline"})

    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="run: the benchmark's rows: a file, a folder, a Hub id."),
    ] = None
    reference_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="run: field of those rows that is the reference."),
    ] = None
    reference_from: Annotated[
        Literal["field", "other-correct", "generate", "none"] | None,
        typer.Option(
            help="run: where references are from: a field of the rows, other correct answers of "
            "the row, a policy, nowhere. Default: the rows' own."
        ),
    ] = None
    reference_policy: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="run: the policy that writes them: a folder, a Hub id."),
    ] = None
    report: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write report.html, .json and plots here.")
    ] = None
    benchmark: Annotated[
        Literal[
            "rewardbench",
            "rewardbench2",
            "rm-bench",
            "judgebench",
            "rewardmath",
            "helpsteer3",
            "m-rewardbench",
            "ppe",
            "rmb",
        ]
        | None,
        typer.Option(
            metavar="NAME",
            help="Score as this benchmark's own code does: rewardbench, rewardbench2, rm-bench, "
            "judgebench, rewardmath, helpsteer3, m-rewardbench, ppe, rmb. `convert --from` makes "
            "the rows.",
        ),
    ] = None
    trained_on: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="FILE",
            help="Triples of pre-training (repeatable): cases between policies are told by what "
            "is new in them, prompts or policies.",
        ),
    ] = ()
    embedding: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="One more baseline: similarity to the reference by the mean hidden state of this "
            "model of transformers.",
        ),
    ] = None
    no_text: Annotated[
        bool,
        typer.Option("--no-text", help="In verdicts, a hash and the length of each text alone."),
    ] = False
    by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Field that groups the table; default: `category`, if it is there; with "
            "--benchmark: `subset`.",
        ),
    ] = None
    min_accuracy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit with status 5 when the accuracy is below this."),
    ] = None
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="REPORT",
            help="Exit with status 5 when worse than this earlier report.json (or its folder), "
            "beyond the interval of the difference.",
        ),
    ] = None


def run(config: Config) -> None:
    """Judge every record of the input and report."""
    if _is_run(config):
        _run_benchmark(config)
        return
    if _is_scaling(config):
        from polarctl.evaluation import scaling_report

        folder = None if config.output == "-" else config.output
        scaling_report.fit_runs(config.input[1:], folder, dry_run=config.dry_run)
        return
    from polarctl import console
    from polarctl.errors import UsageError
    from polarctl.evaluation import heading
    from polarctl.evaluation import report as eval_report
    from polarctl.evaluation.cases import (
        Cases,
        check_by,
        labels_of,
        require_cases,
        require_rewards,
        rewards_of,
        verdicts,
    )
    from polarctl.evaluation.discrimination import TrainedOn
    from polarctl.evaluation.figures import summarise
    from polarctl.evaluation.page import terminal_table
    from polarctl.evaluation.suites import SUITES
    from polarctl.records import Record
    from polarctl.scoring import engines
    from polarctl.scoring.scorer import Cuts, check_scorable, score_records
    from polarctl.storage import manifest, read, windows
    from polarctl.storage import replace as replacing
    from polarctl.storage.write import Output

    paths = windows.inputs_of("eval", config)
    verify: Callable[[Record], None] = require_rewards
    chat = config.model is not None and engines.is_chat(config.model, "auto")
    no_reference = config.no_reference or chat
    if config.model is not None:
        verify = functools.partial(check_scorable, reference=not no_reference)
    fields: set[str] = set()
    suite = SUITES[config.benchmark]() if config.benchmark else None

    def look(record: Record) -> None:
        fields.update(record)
        verify(record)
        if suite is not None:
            suite.check(record, labels_of(record))

    baseline = _baseline(config)
    known = read.expand(config.trained_on)
    if config.dry_run:
        windows.dry_run(
            "eval", config, paths, None, verify=look, check=lambda: check_by(config.by, fields)
        )
        return
    if config.report:
        replacing.check_report(config.report, eval_report.FILES)
    identity = {"model_identity": manifest.folder_identity(config.model)} if config.model else {}
    if config.embedding:
        identity["embedding"] = manifest.folder_identity(config.embedding)
    cases, by = Cases(), "subset" if suite else "category"
    if known:
        identity["trained_on"] = str(read.sizes(known))
        cases.duels.trained_on = TrainedOn.read(read.Reader(known, "triple"))
    # An interrupted evaluation begins again: its units of work are only what leaves the memory.
    anew = replace(config, resume=False)
    with Output("eval", anew, read.sizes(paths), identity) as out:
        if out.complete:
            # The check is asked for again, so it is made again, on the figures in the manifest.
            _check(config, out.counts, baseline)
            return
        scorer = config.model and engines.open_here(
            config.model,
            chat=chat,
            device=config.device,
            dtype=config.dtype,
            batch_tokens=config.batch_tokens,
            no_reference=config.no_reference,
        )
        embedder = None
        if config.embedding is not None:
            from polarctl.evaluation.embedding import Embedder

            embedder = Embedder(config.embedding, config.device)
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
            near = embedder.similarities(window) if embedder else [None] * len(window)
            for record, values in zip(window, near, strict=True):
                if suite is not None:
                    suite.add(record, rewards_of(record), labels_of(record))
                more = {} if values is None else {"embedding": values}
                plain = not config.no_text
                yield from verdicts(record, config.by or by, cases, text=plain, more=more)

        for window in reader.windows(WINDOW_ROWS):
            for verdict in work(window.records):
                out.write(verdict)
            # What may yet be refused as a whole leaves no file.
            good = bool(cases.duels.margins if known else cases.margins)
            if good and (config.by is None or config.by in fields):
                out.commit(out.units + 1, window.digest)
        cuts.say(config.model)
        check_by(config.by, fields)
        require_cases(cases, reader.rows)
        if known and not cases.duels.margins:
            raise UsageError(
                "`--trained-on`: no case is between two policies",
                hint="triples of `polarctl pair` have `policy` and `rejected_policy`",
            )
        report = summarise(cases, config.seed)
        if suite is not None:
            used = dict(cases.references)
            report["benchmark"] = suite.result(config.seed) | {"references": used}
        keep = ("skipped", "overall", "benchmark")
        out.counts.update({name: report[name] for name in keep if name in report})
        out.counts["leaks"] = cases.leaks
        if config.report:
            source = ", ".join(paths) if paths != ["-"] else "standard input"
            head = heading.facts(paths, reader.rows, config.model)
            worst = cases.worst_first()
            eval_report.write(config.report, report, cases.margins, source, worst, head)
            console.note(f"report: {config.report}/report.html")
    for part in eval_report.tables(report):
        console.show(terminal_table(part))
    for reason, number in report["skipped"].items():
        console.warn(f"{number:,} records left out: {reason}")
    if suite is not None:
        if cases.leaks:
            console.warn(
                f"{cases.leaks:,} records have a candidate that is the reference itself: their "
                "rewards measure that, not the model"
            )
        for reason, number in report["benchmark"]["left_out"].items():
            console.warn(f"{number:,} records do not count for {suite.name}: {reason}")
        if missing := report["benchmark"]["missing"]:
            console.warn(f"{suite.name}: no rows of {', '.join(missing)}: `overall` is without")
    _check(config, report, baseline)


def _run_benchmark(config: Config) -> None:
    """Convert, score, evaluate: the three commands, as a user would type them."""
    from polarctl import cli, console
    from polarctl.errors import PolarctlError, UsageError
    from polarctl.evaluation.suites import SUITES

    name = config.input[1] if len(config.input) == 2 else ""
    if name not in SUITES:
        raise UsageError(
            f"`eval run` takes one benchmark{f', and `{name}` is none' if name else ''}",
            hint=f"one of: {', '.join(SUITES)}",
        )
    if config.model is None:
        raise UsageError("`eval run` needs a reward model", hint="--model DIR or a Hub id")
    if config.data is None and name not in _ON_HUB:
        raise UsageError(
            f"`eval run {name}`: its rows are not one data set of the Hub",
            hint="--data with its files",
        )
    source = config.reference_from
    if source == "generate" and config.reference_policy is None:
        raise UsageError("`--reference-from generate` needs a policy", hint="--reference-policy")
    if config.reference_field is not None and source not in (None, "field"):
        raise UsageError(f"`--reference-field` is not for `--reference-from {source}`")
    if config.no_reference and source not in (None, "none"):
        raise UsageError(f"`--no-reference` is not for `--reference-from {source}`")
    folder = Path(config.output)
    if config.output == "-":
        folder = Path(f"{name}-{Path(config.model).name}")
        console.choice("folder", str(folder), "-o names another")
    data, subset, split = (config.data, None, None) if config.data else _ON_HUB[name]
    convert = ["convert", str(data), "--from", name]
    made = "groups.jsonl" if source in (None, "field", "none") else "referenced.jsonl"
    write = ["sample", str(folder / "groups.jsonl"), "--model", str(config.reference_policy)]
    write += ["--samples", "1", "--seed", str(config.seed)]
    score = ["score", str(folder / made), "--model", config.model]
    judge = ["eval", str(folder / "scores.jsonl"), "--benchmark", name]
    judge += ["--report", config.report or str(folder / "report"), "--seed", str(config.seed)]
    for command, flag, value in (
        (convert, "--subset", subset),
        (convert, "--source-split", split),
        (convert, "--limit", config.limit),
        (convert, "--map", config.reference_field and f"reference={config.reference_field}"),
        (write, "--device", config.device),
        (write, "--dtype", config.dtype),
        (score, "--no-reference", config.no_reference or source == "none"),
        (score, "--batch-tokens", config.batch_tokens),
        (score, "--device", config.device),
        (score, "--dtype", config.dtype),
        (judge, "--no-text", config.no_text),
        (judge, "--by", config.by),
        (judge, "--min-accuracy", config.min_accuracy),
        (judge, "--baseline", config.baseline),
    ):
        if value is not None and value is not False:
            command += [flag] if value is True else [flag, str(value)]
    voices = ("quiet", "verbose", "no_color", "json", "force")
    common = [f"--{name.replace('_', '-')}" for name in voices if getattr(config, name)]
    steps = [(convert, "groups.jsonl"), (score, "scores.jsonl"), (judge, "verdicts.jsonl")]
    if source == "generate":
        steps.insert(1, (write, "references.jsonl"))
    if not config.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
    for command, made in steps:
        if command is score and not config.dry_run:
            _add_references(folder, source)
        command += ["-o", str(folder / made), *common]
        console.note(f"polarctl {shlex.join(command)}")
        if config.dry_run:
            continue
        before = console.snapshot()
        status = cli.run(command)
        console.restore(before)
        if status:
            error = PolarctlError(
                f"`polarctl {command[0]}` has ended with exit status {status}",
                hint="the same command goes on from here",
            )
            error.exit_status = status
            raise error


def _add_references(folder: Path, source: str | None) -> None:
    """Write `referenced.jsonl`, where references are not those of the rows."""
    from polarctl import console
    from polarctl.evaluation import reference_source
    from polarctl.storage.read import Reader

    groups = Reader([str(folder / "groups.jsonl")], "candidate")
    if source == "other-correct":
        found, why = reference_source.other_correct(groups), "none has two correct answers"
    elif source == "generate":
        written = Reader([str(folder / "references.jsonl")], "trajectory")
        found, why = reference_source.generated(groups, written), "the policy has written none"
    else:
        return
    number, without = reference_source.write(str(folder / "referenced.jsonl"), found, why)
    console.note(f"{reference_source.WORDS[source]}: {number:,} rows")
    if without:
        console.warn(f"{without:,} rows are left out: they have no such reference")


def _baseline(config: Config) -> dict[str, Any] | None:
    """The report of `--baseline`.

    Raises:
        UsageError: It is none.
    """
    import msgspec

    from polarctl.errors import UsageError
    from polarctl.records import Report

    if config.baseline is None:
        return None
    path = Path(config.baseline)
    path = path / "report.json" if path.is_dir() else path
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        msgspec.convert(found, Report)
        found["overall"]["model"]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path}: is no report of `polarctl eval`", hint="the report.json of --report"
        ) from None
    return found


def _check(config: Config, report: dict[str, Any], baseline: dict[str, Any] | None) -> None:
    """Raise CheckFailed when a check that was asked for does not hold."""
    from polarctl import console
    from polarctl.errors import CheckFailed
    from polarctl.evaluation.paired import unpaired
    from polarctl.evaluation.report import headline

    accuracy = report["overall"]["model"]["value"]
    if config.min_accuracy is not None and accuracy < config.min_accuracy:
        raise CheckFailed(f"accuracy {accuracy:.4f} is below {config.min_accuracy}")
    if baseline is None:
        return
    what, now = headline(report)
    before_what, before = headline(baseline)
    if what != before_what:  # one of them was made with another --benchmark
        what, now, before = "accuracy", report["overall"]["model"], baseline["overall"]["model"]
    if now["n"] != before["n"]:
        console.warn(f"the baseline is over {before['n']:,} cases, this over {now['n']:,}")
    low, high = (100 * end for end in unpaired(before, now))
    change = 100 * (now["value"] - before["value"])
    told = f"{what} {now['value']:.4f}, baseline {before['value']:.4f}: "
    told += f"{change:+.1f} points [{low:+.1f}, {high:+.1f}]"
    if high < 0:
        hint = "`polarctl compare` of the two scored files shows where"
        raise CheckFailed(f"worse than the baseline: {told}", hint=hint)
    console.note(told)
