"""One report, three renderings: a self-contained HTML page, a terminal table, a formatted interval.

A `Document` is plain data: sections with paragraphs, a table, images and a block of code. The page
fetches nothing: images are embedded, the style sheet is inline, there is no script, and a content
security policy says so to the browser. It follows the reader's light or dark mode. Every text is
escaped, since prompts and category names come from data files. Equal reports give equal bytes.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import orjson

from polarctl.evaluation.metrics import Interval
from polarctl.storage import atomic

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Control characters (a terminal would obey them) and lone surrogates (UTF-8 cannot carry them).
_TOKEN = re.compile(r"\w+|[^\w\s]")
_MOST_WORDS = 1000
_SHORT = 24  # characters of a cell
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_NUMBER = re.compile(r"(?=.*\d)[-+\u2212\u00b1\d\s.,:/%()\[\]eE\u00d7\u2013]+|[-\u2013\u2014]?|n/a")


@dataclass(frozen=True)
class Table:
    """Columns and rows of finished text.

    Columns in which every cell reads as a number ("81.2 %", "[79.0, 83.1]", "-1.3e-05", or a dash,
    "n/a" or nothing for a missing one) are aligned right.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} has {len(row)} cells for {len(self.columns)} columns"
                )

    def numeric(self) -> list[bool]:
        """Whether each column holds numbers only; a table without rows has no such column."""
        return [
            bool(self.rows) and all(_NUMBER.fullmatch(row[i].strip()) for row in self.rows)
            for i in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Image:
    """A PNG and the sentence that replaces it for a reader who cannot see it.

    Raises:
        ValueError: the bytes are not a PNG image.
    """

    png: bytes
    alt: str

    def __post_init__(self) -> None:
        if not self.png.startswith(PNG_SIGNATURE):
            raise ValueError("an image of a report must be a PNG")


Marks = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Excerpt:
    """A text as it is, with parts of it marked.

    Attributes:
        label: What it is.
        text: The text.
        marks: (start, end) of the marked parts, in order and apart from each other.
    """

    label: str
    text: str
    marks: Marks = ()


@dataclass(frozen=True)
class Section:
    """A heading and, in this order, whichever of these are given; `level` 3 is one of a part."""

    heading: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    images: Sequence[Image] = ()
    code: str | None = None
    excerpts: Sequence[Excerpt] = ()
    level: int = 2


@dataclass(frozen=True)
class Document:
    """A title, a line below it, the sections; what it is of, by which command, and when."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()


_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --paper: #fff; --shade: #f6f8fa; --mark: #ffdf9e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --paper: #0d1117; --shade: #161b22;
    --mark: #6b4a00; }
  img { filter: invert(1) hue-rotate(180deg) brightness(1.1); mix-blend-mode: lighten; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h3 { margin: 2rem 0 .5rem; font-size: 1.05rem; }
.label { margin: .75rem 0 .25rem; color: var(--soft); font-size: .92rem; }
pre.text { margin: 0; max-height: 24rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 3px; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line);
  font-size: 1.25rem; }
p { margin: .75rem 0; white-space: pre-line; }
.subtitle { margin: .4rem 0 0; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem .9rem;
  margin: 1rem 0 0; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; font-family: ui-monospace, monospace; font-size: .85rem; line-height: 1.75; }
figure { margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { min-width: 100%; border-collapse: collapse; font-size: .92rem; }
figcaption { padding: 0 0 .5rem; color: var(--soft); font-size: .92rem; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal; }
td:first-child, th:first-child { min-width: 9rem; max-width: min(24rem, 60vw);
  overflow-wrap: break-word; }
thead th { border-bottom-width: 2px; background: var(--shade);
  vertical-align: bottom; }
tbody th { font-weight: 400; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td.short { white-space: nowrap; }
img { display: block; width: 100%; max-width: 700px; height: auto; margin: 1rem 0;
  border-radius: 6px; background: #fff; }
pre { margin: 1rem 0; padding: .9rem 1rem; overflow-x: auto; border-radius: 6px;
  background: var(--shade); font: .85rem/1.5 ui-monospace, monospace; overflow-wrap: normal; }
@media print { body { max-width: none; } .scroll, pre { overflow: visible; } h2, img, tr {
  break-inside: avoid; break-after: auto; } pre { white-space: pre-wrap; }
  pre.text { max-height: none; } }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def _escape(text: str) -> str:
    return html.escape(_clean(text), quote=True)


def _table(table: Table) -> list[str]:
    numeric = table.numeric()
    # A short name is not broken at its hyphens; the first column may be, or a phone has no room.
    short = [
        i > 0 and all(len(row[i]) <= _SHORT for row in table.rows)
        for i in range(len(table.columns))
    ]
    kinds = ["number" if n else "short" if s else "" for n, s in zip(numeric, short, strict=True)]
    css = [f' class="{kind}"' if kind else "" for kind in kinds]
    # Focusable, so that a table wider than the screen scrolls from the keyboard too.
    label = _escape(table.caption or "table")
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">', "<table>"]
    head = (
        f'<th scope="col"{attribute}>{_escape(name)}</th>'
        for attribute, name in zip(css, table.columns, strict=True)
    )
    lines += ["<thead>", f"<tr>{''.join(head)}</tr>", "</thead>", "<tbody>"]
    for row in table.rows:
        cells = []
        for i, cell in enumerate(row):
            tag = "td" if i or numeric[0] else "th"
            scope = ' scope="row"' if tag == "th" else ""
            cells.append(f"<{tag}{scope}{css[i]}>{_escape(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines += ["</tbody>", "</table>", "</div>"]
    # Not a <caption>: that would scroll away sideways with the table.
    caption = [f"<figcaption>{_escape(table.caption)}</figcaption>"] if table.caption else []
    return ["<figure>", *caption, *lines, "</figure>"]


def _section(section: Section) -> list[str]:
    tag = f"h{section.level}"
    lines = ["<section>", f"<{tag}>{_escape(section.heading)}</{tag}>"]
    lines += [f"<p>{_escape(paragraph)}</p>" for paragraph in section.paragraphs]
    if section.table is not None:
        lines += _table(section.table)
    for image in section.images:
        data = base64.b64encode(image.png).decode("ascii")
        lines.append(f'<img src="data:image/png;base64,{data}" alt="{_escape(image.alt)}">')
    if section.code is not None:
        lines.append(f'<pre tabindex="0"><code>{_escape(section.code)}</code></pre>')
    for excerpt in section.excerpts:
        lines.append(f'<p class="label">{_escape(excerpt.label)}</p>')
        lines.append(f'<pre class="text">{_marked(excerpt)}</pre>')
    return [*lines, "</section>"]


def _marked(excerpt: Excerpt) -> str:
    parts, last = [], 0
    for start, end in excerpt.marks:
        parts.append(_escape(excerpt.text[last:start]))
        parts.append(f"<mark>{_escape(excerpt.text[start:end])}</mark>")
        last = end
    return "".join([*parts, _escape(excerpt.text[last:])])


def difference(a: str, b: str) -> tuple[Marks, Marks]:
    """The parts of two texts that the other has not, word by word; none where all would be marked.

    Texts of more than 1,000 words are not compared: it would take seconds each.
    """
    words = [list(_TOKEN.finditer(text)) for text in (a, b)]
    if max(map(len, words)) > _MOST_WORDS:
        return (), ()
    left, right = ([found.group() for found in side] for side in words)
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    marks: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    same = 0
    for kind, *places in matcher.get_opcodes():
        if kind == "equal":
            same += places[1] - places[0]
            continue
        for side, (start, end) in enumerate((places[:2], places[2:])):
            if start < end:
                marks[side].append((words[side][start].start(), words[side][end - 1].end()))
    return marks if same else ((), ())


def render_html(report: Document) -> str:
    """The report as one HTML page; write it as UTF-8. Characters no page can hold become U+FFFD."""
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escape(report.title)}</title>",
        f"<style>{_CSS}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{_escape(report.title)}</h1>",
        f'<p class="subtitle">{_escape(report.subtitle)}</p>',
        *_facts(report.facts),
        "</header>",
        "<main>",
    ]
    for section in report.sections:
        lines += _section(section)
    return "\n".join([*lines, "</main>", "</body>", "</html>", ""])


def _facts(facts: Sequence[tuple[str, str]]) -> list[str]:
    if not facts:
        return []
    pairs = (f"<dt>{_escape(name)}</dt><dd>{_escape(text)}</dd>" for name, text in facts)
    return ["<dl>", *pairs, "</dl>"]


def write_report(
    page: Document, figures: Mapping[str, Any], folder: Path, name: str = "report"
) -> None:
    """Write a report's NAME.html, NAME.md and NAME.json.

    Args:
        page: The report for readers.
        figures: The same for machines.
        folder: Where to; it exists.
        name: NAME.
    """
    atomic.write(folder / f"{name}.html", render_html(page).encode())
    atomic.write(folder / f"{name}.md", render_markdown(page).encode())
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    atomic.write(folder / f"{name}.json", orjson.dumps(dict(figures), option=options))


def render_markdown(report: Document) -> str:
    """The report as GitHub's Markdown: headings, paragraphs and tables, for a pull request."""
    lines = [f"# {_flat(report.title)}", "", _flat(report.subtitle), ""]
    lines += [f"* {_flat(name)}: {_flat(text)}" for name, text in report.facts]
    lines += [""] if report.facts else []
    for section in report.sections:
        if section.level > 2 or not (section.paragraphs or section.table):
            continue
        lines += [f"## {_flat(section.heading)}", ""]
        for paragraph in section.paragraphs:
            lines += [_flat(paragraph), ""]
        if section.table is not None:
            table = section.table
            marks = ["---:" if numeric else "---" for numeric in table.numeric()]
            lines += [_flat(table.caption), ""] if table.caption else []
            for row in (table.columns, marks, *table.rows):
                lines.append(f"| {' | '.join(_flat(cell) for cell in row)} |")
            lines.append("")
    return "\n".join(lines)


def _flat(text: str) -> str:
    """A text in one line of Markdown, with nothing in it that Markdown or HTML would read."""
    return re.sub(r"([\\`*_<>|\[\]#~&])", r"\\\1", " ".join(_clean(text).split()))


class _Shown:
    """A table for a rich console: on a terminal too narrow for its longest words, a list."""

    def __init__(self, table: Table):
        self.table = table

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich import box
        from rich.cells import cell_len
        from rich.table import Table as RichTable
        from rich.text import Text

        table = self.table
        shown = RichTable(
            box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
        )
        if table.caption:
            shown.title = Text(_clean(table.caption))
        needed = 0
        for i, (name, numeric) in enumerate(zip(table.columns, table.numeric(), strict=True)):
            words = " ".join([name, *(row[i] for row in table.rows)]).split()
            width = max(map(cell_len, map(_clean, words)), default=0)
            needed += width + 3  # padding and the line between columns
            shown.add_column(
                Text(_clean(name)), justify="right" if numeric else "left", min_width=width
            )
        for row in table.rows:
            shown.add_row(*(Text(_clean(cell)) for cell in row))
        if needed <= options.max_width:
            yield shown
            return
        if table.caption:
            yield Text(_clean(table.caption) + "\n", overflow="fold")
        for row in table.rows:
            lines = [f"{n}: {cell}" for n, cell in zip(table.columns, row, strict=True) if cell]
            yield Text(_clean("\n".join(lines) + "\n"), overflow="fold")


def terminal_table(table: Table) -> _Shown:
    """The same table for a rich console; square brackets and escape codes in cells stay text.

    No word is broken: where the columns have no room for their longest words, every row is a list
    of its cells with the columns' names.
    """
    return _Shown(table)


def format_interval(interval: Interval) -> str:
    """An accuracy and its interval in percent: `81.2 % [79.0, 83.1]`."""
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"
