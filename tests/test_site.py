"""The documentation site: pages read alike on GitHub and in the site, and say what is true.

`make docs` builds the site strictly. What is tested here needs no site generator.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(name):
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
pages = script("pages")


def prose(path):
    """The lines of a page outside fenced blocks, with their numbers; those inside are empty."""
    inside = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith("```")
        yield number, "" if inside or fence else line
        inside ^= fence


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    found, seen = set(), {}
    for _, line in prose(path):
        if match := re.match(r"#{1,6} +(.*)", line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
            count = seen[slug] = seen.get(slug, -1) + 1
            found.add(f"{slug}-{count}" if count else slug)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_link_to_a_heading_leads_to_one(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            page = path.parent / target if target else path
            assert anchor in anchors(page), f"{path.name}: {target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_list_reads_alike_in_both(path):
    """MkDocs wants a blank line before a list, and four spaces before what belongs to its item."""
    before, item = "", False
    for number, line in prose(path):
        bullet = re.match(r"([*-]|\d+\.) ", line)
        if bullet and before.strip() and not item:
            pytest.fail(f"{path.name}:{number}: a blank line is missing before the list")
        if item and not before.strip() and re.match(r" {1,3}\S", line):
            pytest.fail(f"{path.name}:{number}: indent what belongs to the item by four spaces")
        item = bool(bullet) or (item and (line.startswith(" ") or not line.strip()))
        before = line


def test_links_of_the_readme_lead_to_pages_of_the_site():
    text = "[a](docs/guides/rft.md#rounds) [b](CHANGELOG.md) ![c](docs/images/c.svg) [d](https://d.org/x)"
    assert pages.relinked(text, "README.md", "index.md") == (
        "[a](guides/rft.md#rounds) [b](changelog.md) ![c](images/c.svg) [d](https://d.org/x)"
    )
    text = "[a](../../README.md) [b](formats.md) [c](#here) [d](../architecture.md)"
    assert pages.relinked(text, "docs/guides/rft.md", "guides/rft.md") == (
        "[a](../index.md) [b](formats.md) [c](#here) [d](../architecture.md)"
    )


def test_a_figure_of_a_table_is_not_broken_and_code_is_left_alone():
    text = "| a | 92.8 % [90.4, 94.9] | [x, y] |\n92.8 % [90.4, 94.9]\n[1, 2]"
    assert pages.unbroken(text) == (
        "| a | 92.8\xa0%\xa0[90.4,\xa094.9] | [x, y] |\n92.8 % [90.4, 94.9]\n[1, 2]"
    )


def test_a_page_that_nobody_named_is_in_the_navigation():
    nav = [{"Guides": [{"B": "guides/b.md"}]}, {"Project": [{"H": "index.md"}]}]
    found = ["SECURITY.md", "guides/a.md", "guides/b.md", "index.md"]
    assert pages.completed(nav, found) == [
        {"Guides": [{"B": "guides/b.md"}, "guides/a.md"]},
        {"Project": [{"H": "index.md"}, "SECURITY.md"]},
    ]


def messages():
    """Every text that the program could print, with `...` for what is put in at run time."""

    def text(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return "..."

    for folder in ("polarctl", "stages"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Constant | ast.JoinedStr):
                    yield text(node)


def test_a_message_that_troubleshooting_explains_is_one_of_the_programs():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.*)`$", page, re.M)
    printed = "\n".join(text.replace("\n", " ").replace("`", "") for text in messages())
    assert len(quoted) > 30
    stale = [
        message
        for message in quoted
        if not re.search(re.escape(message).replace(r"\.\.\.", ".*"), printed)
    ]
    assert not stale, "no such message: leave it out, or quote it as it is now"
