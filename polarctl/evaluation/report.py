"""The report of an evaluation: table, JSON, plots, one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polarctl.evaluation.cases import interval_of
from polarctl.evaluation.page import (
    Document,
    Excerpt,
    Image,
    Marks,
    Section,
    Table,
    difference,
    format_interval,
    write_report,
)
from polarctl.evaluation.reference_source import WORDS
from polarctl.model.template import content_text

if TYPE_CHECKING:
    from polarctl.evaluation.plots import Drawing

FILES = (
    *(
        f"{name}.{kind}"
        for name in ("margins", "accuracy", "calibration", "policies", "distance")
        for kind in ("png", "svg")
    ),
    "report.html",
    "report.json",
    "report.md",
)
_PAIRS = 10  # of policies, in the table of those that are told apart worst
SCORERS = {
    "model": "model",
    "length": "longer wins",
    "overlap": "word overlap (F1)",
    "numbers": "number overlap (F1)",
    "embedding": "embedding similarity",
}


def table(report: Mapping[str, Any]) -> Table:
    """Accuracy of the model and of the baselines, overall and by category."""
    names = list(report["overall"])
    rows = [_row("all", report["overall"], names)]
    rows += [_row(category, row, names) for category, row in report["categories"].items()]
    return Table(
        ("category", "cases", *(SCORERS.get(name, name) for name in names), "random"),
        rows,
        f"{report['metric']}, 95 % intervals over prompts",
    )


def _row(label: str, figures: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cases = f"{next(iter(figures.values()))['n']:,}"
    told = (format_interval(interval_of(figures[name])) for name in names)
    return [label, cases, *told, "50.0 %"]


def best_of_n_table(report: Mapping[str, Any]) -> Table | None:
    """Mean label of the candidate that each scorer ranks first, or None without groups."""
    whole = report.get("best_of_n")
    if not whole:
        return None
    decided = report.get("best_of_n_decided", {})
    groups = next(iter(whole.values()))["n"]
    some = next(iter(decided.values()))["n"] if decided else 0
    return Table(
        ("ranked by", f"all {groups:,} groups", f"{some:,} decided groups"),
        [
            [SCORERS.get(name, name), _share(figure), _share(decided.get(name))]
            for name, figure in whole.items()
        ],
        "best of n: mean label of the first; a decided group is neither all right nor all wrong",
    )


def bias_table(report: Mapping[str, Any]) -> Table | None:
    """How sure the model is of itself, and whether it likes length."""
    bias = report.get("length_bias")
    if bias is None:
        return None

    def number(name: str) -> str:
        return f"{bias[name]['n']:,}" if name in bias else "0"

    cases = f"{report['overall']['model']['n']:,}"
    longer = {"longer_is_worse": "accuracy, the worse is longer"}
    longer["longer_is_better"] = "accuracy, the better is longer"
    rows = [[text, number(name), _share(bias.get(name))] for name, text in longer.items()]
    if "correlation" in bias:
        rows.append(["correlation of reward and length", cases, f"{bias['correlation']:+.3f}"])
    rows.append(["calibration error (ECE)", cases, f"{report['calibration']['ece']:.3f}"])
    return Table(("length and calibration", "cases", "figure"), rows)


def _share(figure: Mapping[str, Any] | None) -> str:
    return format_interval(interval_of(figure)) if figure else "n/a"


def ranking_table(report: Mapping[str, Any]) -> Table | None:
    """Rank agreement with the labels, or None without groups of three."""
    figures = report.get("ranking")
    if not figures:
        return None
    names = list(figures["kendall_tau_b"])
    heads = {"kendall_tau_b": "Kendall tau-b", "ndcg": "NDCG"}
    rows = [
        [SCORERS.get(name, name), *(_number(figures[metric].get(name)) for metric in figures)]
        for name in names
    ]
    groups = figures["kendall_tau_b"][names[0]]["n"]
    return Table(
        ("ordered by", *(heads[metric] for metric in figures)),
        rows,
        f"order within {groups} groups of three or more, 95 % intervals over prompts",
    )


def agreement_table(report: Mapping[str, Any]) -> Table | None:
    """Whether the references of a prompt agree, or None where no prompt has several."""
    found = report.get("reference_agreement")
    if not found:
        return None
    rows = []
    for name, label, text in (
        ("same_order", "pairs of candidates in the same order", _share),
        ("kendall_tau_b", "Kendall tau-b of the orders, three or more", _number),
    ):
        if name in found:
            rows.append([label, f"{found[name]['n']:,}", text(found[name])])
    heads = ("two references of one prompt", "records", "figure")
    return Table(heads, rows, "agreement of references, 95 % intervals over prompts")


def benchmark_table(report: Mapping[str, Any]) -> Table | None:
    """The benchmark's own score, or None without `--benchmark`."""
    found = report.get("benchmark")
    if not found:
        return None

    def row(name: str, value: float, number: int, ends: Sequence[float]) -> list[str]:
        return [
            name,
            f"{number:,}",
            f"{100 * value:.2f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]",
        ]

    ends, counts = found["intervals"], found["counts"]
    rows = [row("overall", found["overall"], found["rows"], ends["overall"])]
    rows += [row(name, v, counts[name], ends[name]) for name, v in found["sections"].items()]
    rows += [[name, "0", "n/a"] for name in found["missing"]]
    used = found.get("references") or {"none": 0}
    told = ", ".join(
        WORDS[name] + (f" ({number:,})" if len(used) > 1 else "") for name, number in used.items()
    )
    return Table(
        ("section", "items", "score, %"),
        rows,
        f"{found['name']}: its own score, 95 % intervals over items; {told}",
    )


def discrimination_table(report: Mapping[str, Any]) -> Table | None:
    """Accuracy and loss of telling policies apart, or None without triples between policies."""
    found = report.get("discrimination")
    if not found:
        return None
    rows = [
        [name, f"{part['loss']['n']:,}", _share(part["accuracy"]), _number(part["loss"])]
        for name, part in found["parts"].items()
    ]
    told = f"telling {len(found['policies']):,} policies apart; loss: -log sigmoid(margin), 0.693 "
    return Table(("cases with", "cases", "accuracy", "loss"), rows, told + "knows nothing")


def _discrimination(found: Mapping[str, Any]) -> tuple[list[Section], dict[str, Drawing]]:
    """What the page says of pairs of policies, and its plots by file name."""
    from polarctl.evaluation import policy_plots

    cells = {(c["policy"], c["rejected_policy"]): c["accuracy"] for c in found["matrix"]}
    names = found["policies"]
    pictures = {
        "policies.png": policy_plots.heat_map(names, cells, title="Accuracy by pair of policies")
    }
    worst = sorted(found["matrix"], key=lambda cell: (cell["accuracy"], -cell["n"]))[:_PAIRS]
    rows = [
        [
            c["policy"],
            c["rejected_policy"],
            f"{c['n']:,}",
            _share({**c, "value": c["accuracy"]}),
            f"{c['loss']:.3f}",
        ]
        for c in worst
    ]
    heads = ("policy", "rejected policy", "cases", "accuracy", "loss")
    told = f"the {len(rows)} lowest of {len(found['matrix']):,} pairs; Wilson intervals"
    heat = [Image(pictures["policies.png"], "Heat map of accuracy, policy by rejected policy")]
    sections = [Section("Pairs of policies", table=Table(heads, rows, told), images=heat)]
    distance = found.get("distance")
    if distance is not None:
        picture = policy_plots.accuracy_by_distance(
            distance["pairs"], distance["bins"], title="Are distant policies told apart better?"
        )
        pictures["distance.png"] = picture
        said = []
        if "correlation" in distance:
            said.append(
                f"Spearman's rank correlation of distance and accuracy over "
                f"{len(distance['pairs']):,} pairs of policies: {distance['correlation']:+.3f}."
            )
        image = Image(picture, "Accuracy against the distance of two policies")
        sections.append(Section("Distance of policies", said, images=[image]))
    return sections, pictures


def _number(figure: Mapping[str, Any] | None) -> str:
    """A figure that is not a share: 0.512 [0.480, 0.544]."""
    if figure is None:
        return ""
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def headline(report: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The one figure of a report, as an `Estimate`, and its name: the benchmark's or accuracy."""
    found = report.get("benchmark")
    if not found:
        return "accuracy", report["overall"]["model"]
    low, high = found["intervals"]["overall"]
    figure = {"value": found["overall"], "low": low, "high": high, "n": found["rows"]}
    return str(found["name"]), figure


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report, for the terminal."""
    made = [
        benchmark_table(report),
        table(report),
        discrimination_table(report),
        best_of_n_table(report),
        ranking_table(report),
        agreement_table(report),
        bias_table(report),
    ]
    return [part for part in made if part is not None]


def _case(place: int, verdict: Mapping[str, Any]) -> Section:
    """A case that the model has wrong: what it saw, what it gave, and where the answers differ."""
    texts = {name: _text(value) for name, value in verdict["texts"].items()}
    right, wrong = verdict["rewards"]
    names = [f" ({verdict[side]})" if side in verdict else "" for side in ("better", "worse")]
    parts: list[tuple[str, str, Marks]] = [("prompt", texts["prompt"], ())]
    if "reference" in texts:
        parts.append(("reference", texts["reference"], ()))
    marks = difference(texts["better"], texts["worse"])
    parts.append((f"better{names[0]}: reward {right:.4g}", texts["better"], marks[0]))
    parts.append((f"worse{names[1]}: reward {wrong:.4g}", texts["worse"], marks[1]))
    head = f"{place}. {verdict['id']}: margin {verdict['margin']:.4g}"
    where = [verdict["where"]] if "where" in verdict else []
    return Section(head, where, excerpts=[Excerpt(*part) for part in parts], level=3)


def _text(value: Any) -> str:
    """A text of a verdict; of `--no-text` what is left of it."""
    if isinstance(value, dict):
        return f"[{value['length']:,} characters, hash {value['hash']}]"
    return content_text(value)


def write(
    folder: str,
    report: Mapping[str, Any],
    margins: Sequence[float],
    source: str,
    worst: Sequence[Mapping[str, Any]] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write report.json, report.html, report.md and the plots as PNG and SVG into a folder.

    Args:
        folder: Where; made if missing.
        report: A `polarctl.records.Report` record.
        margins: The margins behind it.
        source: What was evaluated, in words.
        worst: Verdicts of the cases to show, the worst first.
        facts: For its head; see `polarctl.evaluation.heading`.
    """
    from polarctl.evaluation import plots

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    histogram = plots.margin_histogram(margins, title="Margins: better minus worse")
    rows = [("all", report["overall"]), *report["categories"].items()][: plots.MAX_ROWS]
    bars = plots.accuracy_bars(
        [
            (name, {SCORERS.get(k, k): interval_of(v) for k, v in figures.items()})
            for name, figures in rows
        ],
        title=report["metric"].capitalize(),
    )
    sections = [
        Section("Accuracy", table=table(report), images=[Image(bars, "Accuracy by category")]),
        Section("Margins", images=[Image(histogram, "Histogram of reward margins")]),
    ]
    if (part := benchmark_table(report)) is not None:
        sections.insert(0, Section(f"Score of {report['benchmark']['name']}", table=part))
    for title, part in (
        ("Order", ranking_table(report)),
        ("Best of n", best_of_n_table(report)),
        ("Agreement of references", agreement_table(report)),
    ):
        if part is not None:
            sections.insert(-1, Section(title, table=part))
    if (part := bias_table(report)) is not None:
        curve = plots.reliability(
            report["calibration"]["bins"], title="Is the model right as often as it is sure?"
        )
        plots.write(target / "calibration.png", curve)
        image = Image(curve, "Accuracy against confidence")
        sections.append(Section("Length and calibration", table=part, images=[image]))
    if (part := discrimination_table(report)) is not None:
        more, pictures = _discrimination(report["discrimination"])
        sections[1:1] = [Section("Policy discrimination", table=part), *more]
        for name, picture in pictures.items():
            plots.write(target / name, picture)
    if worst:
        told = f"The {len(worst)} cases with the lowest margins, of all that the model has wrong."
        sections.append(Section("Worst cases", [told]))
        sections += [_case(place, verdict) for place, verdict in enumerate(worst, 1)]
    if report["skipped"]:
        skipped = [[reason, str(number)] for reason, number in report["skipped"].items()]
        sections.append(Section("Left out", table=Table(("reason", "records"), skipped)))
    document = Document(report["metric"].capitalize(), source, sections, facts)
    plots.write(target / "margins.png", histogram)
    plots.write(target / "accuracy.png", bars)
    write_report(document, report, target)
