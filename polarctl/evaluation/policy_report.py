"""The report of `rate`: tables of policies, curves of pass@k and best of n, win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polarctl.evaluation.cases import interval_of
from polarctl.evaluation.page import (
    Document,
    Image,
    Section,
    Table,
    format_interval,
    write_report,
)
from polarctl.evaluation.policy_figures import words

FILES = (
    *(f"{name}.{kind}" for name in ("pass_at_k", "best_of_n", "wins") for kind in ("png", "svg")),
    "report.html",
    "report.json",
    "report.md",
)
_CURVES = {"pass_at_k": "pass@k", "best_of_n": "Best of n by reward"}
_WINS = ("policy", "against", "prompts", "win rate", "ties")


def parts(report: Mapping[str, Any]) -> list[tuple[str, str, Table]]:
    """(key of its plot, heading, table) of accuracy, the curves, and the win rates."""
    policies = report["policies"]
    rows = [
        [name, f"{f['prompts']:,}", f"{f['answers']:,}", _share(f.get("accuracy"))]
        for name, f in policies.items()
    ]
    told = f"right by {report['truth']}; 95 % intervals over prompts"
    table = Table(("policy", "prompts", "answers", "accuracy"), rows, told)
    made = [("accuracy", "Accuracy", table)]
    for key, title in _CURVES.items():
        several = {name: f[key] for name, f in policies.items() if key in f}
        steps = sorted({int(k) for curve in several.values() for k in curve})
        if len(steps) > 1:
            rows = [
                [name, *(_share(curve.get(str(k))) for k in steps)]
                for name, curve in several.items()
            ]
            table = Table(("policy", *(str(k) for k in steps)), rows, "samples drawn")
            made.append((key, title, table))
    if report.get("wins"):
        rows = [
            [w["policy"], w["other"], f"{w['n']:,}", _share(w), f"{100 * w['ties']:.1f} %"]
            for w in report["wins"]
        ]
        table = Table(_WINS, rows, "by reward; a tie is half a win; 95 % intervals over prompts")
        made.append(("wins", "Win rates", table))
    return made


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The same tables for the terminal, with their headings."""
    return [replace(t, caption=f"{heading}: {t.caption}") for _, heading, t in parts(report)]


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What can be said of the policies against the first one."""
    first = next(iter(report["policies"]))
    differences = report.get("accuracy_differences", {})
    return [words(first, other, found) for other, found in differences.items()]


def _share(figure: Mapping[str, Any] | None) -> str:
    return format_interval(interval_of(figure)) if figure else "n/a"


def write(
    folder: str, report: Mapping[str, Any], source: str, facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Write report.json, report.html, report.md and the plots into a folder.

    Args:
        folder: Where; made if missing.
        report: Of `policy_figures.summary`, with `truth`: what says what is right.
        source: What was rated, in words.
        facts: For its head; see `polarctl.evaluation.heading`.
    """
    from polarctl.evaluation import plots, policy_plots

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    images = {}
    for key, title in _CURVES.items():
        lines = {
            name: [(int(k), interval_of(figure)) for k, figure in f[key].items()]
            for name, f in report["policies"].items()
            if len(f.get(key, ())) > 1
        }
        if lines:
            xlabel = "samples drawn (k)" if key == "pass_at_k" else "samples drawn (n)"
            images[key] = policy_plots.share_curves(lines, xlabel=xlabel, title=title)
    names = list(report["policies"])
    if report.get("wins"):
        cells = {(w["policy"], w["other"]): w["value"] for w in report["wins"]}
        cells |= {(b, a): 1 - value for (a, b), value in cells.items()}
        images["wins"] = policy_plots.heat_map(
            names, cells, title="Win rate of the row", labels=("policy", "against", "win rate (%)")
        )
    sections = []
    for key, heading, table in parts(report):
        said = sentences(report) if key == "accuracy" else []
        shown = [Image(images[key], heading)] if key in images else []
        sections.append(Section(heading, said, table=table, images=shown))
    page = Document("Policies", source, sections, facts)
    for key, picture in images.items():
        plots.write(target / f"{key}.png", picture)
    write_report(page, report, target)
