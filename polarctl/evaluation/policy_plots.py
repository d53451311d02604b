"""Plots of policies: who is told apart from whom, who wins, what more samples bring.

As in `polarctl.evaluation.plots`, every function returns a PNG that can also be had as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from polarctl.evaluation.metrics import Interval
from polarctl.evaluation.plots import (
    BLUE,
    DASHES,
    INK,
    PALETTE,
    SKY,
    VERMILLION,
    Drawing,
    add_head,
    drawing_of,
    legend_rows,
    new_figure,
    styled,
    wrapped,
)


def share_curves(
    series: Mapping[str, Sequence[tuple[int, Interval]]], *, xlabel: str, title: str = ""
) -> Drawing:
    """Shares in percent over 1, 2, 4, ... on a logarithmic axis, with their intervals.

    Args:
        series: Name to points (x, figure), x at least 1.
        xlabel: What x is.
        title: Title of the plot.

    Raises:
        ValueError: no points.
    """
    places = sorted({x for points in series.values() for x, _ in points})
    if not places:
        raise ValueError("no points to plot")
    with styled():
        figure, axes = new_figure(3.4 + 0.19 * legend_rows(list(series)))
        lines = []
        for i, points in enumerate(series.values()):
            colour, xs = PALETTE[i % len(PALETTE)], [x for x, _ in points]
            dashes = DASHES[i % len(DASHES)]
            values = [100 * found.value for _, found in points]
            lines += axes.plot(
                xs, values, color=colour, linestyle=dashes, linewidth=1.8, marker="o", markersize=4
            )
            low = [100 * found.low for _, found in points]
            high = [100 * found.high for _, found in points]
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(x) for x in places])
        axes.minorticks_off()
        axes.set_xlabel(wrapped(xlabel, 75))
        axes.set_ylabel("share (%), 95 % interval")
        axes.grid()
        add_head(figure, title, lines, list(series))
        return drawing_of(figure)


def heat_map(
    names: Sequence[str],
    cells: Mapping[tuple[str, str], float],
    *,
    title: str = "",
    labels: tuple[str, str, str] = (
        "policy of reference and chosen",
        "policy of rejected",
        "accuracy (%)",
    ),
) -> Drawing:
    """Shares as colours, a row and a column per name: white is one half, grey is no value.

    Args:
        names: Of the rows, and of the columns.
        cells: (row, column) to a share from 0 to 1.
        title: Title of the plot.
        labels: What rows, columns and colours are.

    Raises:
        ValueError: no names.
    """
    if not names:
        raise ValueError("no names for the rows")
    import numpy as np

    values = np.array([[cells.get((row, name), math.nan) for name in names] for row in names])
    size = min(6.2, max(2.4, 0.42 * len(names)))
    with styled():
        from matplotlib.colors import LinearSegmentedColormap

        # Grey lies behind: a cell without a value is not drawn.
        colours = LinearSegmentedColormap.from_list("", [VERMILLION, "#ffffff", BLUE])
        figure, axes = new_figure(size + 1.4)
        axes.set_facecolor("#c8c8c8")
        drawn = axes.imshow(100 * values, cmap=colours, vmin=0, vmax=100)
        step = max(1, math.ceil(len(names) / 40))
        ticks = range(0, len(names), step)
        shown = [wrapped(names[i], 22, lines=1) for i in ticks]
        small = 8.5 if len(names) <= 20 else 6
        axes.set_xticks(ticks, shown, rotation=90, fontsize=small)
        axes.set_yticks(ticks, shown, fontsize=small)
        axes.tick_params(length=0)
        axes.set_ylabel(labels[0])
        axes.set_xlabel(labels[1])
        if len(names) <= 12:
            for (row, column), value in np.ndenumerate(values):
                if math.isfinite(value):
                    far = abs(value - 0.5) > 0.35
                    axes.text(
                        column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                        color="white" if far else INK,
                    )  # fmt: skip
        figure.colorbar(drawn, ax=axes, label=labels[2], shrink=0.8)
        if title:
            axes.set_title(wrapped(title, 60))
        return drawing_of(figure)


def accuracy_by_distance(
    pairs: Sequence[Mapping[str, float]], bins: Sequence[Mapping[str, float]], *, title: str = ""
) -> Drawing:
    """Accuracy against distance: a point per pair of policies, and the means of bins.

    Args:
        pairs: `distance`, `accuracy` and `n` of each.
        bins: `distance`, `value`, `low` and `high` of each, in order.
        title: Title of the plot.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("no pairs to plot")
    most = max(entry["n"] for entry in pairs)
    with styled():
        figure, axes = new_figure(3.6)
        points = axes.scatter(
            [entry["distance"] for entry in pairs],
            [100 * entry["accuracy"] for entry in pairs],
            s=[8 + 60 * entry["n"] / most for entry in pairs],
            color=SKY,
            alpha=0.7,
            linewidths=0,
        )
        values = [100 * entry["value"] for entry in bins]
        below = [100 * (entry["value"] - entry["low"]) for entry in bins]
        above = [100 * (entry["high"] - entry["value"]) for entry in bins]
        line = axes.errorbar(
            [entry["distance"] for entry in bins], values, yerr=[below, above],
            color=BLUE, linewidth=1.5, marker="o", markersize=5, capsize=3,
        )  # fmt: skip
        axes.axhline(50, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("distance of the two policies: how much less their texts overlap (F1)")
        axes.set_ylabel("accuracy (%)")
        axes.grid()
        add_head(figure, title, [points, line], ["a pair of policies", "cases in bins, 95 %"])
        return drawing_of(figure)
