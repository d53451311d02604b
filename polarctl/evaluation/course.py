"""The course of a training run: its curves as a picture, and a page with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from polarctl.evaluation.page import Document, Image, Section, Table, render_html
from polarctl.storage import atomic

CURVES, PAGE = "curves.png", "training.html"
FEW = 20  # steps below which there is no curve to look at
_POINTS = 100  # of a line, each a mean over as many steps: single batches are noisy


def draw(
    entries: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], folder: Path, title: str
) -> list[str]:
    """Write the curves and the page of a run; their names, none for a run of a few steps.

    Args:
        entries: The lines of its `metrics.jsonl`.
        figures: Its figures (`polarctl.training.outcome.figures`).
        folder: Where to.
        title: What was trained.
    """
    if len(entries) < FEW:
        return []
    from polarctl.evaluation import plots

    width = -(-len(entries) // _POINTS)
    batch = "batches" if width == 1 else f"batches, means of {width} steps"
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, heading in (("loss", "Loss"), ("accuracy", "Accuracy")):
        panels[heading] = {batch: _means([(e["step"], e[name]) for e in entries], width)}
        held_out = [(e["step"], e[f"val_{name}"]) for e in entries if f"val_{name}" in e]
        if held_out:
            panels[heading]["held out"] = held_out
    panels["Learning rate"] = {"learning rate": [(e["step"], e["lr"]) for e in entries]}
    picture = plots.stacked_curves(panels, xlabel="step")
    page = Document(
        title,
        f"{len(entries):,} steps",
        [
            Section("Figures", table=_table(figures)),
            Section("Curves", images=[Image(picture, "Loss, accuracy and learning rate by step")]),
        ],
    )
    atomic.write(folder / CURVES, picture)
    atomic.write(folder / PAGE, render_html(page).encode())
    return [CURVES, PAGE]


def _table(figures: Mapping[str, Any]) -> Table:
    names = {
        "": f"training, mean of the last {figures['averaged_steps']:,} steps",
        "held_out_": "held out, at the end",
        "best_": "held out, at its best",
    }
    rows = [
        [
            what,
            f"{figures[f'{name}step']:,}" if name else "",
            f"{figures[f'{name}loss']:.4f}",
            f"{figures[f'{name}accuracy']:.3f}",
        ]
        for name, what in names.items()
        if f"{name}loss" in figures
    ]
    return Table(("on", "step", "loss", "accuracy"), rows)


def _means(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(group[-1][0], fmean(y for _, y in group)) for group in groups]
