"""Scaling laws as JSON, tables, plots and a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from polarctl import console
from polarctl.evaluation.page import (
    Document,
    Image,
    Section,
    Table,
    terminal_table,
    write_report,
)
from polarctl.evaluation.scaling import AXES, CONSTANT, PAPER, Fit, ScalingLaw, TrainedRun, law_of
from polarctl.evaluation.scaling_runs import read_runs
from polarctl.storage import atomic, replace

NAME = "scaling"
JSON, PAGE, MARKDOWN = f"{NAME}.json", f"{NAME}.html", f"{NAME}.md"
PLOTS = {axis: f"scaling-{axis}.png" for axis in AXES}
FILES = (JSON, PAGE, MARKDOWN, *PLOTS.values())
_AXIS = {
    "N": "N, weights without the input embedding",
    "C": "C = 6 N D, FLOPs of training",
    "D": "D, tokens of training",
}
_POINTS = {
    "N": "of each N the lowest loss",
    "C": "runs that no other with as much or less C beats",
    "D": "of each D the lowest loss",
}
_LOSS = "held-out loss L"
_LINE = 60  # points of a drawn law
_UNLIKE = 1.5  # amounts of data that differ by more are not the same


def fit_runs(names: Sequence[str], folder: str | None, *, dry_run: bool = False) -> None:
    """Fit scaling laws to training runs, show them, and write them to a folder if there is one.

    Args:
        names: Folders of the runs, or globs.
        folder: Where the report goes, or None.
        dry_run: Only check the runs.

    Raises:
        UsageError: A run cannot be used, or the folder holds files of others.
    """
    if folder:
        check_folder(folder)
    runs = read_runs(names)
    if len({run.held_out for run in runs}) > 1:
        console.warn(
            "the runs were not measured on the same held-out triples (input, --val-fraction, "
            "--seed or --limit differ): their losses are compared as they are"
        )
    if dry_run:
        console.note(f"eval scaling: {len(runs)} runs are good")
        return
    laws = [law_of(runs, axis) for axis in AXES]
    for line in doubts(laws):
        console.warn(line)
    for table in (law_table(laws), prediction_table(laws)):
        if table is not None and table.rows:
            console.show(terminal_table(table))
    if folder:
        write(folder, runs, laws)
        console.note(f"report: {folder}/{PAGE}")


def law_table(laws: Sequence[ScalingLaw]) -> Table:
    """A row for every fitted form; the preferred one of each axis is marked."""
    rows = []
    for law in laws:
        for form, fit in law.fits.items():
            if form == CONSTANT and not fit.constant:
                continue  # it has found none, and is the power law again
            rows.append(
                [
                    f"{formula(law.axis, fit)}" + (" (preferred)" if form == law.form else ""),
                    str(fit.n),
                    _ends(fit.b, fit.b_interval),
                    _ends(fit.constant, fit.constant_interval) if fit.constant_interval else "",
                    "n/a" if fit.r2 is None else f"{fit.r2:.4f}",
                    f"{fit.aic:.1f}",
                    f"{100 * _worst(fit):.1f} %",
                ]
            )
    return Table(
        ("law", "points", "exponent", "L_inf", "R² of ln L", "AIC", "largest residual"),
        rows,
        "laws, 95 % intervals from the fit's covariance (t)",
    )


def formula(axis: str, fit: Fit) -> str:
    """A law in a line: `L = 0.9 N^-0.0425`."""
    more = f" + {fit.constant:.4g}" if fit.constant_interval else ""
    return f"L = {fit.a:.4g} {axis}^{fit.b:.4g}{more}"


def prediction_table(laws: Sequence[ScalingLaw]) -> Table | None:
    """What the smaller runs say of the largest one, or None where there are too few."""
    rows = [
        [
            law.axis,
            found.run,
            f"{100 * found.error:+.1f} %",
            f"{found.measured:.4f}",
            f"{found.value:.4f} [{found.interval[0]:.4f}, {found.interval[1]:.4f}]",
            f"{found.points} runs, {found.form}, {found.beyond:.1f} x",
        ]
        for law in laws
        if (found := law.prediction) is not None
    ]
    if not rows:
        return None
    return Table(
        ("in", "held-out run", "error", "measured", "predicted", "by"),
        rows,
        "the largest run, predicted by the smaller ones; 95 % prediction intervals",
    )


def run_table(runs: Sequence[TrainedRun], laws: Sequence[ScalingLaw]) -> Table:
    """The runs in the order of C, and by how much each lies above the laws it is a point of."""
    residuals: dict[str, dict[str, float]] = {}
    for law in laws:
        if law.fits:
            for run, off in zip(law.points, law.fits[law.form].residuals, strict=True):
                residuals.setdefault(run.name, {})[law.axis] = off
    rows = [
        [
            run.name,
            f"{run.parameters:.4g}",
            f"{run.tokens:.4g}",
            f"{run.triples:,.0f}",
            f"{run.compute:.3g}",
            f"{run.loss:.4f}",
            *(
                f"{100 * residuals[run.name][axis]:+.1f} %"
                if axis in residuals.get(run.name, {})
                else ""
                for axis in AXES
            ),
        ]
        for run in sorted(runs, key=lambda run: (run.compute, run.name))
    ]
    heads = ("run", "N", "D, tokens", "triples", "C, FLOPs", "loss")
    return Table((*heads, *(f"residual in {axis}" for axis in AXES)), rows, "runs")


def doubts(laws: Sequence[ScalingLaw]) -> list[str]:
    """What a reader should know before the figures, a sentence each."""
    found = []
    for law in laws:
        if not law.fits:
            found.append(
                f"no law in {law.axis}: its points ({_POINTS[law.axis]}) are {len(law.points)}, "
                "and 3 are needed"
            )
        elif law.fits[law.form].b >= 0:
            found.append(f"the loss does not fall with {law.axis}: this is no scaling law")
        data = [run.tokens for run in law.points]
        if law.fits and law.axis == "N" and max(data) > _UNLIKE * min(data):
            found.append(
                f"the points of the law in N have from {min(data):.3g} to {max(data):.3g} tokens: "
                "train every size on as much"
            )
    return found


def as_json(runs: Sequence[TrainedRun], laws: Sequence[ScalingLaw]) -> dict[str, Any]:
    """All figures as plain values; what cannot be known is null."""
    return {
        "schema_version": 1,
        "level": 0.95,
        "intervals": "Student's t on the covariance of the fit in ln L",
        "runs": [{**dataclasses.asdict(run), "compute": run.compute} for run in runs],
        "laws": {
            law.axis: {
                "points": [run.name for run in law.points],
                "form": law.form if law.fits else None,
                "fits": {name: dataclasses.asdict(fit) for name, fit in law.fits.items()},
                "prediction": None
                if law.prediction is None
                else {**dataclasses.asdict(law.prediction), "error": law.prediction.error},
                "paper": dict(zip("ab", PAPER[law.axis], strict=True))
                if law.axis in PAPER
                else None,
            }
            for law in laws
        },
    }


def check_folder(folder: str) -> None:
    """Refuse a folder in which files have our names and are not ours."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        replace.refuse(folder, "it is a file, and a report is a folder")
    try:
        ours = "laws" in orjson.loads((target / JSON).read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    for name in FILES:
        if not ours and (target / name).exists():
            replace.refuse(target / name, "it is no report of scaling laws")


def write(folder: str, runs: Sequence[TrainedRun], laws: Sequence[ScalingLaw]) -> None:
    """Write scaling.json, the page, its Markdown and a plot for every law into a folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    sections = [
        Section(
            "Laws",
            [
                "L is the last held-out loss of a run. Fitted by least squares in ln L. AIC "
                "prefers a law with L_inf only where it explains enough more for its further "
                "parameter.",
                *doubts(laws),
            ],
            table=law_table(laws),
        )
    ]
    if (table := prediction_table(laws)) is not None:
        sections.append(Section("The largest run", table=table))
    for law in laws:
        if law.fits:
            picture = plot(runs, law)
            atomic.write(target / PLOTS[law.axis], picture)
            text = f"Loss against {law.axis} on logarithmic axes, with the fitted laws"
            points = f"Fitted to {len(law.points)} of {len(runs)} runs: {_POINTS[law.axis]}."
            sections.append(
                Section(f"Loss and {law.axis}", [points], images=[Image(picture, text)])
            )
        else:
            (target / PLOTS[law.axis]).unlink(missing_ok=True)
    sections.append(Section("Runs", table=run_table(runs, laws)))
    page = Document("Scaling laws", f"{len(runs)} runs", sections)
    write_report(page, as_json(runs, laws), target, NAME)


def plot(runs: Sequence[TrainedRun], law: ScalingLaw) -> bytes:
    """The runs, the points of the law, its forms, the paper's law, and the prediction."""
    from polarctl.evaluation import plots

    axis, taken = law.axis, {run.name for run in law.points}
    xs = [run.at(axis) for run in runs]
    low, high = min(xs), max(xs)
    grid = [low * (high / low) ** (i / (_LINE - 1)) for i in range(_LINE)]
    clouds: dict[str, list[tuple[float, float]]] = {
        "other runs": [(run.at(axis), run.loss) for run in runs if run.name not in taken],
        "points of the law": [(run.at(axis), run.loss) for run in law.points],
        "largest run, predicted": [],
    }
    if law.prediction is not None:
        clouds["largest run, predicted"] = [(law.points[-1].at(axis), law.prediction.value)]
    lines: Mapping[str, list[tuple[float, float]]] = {
        formula(axis, fit): [(x, fit.loss(x)) for x in grid]
        for form, fit in law.fits.items()
        if form != CONSTANT or fit.constant
    }
    if axis in PAPER:
        a, b = PAPER[axis]
        lines = {**lines, f"paper: L = {a:g} {axis}^{b:g}": [(x, a * x**b) for x in grid]}
    return plots.log_log(clouds, lines, xlabel=_AXIS[axis], ylabel=_LOSS, title=f"Loss and {axis}")


def _ends(value: float, ends: tuple[float, float]) -> str:
    return f"{value:.4g} [{ends[0]:.4g}, {ends[1]:.4g}]"


def _worst(fit: Fit) -> float:
    """The largest residual as a share of the law's loss."""
    return max(abs(math.expm1(off)) for off in fit.residuals)
