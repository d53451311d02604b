"""Plots of an evaluation or a training run, as PNG bytes, and as SVG for a paper.

Every function returns the bytes of one PNG (a `Drawing`) that is legible when shown 700 pixels
wide. Equal inputs give equal bytes on one version of matplotlib: the user's style file is ignored,
no date or software name is stored. Colours are Okabe and Ito's (Color Universal Design, 2008), for
readers with any kind of colour vision; line styles differ as well.

matplotlib is imported inside the functions (it takes seconds) and `pyplot`, with its global figure
list, is not used at all. Labels are plain text: a `$` in a category name is not mathematics.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from polarctl.evaluation.metrics import Interval
from polarctl.storage import atomic

Line = Sequence[tuple[float, float]]

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
# Without yellow, the eighth colour, which is too faint on white.
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
INK, GRID = "#333333", "#DDDDDD"

MAX_ROWS = 40
_WIDTH_IN, _DPI = 7.0, 200
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def styled(more: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Our style on matplotlib's own defaults, put back afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the bundled font lacks shows as boxes; the tables spell it out.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams.update(more)
        yield


def new_figure(height_in: float) -> tuple[Any, Any]:
    """A figure of our width and one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI, layout="constrained")
    return figure, figure.add_subplot()


class Drawing(bytes):
    """The bytes of a PNG, which can also be had as SVG.

    Attributes:
        figure: What was drawn.
    """

    figure: Any

    def svg(self) -> bytes:
        """The same drawing as SVG, with letters as outlines: it needs no font."""
        buffer = io.BytesIO()
        with styled({"svg.hashsalt": "polarctl"}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


def write(path: Path, drawing: Drawing) -> None:
    """Write a drawing as PNG, and as SVG beside it."""
    atomic.write(path, drawing)
    atomic.write(path.with_suffix(".svg"), drawing.svg())


def drawing_of(figure: Any) -> Drawing:
    """A finished figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    figure.set_layout_engine("none")  # all has its place: laying out again takes as long
    drawing = Drawing(buffer.getvalue())
    drawing.figure = figure
    return drawing


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """At most `lines` lines of `width` characters; what does not fit ends in an ellipsis."""
    kept = textwrap.wrap(text, width, max_lines=lines, placeholder=" …", break_on_hyphens=True)
    return "\n".join(kept) or " "


def legend_columns(names: Sequence[str]) -> int:
    """Legend columns that fit the width: all in one line, or as many as the longest name allows."""
    widths = [len(name) + 8 for name in names]
    return len(names) if sum(widths) <= 100 else max(1, 100 // max(widths))


def legend_rows(names: Sequence[str]) -> int:
    """Rows of the legend, each 0.19 inches high."""
    return math.ceil(len(names) / legend_columns(names))


def add_head(figure: Any, title: str, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Title and legend above the axes; as one block, so that they cannot overlap."""
    labels = [wrapped(name, 80, lines=1) for name in names]
    figure.legend(
        handles,
        labels,
        title=wrapped(title, 80) if title else None,
        title_fontproperties={"size": 11, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        ncols=legend_columns(labels),
        borderaxespad=0.3,
    )


def margin_histogram(margins: Sequence[float], *, title: str = "") -> Drawing:
    """Histogram of reward margins, chosen minus rejected; bars split exactly at zero.

    A margin of zero counts as wrong. Margins more than three
    interquartile ranges away from the middle half (Tukey's "far out") go into the
    outermost bars, and the plot says how many.

    Raises:
        ValueError: no margins, or one that is infinite or NaN.
    """
    if not len(margins):
        raise ValueError("no margins to plot")
    if not all(map(math.isfinite, margins)):
        raise ValueError("every margin must be finite")
    import numpy as np

    values = np.asarray(margins, dtype=float)
    q25, median, q75 = np.quantile(values, [0.25, 0.5, 0.75])
    reach = 3 * (q75 - q25) or float(np.ptp(values))
    low, high = min(0.0, q25 - reach, median), max(0.0, q75 + reach, median)
    beyond = int(((values < low) | (values > high)).sum())
    values = np.clip(values, low, high)
    span = float(np.ptp(np.append(values, 0.0))) or 1.0
    step = span / max(10, min(40, 2 * round(len(values) ** 0.5)))

    with styled():
        figure, axes = new_figure(3.4)
        bars, names = [], []
        sides = ((BLUE, 1, "chosen scored higher"), (VERMILLION, -1, "tied or lower"))
        for colour, sign, label in sides:
            side = np.abs(values[values > 0] if sign > 0 else values[values <= 0])
            bins = np.minimum(side // step, math.ceil(span / step) - 1).astype(int)
            counts = np.bincount(bins, minlength=1)
            left = np.arange(len(counts)) * step * sign
            bars.append(axes.bar(left, counts, sign * step, align="edge", color=colour, ec="white"))
            names.append(f"{label}: {len(side):,} ({len(side) / len(values):.1%})")
        axes.axvline(0, color=INK, linewidth=1)
        bars.append(axes.axvline(median, color=INK, linestyle=(0, (4, 2)), linewidth=1.2))
        names.append(f"median {median:+.3g}")
        axes.set_xlabel(
            "margin: reward of the chosen minus reward of the rejected"
            + (f"\n{beyond:,} outside this range, counted in the outermost bars" if beyond else "")
        )
        axes.set_ylabel("pairs")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        add_head(figure, title, bars, names)
        return drawing_of(figure)


def accuracy_bars(
    rows: Sequence[tuple[str, Mapping[str, Interval]]],
    *,
    title: str = "",
    chance: float | None = 0.5,
) -> Drawing:
    """Horizontal bars of accuracy with error bars: a row per category, a bar per judge.

    Judges ("model", "longer wins") get their colour by first appearance; a row may lack some.
    Only the first `MAX_ROWS` rows are drawn, and the plot says how many are not. `chance` is the
    dashed line; None draws none.

    Raises:
        ValueError: no rows, or no judge in any of them.
    """
    if not (names := list(dict.fromkeys(name for _, judged in rows for name in judged))):
        raise ValueError("no accuracies to plot")
    shown, labels = rows[:MAX_ROWS], []
    for category, judged in shown:
        cases = max((interval.n for interval in judged.values()), default=0)
        labels.append(f"{wrapped(category, 30)}\nn = {cases:,}")
    # Each row is as tall as its bars or its label, whichever needs more (inches).
    heights = [max(0.19 * len(names), 0.17 * (label.count("\n") + 1)) + 0.16 for label in labels]

    with styled():
        figure, axes = new_figure(sum(heights) + (1.25 if title else 1.0))
        handles: dict[str, Any] = {}
        centres, top = [], 0.0
        for (_, judged), height in zip(shown, heights, strict=True):
            centres.append(top + height / 2)
            for i, name in enumerate(names):
                if (interval := judged.get(name)) is None:
                    continue
                y = top + height / 2 + 0.19 * (i - (len(names) - 1) / 2)
                value = 100 * interval.value
                bar = axes.barh(y, value, 0.16, color=PALETTE[i % len(PALETTE)])
                handles.setdefault(name, bar)
                ends = [[value - 100 * interval.low], [100 * interval.high - value]]
                axes.errorbar(value, y, xerr=ends, color=INK, lw=1.1, capsize=2.2)
                number = f"{value:.1f}"
                axes.text(110, y, number, ha="right", va="center", fontsize=8.5, clip_on=False)
            top += height
        if chance is not None:
            axes.axvline(100 * chance, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlim(0, 100)
        axes.set_ylim(top, 0)
        axes.set_yticks(centres, labels, linespacing=1.1)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        more = len(rows) - len(shown)
        note = f"\n{more:,} more categories are not drawn" if more else ""
        axes.set_xlabel(f"accuracy (%) with its confidence interval{note}")
        drawn = [name for name in names if name in handles]
        add_head(figure, title, [handles[name] for name in drawn], drawn)
        return drawing_of(figure)


def differences(
    rows: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]], *, xlabel: str, title: str = ""
) -> Drawing:
    """Differences as points with intervals around a line at 0: a row per category.

    Only the first `MAX_ROWS` rows are drawn, and the plot says how many are not.

    Args:
        rows: Category to name to `value`, `low`, `high`, from -1 to 1, and `n`, the cases.
        xlabel: What is to the right.
        title: Title of the plot.

    Raises:
        ValueError: no rows, or no name in any of them.
    """
    if not (names := list(dict.fromkeys(name for _, found in rows for name in found))):
        raise ValueError("no differences to plot")
    shown = rows[:MAX_ROWS]
    labels = [
        f"{wrapped(category, 30)}\nn = {max(f['n'] for f in found.values()):,}"
        for category, found in shown
    ]
    heights = [max(0.2 * len(names), 0.17 * (label.count("\n") + 1)) + 0.16 for label in labels]
    with styled():
        figure, axes = new_figure(sum(heights) + (1.25 if title else 1.0))
        handles: dict[str, Any] = {}
        centres, top = [], 0.0
        for (_, found), height in zip(shown, heights, strict=True):
            centres.append(top + height / 2)
            for i, name in enumerate(names):
                if name not in found:
                    continue
                y = top + height / 2 + 0.2 * (i - (len(names) - 1) / 2)
                value, low, high = (100 * found[name][end] for end in ("value", "low", "high"))
                drawn = axes.errorbar(
                    value, y, xerr=[[value - low], [high - value]], color=PALETTE[i % len(PALETTE)],
                    marker="o", markersize=7, lw=2.2, capsize=3.5,
                )  # fmt: skip
                handles.setdefault(name, drawn)
                axes.annotate(
                    f"{value:+.1f}", (1, y), (34, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="center", fontsize=8.5,
                )  # fmt: skip
            top += height
        axes.axvline(0, color=INK, linewidth=1)
        axes.margins(x=0.08)
        axes.set_ylim(top, 0)
        axes.set_yticks(centres, labels, linespacing=1.1)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        more = len(rows) - len(shown)
        note = f"\n{more:,} more categories are not drawn" if more else ""
        axes.set_xlabel(wrapped(xlabel, 75) + note)
        add_head(figure, title, list(handles.values()), list(handles))
        return drawing_of(figure)


def reliability(bins: Sequence[Mapping[str, float]], *, title: str = "") -> Drawing:
    """Accuracy against confidence, a point per bin, the larger the more cases.

    On the dashed diagonal a model is right as often as it is sure.

    Args:
        bins: `confidence`, `accuracy` and `n` of each, in order.
        title: Title of the plot.

    Raises:
        ValueError: no bins.
    """
    if not bins:
        raise ValueError("no bins to plot")
    most = max(entry["n"] for entry in bins)
    with styled():
        figure, axes = new_figure(3.6)
        (ideal,) = axes.plot([0.5, 1], [0.5, 1], color=INK, linestyle=(0, (4, 3)), linewidth=1)
        confidence = [entry["confidence"] for entry in bins]
        accuracy = [entry["accuracy"] for entry in bins]
        (line,) = axes.plot(confidence, accuracy, color=BLUE, linewidth=1.5)
        sizes = [20 + 180 * entry["n"] / most for entry in bins]
        axes.scatter(confidence, accuracy, s=sizes, color=BLUE, zorder=3, clip_on=False)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("confidence: sigmoid of the margin's size")
        axes.set_ylabel("accuracy")
        axes.grid()
        add_head(figure, title, [line, ideal], ["model", "as sure as right"])
        return drawing_of(figure)


def curves(series: Mapping[str, Line], *, xlabel: str, ylabel: str, title: str = "") -> Drawing:
    """Lines over a common axis (loss, reward, KL per step), one per name, in the order given.

    Points that are infinite or NaN leave a gap. One series has no legend; up to 30 points get a
    marker each.

    Raises:
        ValueError: no series, or no finite point in any of them.
    """
    if not any(math.isfinite(x) and math.isfinite(y) for line in series.values() for x, y in line):
        raise ValueError("no finite points to plot")
    with styled():
        figure, axes = new_figure(3.2 + 0.19 * legend_rows(list(series)))
        lines = _lines(axes, series)
        axes.set_xlabel(wrapped(xlabel, 75))
        axes.set_ylabel(wrapped(ylabel, 40))
        if len(series) > 1:
            add_head(figure, title, lines, list(series))
        elif title:
            axes.set_title(wrapped(title, 75))
        return drawing_of(figure)


def stacked_curves(panels: Mapping[str, Mapping[str, Line]], *, xlabel: str) -> Drawing:
    """Panels one above the other over a common axis: title to `curves`' series.

    Raises:
        ValueError: no panel, or one without a finite point.
    """
    from matplotlib.figure import Figure

    for series in panels.values():
        if not any(math.isfinite(y) for line in series.values() for _, y in line):
            raise ValueError("no finite points to plot")
    with styled():
        figure = Figure(figsize=(_WIDTH_IN, 2.4 * len(panels)), dpi=_DPI, layout="constrained")
        several = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (title, series) in zip(several, panels.items(), strict=True):
            lines = _lines(axes, series)
            axes.set_title(wrapped(title, 75))
            if len(series) > 1:
                names = [wrapped(name, 40, lines=1) for name in series]
                axes.legend(lines, names, loc="best")
        several[-1].set_xlabel(wrapped(xlabel, 75))
        return drawing_of(figure)


def log_log(
    clouds: Mapping[str, Line], lines: Mapping[str, Line], *, xlabel: str, ylabel: str, title: str
) -> Drawing:
    """Points and lines on two logarithmic axes; the first cloud is faint, the last one a star.

    Args:
        clouds: Name to points; one without any is left out.
        lines: Name to the points of a line, which has no markers.
        xlabel: What is to the right.
        ylabel: What is above.
        title: Title of the plot.

    Raises:
        ValueError: no points, or a number that is not finite and above 0.
    """
    numbers = [z for line in (*clouds.values(), *lines.values()) for point in line for z in point]
    if not any(clouds.values()) or not all(math.isfinite(z) and z > 0 for z in numbers):
        raise ValueError("points on logarithmic axes must be finite and above 0")
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    looks = (("o", "#AAAAAA", 22), ("o", BLUE, 36), ("*", VERMILLION, 130))
    with styled():
        figure, axes = new_figure(3.9)
        handles, names = [], []
        for (name, points), (marker, colour, size) in zip(clouds.items(), looks, strict=False):
            if points:
                x, y = zip(*points, strict=True)
                handles.append(axes.scatter(x, y, marker=marker, color=colour, s=size, zorder=3))
                names.append(name)
        for i, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            look = {"color": PALETTE[i], "linestyle": DASHES[i % len(DASHES)]}
            handles += axes.plot(x, y, linewidth=1.6, **look)
            names.append(name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        rights = [x for line in clouds.values() for x, _ in line]
        wide = max(rights) > 1e3 * min(rights)
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        # A loss spans less than a decade: plain numbers, where powers of ten would leave none.
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.minorticks_off()
        axes.grid()
        axes.set_xlabel(wrapped(xlabel, 75))
        axes.set_ylabel(wrapped(ylabel, 40))
        add_head(figure, title, handles, names)
        return drawing_of(figure)


def _lines(axes: Any, series: Mapping[str, Line]) -> list[Any]:
    lines = []
    for i, points in enumerate(series.values()):
        lines += axes.plot(
            [x if math.isfinite(x) else math.nan for x, _ in points],
            [y if math.isfinite(y) else math.nan for _, y in points],
            color=PALETTE[i % len(PALETTE)],
            linestyle=DASHES[i % len(DASHES)],
            linewidth=1.8,
            marker="o" if len(points) <= 30 else None,
            markersize=3.5,
        )
    axes.grid()
    return lines
