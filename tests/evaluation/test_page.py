import io
import math
import struct
from html.parser import HTMLParser

import pytest

from polarctl.evaluation import report
from polarctl.evaluation.metrics import Interval
from polarctl.evaluation.page import (
    PNG_SIGNATURE,
    Document,
    Image,
    Section,
    Table,
    format_interval,
    render_html,
    terminal_table,
)
from polarctl.evaluation.plots import accuracy_bars, curves, differences, margin_histogram

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single' \x1b[31m \ud800 [bold]x[/bold]"
VOID = {"meta", "img"}
DOT = PNG_SIGNATURE + b"rest"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def everything(text):
    table = Table(["name", text], [[text, "1"]], text)
    section = Section(text, [text], table, [Image(DOT, text)], text)
    return Document(text, text, [section])


def png_size(png):
    assert png.startswith(PNG_SIGNATURE)
    return struct.unpack(">II", png[16:24])


def interval(value, n=100):
    return Interval(value, max(0.0, value - 0.1), min(1.0, value + 0.05), n, n)


def test_hostile_text_is_text_everywhere():
    text = render_html(everything(HOSTILE))
    page = Page(text)
    assert "script" not in page.tags
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    # title, h1, subtitle, h2, paragraph, caption, column, cell, code
    assert page.texts.count(shown) == 9
    assert ("img", "alt", shown) in page.attributes
    text.encode("utf-8")


def test_the_page_fetches_nothing():
    page = Page(render_html(everything("see https://example.org/a.png")))
    assert not {"link", "script", "iframe", "object", "base"} & set(page.tags)
    sources = [value for _, name, value in page.attributes if name in {"src", "href", "srcset"}]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    style = page.texts[page.texts.index(next(t for t in page.texts if "prefers-color" in t))]
    assert "url(" not in style and "@import" not in style
    policy = [v for _, name, v in page.attributes if name == "content" and "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_suits_phones_and_dark_mode_and_is_reproducible():
    text = render_html(everything("x"))
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    assert text.startswith("<!doctype html>\n<html lang=")
    assert render_html(everything("x")) == text


def test_parts_come_in_order_and_absent_parts_leave_nothing():
    page = Page(render_html(everything("x")))
    body = page.tags[page.tags.index("section") :]
    assert [t for t in body if t in {"h2", "p", "table", "img", "pre"}] == [
        "h2", "p", "table", "img", "pre",
    ]  # fmt: skip
    bare = Page(render_html(Document("t", "s", [Section("h")])))
    assert bare.tags[bare.tags.index("section") :] == ["section", "h2"]


def test_columns_of_numbers_are_aligned_right():
    table = Table(
        ["category", "n", "accuracy", "rate", "note"],
        [
            ["2024 exam", "1,200", "81.2 % [79.0, 83.1]", "-1.3e-05", "ok"],
            ["7", "8", "—", "n/a", ""],
        ],
    )
    assert table.numeric() == [False, True, True, True, False]
    page = Page(render_html(Document("t", "s", [Section("h", table=table)])))
    numbers = [tag for tag, name, value in page.attributes if (name, value) == ("class", "number")]
    assert numbers == ["th"] * 3 + ["td"] * 6


def test_a_table_without_rows_is_drawn():
    empty = Table(["a", "b"], [])
    assert empty.numeric() == [False, False]
    assert Page(render_html(Document("t", "s", [Section("h", table=empty)]))).tags.count("th") == 2


def test_a_row_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match="row 2 has 1 cells for 2 columns"):
        Table(["a", "b"], [["1", "2"], ["3"]])


def test_an_image_must_be_a_png():
    with pytest.raises(ValueError, match="PNG"):
        Image(b"GIF89a", "a drawing")


def test_the_terminal_table_keeps_brackets_and_drops_escape_codes():
    from rich.console import Console

    table = Table(["name", "accuracy"], [["[bold]x[/bold]\x1b[31m", "81.2 % [79.0, 83.1]"]], "cap")
    out = io.StringIO()
    Console(file=out, width=80).print(terminal_table(table))
    assert "[bold]x[/bold]\ufffd[31m" in out.getvalue()
    assert "81.2 % [79.0, 83.1]" in out.getvalue()
    assert "cap" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_narrow_terminal_shows_every_digit():
    from rich.console import Console

    out = io.StringIO()
    table = Table(["category", "accuracy"], [["reasoning", "81.2 % [79.0, 83.1]"]])
    Console(file=out, width=20).print(terminal_table(table))
    assert "…" not in out.getvalue()
    assert all(part in out.getvalue() for part in ("81.2", "79.0", "83.1"))


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_no_terminal_is_so_narrow_that_a_word_is_broken(width):
    from rich.console import Console

    columns = ["mistake of the rejected answer", "cases", "no label", "fine-tuned"]
    cells = ["a colour too many", "1,234", "81.2 % [79.0, 83.1]", "interchanged 92.0 %"]
    out = io.StringIO()
    Console(file=out, width=width).print(terminal_table(Table(columns, [cells], "The same")))
    assert max(map(len, out.getvalue().splitlines())) <= width
    words = out.getvalue().replace(":", "").split()
    for word in " ".join(["The same", *columns, *cells]).split():
        assert word in words, word


def test_format_interval():
    assert format_interval(Interval(0.8123, 0.7899, 0.831, 10, 5)) == "81.2 % [79.0, 83.1]"
    assert format_interval(Interval(1.0, 0.5, 1.0, 3, 3)) == "100.0 % [50.0, 100.0]"


def test_plots_are_pngs_1400_pixels_wide_with_equal_bytes_and_no_metadata():
    draws = [
        lambda: margin_histogram([-1.0, 0.0, 0.5, 2.0, 2.1], title="margins"),
        lambda: accuracy_bars([("all", {"model": interval(0.8)})], title="accuracy"),
        lambda: curves({"kl": [(0, 0.0), (1, 0.2)]}, xlabel="step", ylabel="KL"),
    ]
    for draw in draws:
        png = draw()
        assert png_size(png)[0] == 1400
        assert draw() == png
        assert b"tEXt" not in png and b"tIME" not in png


@pytest.mark.parametrize(
    "margins", [[0.0], [3.0] * 5, [1.0] * 20 + [1e6, -1e6], [1e-9, -1e-9], [-4.0, -3.0]]
)
def test_histograms_of_odd_samples_are_drawn(margins):
    assert margin_histogram(margins).startswith(PNG_SIGNATURE)


def test_rows_grow_with_their_labels_and_stop_at_the_limit(monkeypatch):
    monkeypatch.setattr("polarctl.evaluation.plots.MAX_ROWS", 3)
    short = accuracy_bars([("a", {"model": interval(0.5)})])
    long = accuracy_bars([("a long name " * 20, {"model": interval(0.5)})])
    assert png_size(long)[1] > png_size(short)[1]
    many = [(str(i), {"model": interval(0.5)}) for i in range(3)]
    at, over = accuracy_bars(many), accuracy_bars([*many, *many])
    assert png_size(at) == png_size(over)
    assert at != over  # the second says how many are not drawn


@pytest.mark.filterwarnings("error")
def test_labels_are_plain_text_and_warn_about_nothing():
    rows = [
        ("$\\frac", {"_model": interval(1.0), "<b>": interval(0.0)}),
        ("推理", {"<b>": interval(0.5)}),
        ("", {}),
    ]
    assert accuracy_bars(rows, title="$x", chance=None).startswith(PNG_SIGNATURE)
    lines = {"_a": [(0, 1.0), (1, math.nan), (2, math.inf)], "$": [], "": [(0, 2.0)]}
    assert curves(lines, xlabel="$", ylabel="推", title="_").startswith(PNG_SIGNATURE)


def test_the_users_matplotlib_settings_neither_matter_nor_change():
    import matplotlib

    points = {"a": [(0.0, 1.0), (1.0, 2.0)]}
    plain = curves(points, xlabel="x", ylabel="y")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert curves(points, xlabel="x", ylabel="y") == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_plots_of_nothing_are_refused():
    for margins in ([], [math.nan], [math.inf]):
        with pytest.raises(ValueError):
            margin_histogram(margins)
    for rows in ([], [("all", {})]):
        with pytest.raises(ValueError):
            accuracy_bars(rows)
    for rows in ([], [("all", {})]):
        with pytest.raises(ValueError):
            differences(rows, xlabel="x")
    for series in ({}, {"a": []}, {"a": [(0, math.nan)]}):
        with pytest.raises(ValueError):
            curves(series, xlabel="x", ylabel="y")


def test_a_plot_names_the_judges_as_the_table_beside_it_does(tmp_path):
    figure = {"value": 0.75, "low": 0.5, "high": 1.0, "n": 4, "clusters": 4}
    names = {"model": "model", "length": "longer wins", "overlap": "word overlap (F1)"}
    overall = dict.fromkeys(names, figure)
    given = {"metric": "accuracy", "overall": overall, "categories": {}, "skipped": {}}
    report.write(str(tmp_path), given, [1.0, -1.0], "x.jsonl")
    interval = Interval(0.75, 0.5, 1.0, 4, 4)
    drawn = accuracy_bars([("all", dict.fromkeys(names.values(), interval))], title="Accuracy")
    assert (tmp_path / "accuracy.png").read_bytes() == drawn
    assert all(name in (tmp_path / "report.html").read_text("utf-8") for name in names.values())


def test_a_difference_is_drawn_where_it_is_with_both_ends():
    """+12.5 points [-5, 30] of 8 cases, -50 [-75, -25] of 4; what a row lacks is left out."""
    new = {"value": 0.125, "low": -0.05, "high": 0.3, "n": 8}
    other = {"value": -0.5, "low": -0.75, "high": -0.25, "n": 4}
    rows = [("all", {"new": new, "other": other}), ("maths", {"other": other})]
    (axes,) = differences(rows, xlabel="points").figure.axes
    points = [bar.lines[0].get_xdata()[0] for bar in axes.containers]
    assert points == [12.5, -50, -50]
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in axes.containers]
    assert ends == [[-5, 30], [-75, -25], [-75, -25]]
    colours = [bar.lines[0].get_color() for bar in axes.containers]
    assert colours[1] == colours[2] != colours[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all\nn = 8", "maths\nn = 4"]
    first, second = axes.get_yticks()
    assert first < second and axes.yaxis_inverted()  # the first row is above
