"""The reports in a real browser: desktop and phone, light, dark and printed."""

import io
import json

import pytest
from browser import Browser

from polarctl.cli import run

pytestmark = pytest.mark.slow
NAMES = ("report", "policies", "comparison")
HOSTILE = "<script>console.error(1)</script><img src=http://127.0.0.1:9/x.png> \x1b[31m 日本語 "
# Contrast of two colours by WCAG 2.2, of the texts with their background.
CONTRAST = """(() => {
  const light = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return ['body', '.subtitle', 'td', 'figcaption', 'dt'].map(name => {
    const ink = light(getComputedStyle(document.querySelector(name)).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
})()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reports of `eval`, `rate` and `compare` on texts that would do harm."""
    place = tmp_path_factory.mktemp("reports")

    def write(name, rows):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(place / name)

    policies = ("a-policy-with-a-rather-long-name-of-many-parts", "b", "c<b>")
    rows = [
        {
            "id": f"{i} {HOSTILE}",
            "prompt": f"{HOSTILE} {i} " + "word" * 60,
            "reference": f"it is {i}",
            "chosen": f"it is {i} " + HOSTILE * 3,
            "rejected": f"it was {i} " + "x" * 500,
            "policy": policies[i % 3],
            "rejected_policy": policies[(i + 1) % 3],
            "reference_policy": policies[i % 3],
            "category": f"kind {i % 2} {HOSTILE}",
            "rewards": [i % 5 - 1.5, i % 3 - 1.0],
        }
        for i in range(24)
    ]
    scored = write("scored.jsonl", rows)
    other = write("other.jsonl", [{**row, "rewards": row["rewards"][::-1]} for row in rows])
    answers = [
        {"prompt": f"p{i // 8}", "policy": policies[i % 2], "output": "o", "sample": i}
        | {"label": int(i % 3 == 0), "reward": i % 7}
        for i in range(80)
    ]
    for name, command in {
        "report": ["eval", scored],
        "policies": ["rate", write("answers.jsonl", answers)],
        "comparison": ["compare", scored, other],
    }.items():
        out = str(place / f"{name}.jsonl")
        assert run([*command, "-o", out, "--report", str(place / name), "-q"]) == 0
    return place


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


def pixels(png):
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("L")


def test_a_browser_that_is_asked_sees_faults(browser, tmp_path):
    """The checks below can fail: a page with a script, a request and a wide line."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src=http://127.0.0.1:9/x.png><script>console.error('no')</script>"
        "<p style='width: 3000px'>wide"
    )
    browser.open(path.as_uri(), 1280)
    assert browser.complaints()
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.run("document.documentElement.scrollWidth") > 1280


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_sound_on_desktop_and_phone(name, folder, browser):
    url = (folder / name / "report.html").as_uri()
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            browser.open(url, width, scheme=scheme)
            assert browser.complaints() == []
            assert browser.requests() == [url]
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth)")
            assert browser.run("[...document.images].every(i => i.alt)")
            assert browser.run("document.querySelectorAll('script').length") == 0
            assert min(browser.run(CONTRAST)) >= 4.5
            png = browser.screenshot()
            (folder / f"{name}-{width}-{scheme}.png").write_bytes(png)
            shown = pixels(png)
            assert shown.width == width
            # Paper is most of the page, of figures too.
            middle = sorted(shown.resize((50, 200)).tobytes())[5000]
            assert middle > 200 if scheme == "light" else middle < 60, (width, scheme)


def test_a_report_is_printed_on_white_and_whole(folder, browser):
    """Whoever reads in the dark prints black on white; a long text is not cut off."""
    url = (folder / "report" / "report.html").as_uri()
    browser.open(url, 800, media="print", scheme="dark")
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.images[0]).filter") == "none"
    cut = "[...document.querySelectorAll('pre.text')].filter(p => p.scrollHeight > p.clientHeight)"
    assert browser.run("document.querySelectorAll('pre.text').length") > 0
    assert browser.run(cut + ".length") == 0


def test_plots_are_there_as_svg_too(folder, browser):
    drawings = sorted(folder.glob("*/*.svg"))
    names = {path.stem for path in drawings}
    assert names >= {"accuracy", "differences", "policies", "pass_at_k", "wins"}
    for path in drawings:
        browser.open(path.as_uri(), 700)
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()]
        shown = pixels(browser.screenshot())
        dark, light = shown.getextrema()
        assert dark < 100 and light > 250, path.name
