"""The report of `compare`: figures of every file, differences to the first, disagreements."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polarctl.evaluation.cases import estimate, interval_of, labels_of, text_mark
from polarctl.evaluation.metrics import pairs_of_group
from polarctl.evaluation.page import (
    Document,
    Image,
    Section,
    Table,
    format_interval,
    write_report,
)
from polarctl.evaluation.paired import Key, Sheet, difference, unmatched, words
from polarctl.records import Record, outputs_of

FILES = (
    *(f"{name}.{kind}" for name in ("accuracy", "differences") for kind in ("png", "svg")),
    "report.html",
    "report.json",
    "report.md",
)


def names_of(paths: Sequence[str]) -> list[str]:
    """Short names of files, all different: their stems, their folders, or their paths.

    A `scores.jsonl`, as `eval run` writes it, is called by its folder.
    """
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    stems = [Path(path).name.partition(".")[0] for path in paths]
    called = [
        folder if stem == "scores" else stem for stem, folder in zip(stems, folders, strict=True)
    ]
    for names in (called, folders):
        if len(set(names)) == len(names):
            return names
    return [f"{place}. {path}" for place, path in enumerate(paths, 1)]


def compare(sheets: Sequence[Sheet], keys: Sequence[Key], seed: int) -> dict[str, Any]:
    """The comparison of the first sheet with each of the others, over common items.

    Returns:
        `first`: its name. `overall`: name to accuracy. `differences`: name of another to
        `polarctl.evaluation.paired.difference`. `categories`: the same two of each category.
        `verdicts`: a sentence each. `items`, `unmatched`, `skipped`: what was compared and what
        not.
    """
    first, others = sheets[0], sheets[1:]
    groups: defaultdict[str, list[Key]] = defaultdict(list)
    for key in keys:
        if key in first.categories:
            groups[first.categories[key]].append(key)

    def figures(these: Sequence[Key]) -> dict[str, Any]:
        clusters = [key[0] for key in these for _ in first.items[key]]
        return {
            "overall": {
                sheet.name: estimate(
                    [float(right) for key in these for right in sheet.right(key)], clusters, seed
                )
                for sheet in sheets
            },
            "differences": {other.name: difference(first, other, these, seed) for other in others},
        }

    whole = figures(keys)
    left = unmatched(sheets, keys)
    return {
        "first": first.name,
        **whole,
        "categories": {name: figures(groups[name]) for name in sorted(groups)},
        "verdicts": [words(first.name, n, found) for n, found in whole["differences"].items()],
        "items": len(keys),
        "unmatched": {sheet.name: some for sheet, some in zip(sheets, left, strict=True)},
        "skipped": {sheet.name: sheet.skipped for sheet in sheets},
    }


def disagreements(
    records: Iterable[Record], sheets: Sequence[Sheet], keys: set[Key], *, text: bool
) -> Iterator[dict[str, Any]]:
    """The cases that not all of the models have right or all wrong.

    Args:
        records: Those of the first sheet, again.
        sheets: What the models say.
        keys: The common items.
        text: Whether to write the texts; else each text's hash and length.
    """
    counter = Sheet("")  # numbers equal records as the sheets do
    for record in records:
        key = counter.key(record)
        if key not in keys:
            continue
        outputs = outputs_of(record)
        names = [c.get("name") for c in record.get("candidates", [])] or [None, None]
        for place, (better, worse) in enumerate(pairs_of_group(labels_of(record))):
            rewards = {sheet.name: list(sheet.items[key][place]) for sheet in sheets}
            correct = {name: pair[0] > pair[1] for name, pair in rewards.items()}
            if len(set(correct.values())) == 1:
                continue
            texts = {name: record[name] for name in ("prompt", "reference") if name in record}
            texts |= {"better": outputs[better], "worse": outputs[worse]}
            if not text:
                texts = {name: text_mark(value) for name, value in texts.items()}
            case = {
                "id": key[0],
                "where": record.where,
                "category": sheets[0].categories.get(key),
                "correct": correct,
                "rewards": rewards,
                "better": names[better],
                "worse": names[worse],
                "texts": texts,
            }
            yield {name: value for name, value in case.items() if value is not None}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Accuracy of each file, and its difference to the first, overall and by category."""
    first = report["first"]
    rows = []
    parts = {"all": report, **report["categories"]}
    for category, part in parts.items():
        for name, figure in part["overall"].items():
            found = part["differences"].get(name)
            told = ["", "", ""]
            if found is not None:
                value, low, high = (100 * found[end] for end in ("value", "low", "high"))
                told = [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", f"{found['p']:.2g}"]
                told.append(f"{found['first_only']:,} / {found['second_only']:,}")
            share = format_interval(interval_of(figure))
            rows.append([category, name, f"{figure['n']:,}", share, *told])
    heads = ("category", "file", "cases", "accuracy", f"minus {first}, points", "p")
    return [
        Table(
            (*heads, "alone right"),
            rows,
            f"{report['items']:,} common items; 95 % intervals over prompts; p of McNemar's exact "
            f"test; alone right: {first} / the other",
        )
    ]


def write(folder: str, report: Mapping[str, Any], facts: Sequence[tuple[str, str]] = ()) -> None:
    """Write report.json, report.html, report.md and the plots as PNG and SVG into a folder.

    Args:
        folder: Where; made if missing.
        report: What `compare` found.
        facts: For its head; see `polarctl.evaluation.heading`.
    """
    from polarctl.evaluation import plots

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    first, others = report["first"], report["differences"]
    parts = [("all", report), *report["categories"].items()]
    gaps = plots.differences(
        [(category, part["differences"]) for category, part in parts],
        xlabel=f"accuracy minus that of {first}, points, 95 % interval",
        title=f"Better than {first} to the right, worse to the left",
    )
    bars = plots.accuracy_bars(
        [
            (category, {name: interval_of(figure) for name, figure in part["overall"].items()})
            for category, part in parts
        ],
        title="Accuracy",
    )
    (table,) = tables(report)
    left = [
        [name, str(some["absent"]), str(some["content"]), str(report["skipped"][name])]
        for name, some in report["unmatched"].items()
    ]
    heads = ("file", "not in every file", "known id, other content", "nothing to compare")
    sections = [
        Section("Verdict", report["verdicts"], images=[Image(gaps, "Differences by category")]),
        Section("Accuracy", table=table, images=[Image(bars, "Accuracy by category")]),
    ]
    if any(int(number) for row in left for number in row[1:]):
        told = "items that are in no figure"
        sections.append(Section("Left out", table=Table(heads, left, told)))
    page = Document("Comparison", f"{first} with {', '.join(others)}", sections, facts)
    plots.write(target / "differences.png", gaps)
    plots.write(target / "accuracy.png", bars)
    write_report(page, report, target)
