"""What the documentation site adds to docs/: MkDocs runs these hooks (`hooks` in mkdocs.yml).

README.md is the front page and CHANGELOG.md a page. Links stay written as they work on GitHub, and
are led to the site's pages here. Pages that `nav` does not name are added to it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Files outside docs/ that are pages of the site.
ADDED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
# Where a page goes that `nav` does not name.
SECTIONS = {"guides": "Guides", "reference": "Reference"}
OTHERS = "Project"

LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]+)(?P<after>(?:#[^)\s]*)?\))")


def relinked(text: str, source: str, page: str) -> str:
    """A page's text with its relative links as the site needs them.

    Args:
        text: Markdown whose links are relative to the repository file `source`.
        source: Path of the file in the repository.
        page: Path of the page in the site.
    """

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = ADDED.get(file, file.removeprefix("docs/"))
        target = posixpath.relpath(inside, posixpath.dirname(page) or ".")
        return match["before"] + target + match["after"]

    return LINK.sub(replace, text)


def unbroken(text: str) -> str:
    """The same with no line break inside a figure of a table: `92.8 % [90.4, 94.9]`."""

    def row(match: re.Match[str]) -> str:
        figures = re.sub(r"(?<=\d) (?=%)|(?<=%) (?=\[)", "\N{NO-BREAK SPACE}", match[0])
        return re.sub(r"(?<=\d), (?=[-\d.]+\])", ",\N{NO-BREAK SPACE}", figures)

    return re.sub(r"^ *\|.*\|$", row, text, flags=re.M)


def completed(nav: list[Any], pages: list[str]) -> list[Any]:
    """The navigation with the pages that it does not name, in alphabetical order."""
    sections = {name: list(entries) for part in nav for name, entries in part.items()}
    named = {path for entries in sections.values() for e in entries for path in e.values()}
    for page in sorted(set(pages) - named):
        name = SECTIONS.get(page.partition("/")[0], OTHERS)
        sections.setdefault(name, []).append(page)
    return [{name: entries} for name, entries in sections.items()]


def on_config(config: Any) -> Any:
    """Complete the navigation."""
    folder = Path(config["docs_dir"])
    pages = [path.relative_to(folder).as_posix() for path in folder.rglob("*.md")]
    config["nav"] = completed(config["nav"], [*pages, *ADDED.values()])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    from mkdocs.structure.files import File

    for source, page in ADDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page to pages of the site, and keep the figures of tables whole."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):  # it has every word; a guide is the better answer
        page.meta["search"] = {"boost": 0.3}
    sources = {added: source for source, added in ADDED.items()}
    return unbroken(relinked(markdown, sources.get(uri, f"docs/{uri}"), uri))
