"""Plots of a data set's texts, for its card."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from polarctl.evaluation.plots import (
    BLUE,
    DASHES,
    INK,
    MAX_ROWS,
    PALETTE,
    Drawing,
    add_head,
    drawing_of,
    new_figure,
    styled,
    wrapped,
)
from polarctl.hub.statistics import quantile

_BINS_PER_DOUBLING = 2


def text_lengths(fields: Mapping[str, Counter[int]], *, title: str = "") -> Drawing:
    """How long the texts of each field are: the share of texts in each range of lengths.

    A range ends at the square root of two times its beginning. Empty texts count as one character.

    Args:
        fields: Field to how many texts have how many characters.
        title: Shown above.

    Raises:
        ValueError: No texts.
    """
    if not fields:
        raise ValueError("no texts to plot")
    longest = max(max(lengths) for lengths in fields.values())
    bins = range(_bin(longest) + 1)
    edges = [2 ** (number / _BINS_PER_DOUBLING) for number in range(len(bins) + 1)]
    with styled():
        figure, axes = new_figure(3.2)
        lines = []
        for number, lengths in enumerate(fields.values()):
            counts: Counter[int] = Counter()
            for size, count in lengths.items():
                counts[_bin(size)] += count
            lines.append(
                axes.stairs(
                    [100 * counts[each] / lengths.total() for each in bins],
                    edges,
                    color=PALETTE[number % len(PALETTE)],
                    linestyle=DASHES[number % len(DASHES)],
                    linewidth=1.6,
                )
            )
        axes.set_xscale("log")
        axes.set_xlim(1, edges[-1])
        axes.set_ylim(0)
        _plain_ticks(axes)
        axes.set_xlabel("characters")
        axes.set_ylabel("share of the texts (%)")
        axes.grid(axis="y")
        add_head(figure, title, lines, list(fields))
        return drawing_of(figure)


def _bin(size: int) -> int:
    return int(_BINS_PER_DOUBLING * math.log2(max(size, 1)) + 1e-9)


def policy_lengths(
    rows: Sequence[tuple[str, Counter[int]]], *, unit: str = "characters", title: str = ""
) -> Drawing:
    """How long the texts of each policy are: median, quartiles, and where 90 % of them lie.

    Only the first `MAX_ROWS` policies are drawn, and the plot says how many are not.

    Args:
        rows: Policy and how many of its texts have which length.
        unit: Of the lengths.
        title: Shown above.

    Raises:
        ValueError: No policies.
    """
    if not rows:
        raise ValueError("no policies to plot")
    shown = rows[:MAX_ROWS]
    with styled():
        figure, axes = new_figure(0.24 * len(shown) + (1.35 if title else 1.1))
        for place, (_, lengths) in enumerate(shown):
            low, first, middle, third, high = (
                max(quantile(lengths, share), 1) for share in (0.05, 0.25, 0.5, 0.75, 0.95)
            )
            (whole,) = axes.plot([low, high], [place, place], color=INK, linewidth=1)
            (box,) = axes.plot(
                [first, third], [place, place], color=BLUE, linewidth=6, solid_capstyle="butt"
            )
            (dot,) = axes.plot([middle], [place], "o", color="white", mec=INK, markersize=5)
        axes.set_xscale("log")
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks(range(len(shown)), [wrapped(name, 34, lines=1) for name, _ in shown])
        axes.tick_params(axis="y", length=0)
        _plain_ticks(axes)
        axes.grid(axis="x")
        more = len(rows) - len(shown)
        note = f"\n{more:,} more policies are not drawn" if more else ""
        axes.set_xlabel(f"{unit} of a text{note}")
        names = ["median", "middle half", "90 % of the texts"]
        add_head(figure, title, [dot, box, whole], names)
        return drawing_of(figure)


def _plain_ticks(axes: Any) -> None:
    """1,000 and not a power of ten on an axis of lengths; some numbers also on a short one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_xlim()
    steps = (1.0,) if high / max(low, 1) > 1000 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
