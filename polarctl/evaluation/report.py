"""The report of an evaluation: table, JSON, plots, one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from polarctl.evaluation.cases import interval_of
from polarctl.evaluation.page import Document, Image, Section, Table, format_interval, render_html
from polarctl.storage import atomic

FILES = ("margins.png", "accuracy.png", "report.html", "report.json")
SCORERS = {"model": "model", "length": "longer wins", "overlap": "word overlap (F1)"}


def table(report: Mapping[str, Any]) -> Table:
    """Accuracy of the model and of the baselines, overall and by category."""
    names = list(report["overall"])
    rows = [_row("all", report["overall"], names)]
    rows += [_row(category, row, names) for category, row in report["categories"].items()]
    return Table(
        ("category", "cases", *(SCORERS.get(name, name) for name in names)),
        rows,
        f"{report['metric']}, 95 % intervals over prompts",
    )


def _row(label: str, figures: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cases = str(next(iter(figures.values()))["n"])
    return [label, cases, *(format_interval(interval_of(figures[name])) for name in names)]


def best_of_n_table(report: Mapping[str, Any]) -> Table | None:
    """Mean label of the candidate that each scorer ranks first, or None without groups."""
    figures = report.get("best_of_n")
    if not figures:
        return None
    groups = next(iter(figures.values()))["n"]
    return Table(
        ("ranked by", "mean label of the first"),
        [
            [SCORERS.get(name, name), format_interval(interval_of(figure))]
            for name, figure in figures.items()
        ],
        f"best of n, {groups} groups",
    )


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
    return Table(
        ("section", "items", "score, %"),
        rows,
        f"{found['name']}: its own score, 95 % intervals over items",
    )


def _number(figure: Mapping[str, Any] | None) -> str:
    """A figure that is not a share: 0.512 [0.480, 0.544]."""
    if figure is None:
        return ""
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def write(folder: str, report: Mapping[str, Any], margins: Sequence[float], source: str) -> None:
    """Write report.json, report.html, margins.png and accuracy.png into a folder.

    Args:
        folder: Where; made if missing.
        report: A `polarctl.records.Report` record.
        margins: The margins behind it.
        source: What was evaluated, in words.
    """
    from polarctl.evaluation import plots

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    histogram = plots.margin_histogram(margins, title="Margins: better minus worse")
    rows = [("all", report["overall"]), *report["categories"].items()][: plots.MAX_ROWS]
    bars = plots.accuracy_bars(
        [(name, {k: interval_of(v) for k, v in figures.items()}) for name, figures in rows],
        title=report["metric"],
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
    ):
        if part is not None:
            sections.insert(-1, Section(title, table=part))
    if report["skipped"]:
        skipped = [[reason, str(number)] for reason, number in report["skipped"].items()]
        sections.append(Section("Left out", table=Table(("reason", "records"), skipped)))
    page = render_html(Document(report["metric"].capitalize(), source, sections))
    atomic.write(target / "margins.png", histogram)
    atomic.write(target / "accuracy.png", bars)
    atomic.write(target / "report.html", page.encode())
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    atomic.write(target / "report.json", orjson.dumps(dict(report), option=options))
