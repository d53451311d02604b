"""Records for a reader: texts as they are, answers side by side, the differences marked.

Texts come from models and from strangers. What a terminal would obey (escapes, carriage returns,
marks that turn the direction of writing) is written out, so that it can be seen and does nothing.
Widths are counted in columns of the terminal: an East Asian character takes two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polarctl.console import visible
from polarctl.evaluation.page import Marks, difference
from polarctl.records import Record, Verdict, check, find_kind, kind_of, prompt_id

SIDE_BY_SIDE = 100  # columns from which two answers stand beside each other
_LONGEST_FACT = 200
# Shown as texts, or in a heading: not among the other fields.
_TOLD = set(
    "id prompt reference references chosen rejected output candidates negatives texts reward "
    "rewards margin correct better worse policy rejected_policy".split()
)


@dataclass(frozen=True)
class Passage:
    """One text under its heading.

    Attributes:
        head: What it is, who wrote it, its reward.
        text: The text; may hold anything.
        marks: Places (start, end) at which it differs from its counterpart.
    """

    head: str
    text: str
    marks: Marks = ()


@dataclass(frozen=True)
class Leaf:
    """A record, ready to be shown.

    Attributes:
        title: Where it stands and what it is.
        facts: Its other fields, one line each.
        texts: Prompt and references.
        answers: What is compared; two of a pair are marked against each other.
    """

    title: str
    facts: Sequence[str]
    texts: Sequence[Passage]
    answers: Sequence[Passage]


def margin_of(record: Mapping[str, Any]) -> float | None:
    """By how much the better answer has the higher reward: of verdicts and scored triples."""
    rewards = record.get("rewards")
    if "correct" in record and isinstance(record.get("margin"), int | float):
        return float(record["margin"])
    if "chosen" in record and isinstance(rewards, list) and len(rewards) == 2:
        return float(rewards[0]) - float(rewards[1])
    return None


def check_shown(record: Record) -> None:
    """Raise RecordError for what is none of our records; what `compare` writes is taken too."""
    if isinstance(record.get("correct"), dict):
        whole = {"correct": True, "margin": 0.0, "rewards": [], "baselines": {}}
        check({**record, **whole}, Verdict)
    else:
        check(record, find_kind(kind_of(record)))


def kind_shown(record: Mapping[str, Any]) -> str:
    """The kind of a good record, for its heading."""
    return "disagreement" if isinstance(record.get("correct"), dict) else kind_of(dict(record))


def identity(record: dict[str, Any]) -> str:
    """The record's `id`, else the hash of its prompt; empty without both."""
    if "prompt" in record or record.get("id"):
        return prompt_id(record)
    return ""


def leaf(record: Record) -> Leaf:
    """A good record as it is shown."""
    texts = record.get("texts", record)
    shared = [
        Passage(name, _plain(texts[name])) for name in ("prompt", "reference") if name in texts
    ]
    several = texts.get("references")
    if isinstance(several, list):
        shared += [Passage(f"reference {n}", _plain(text)) for n, text in enumerate(several, 1)]
    title = " ".join(
        filter(None, (record.where, kind_shown(record), identity(record), _verdict(record)))
    )
    facts = [f"{name}: {_fact(value)}" for name, value in record.items() if name not in _TOLD]
    if isinstance(record.get("rewards"), dict):  # of several models
        facts += [f"rewards of {name}: {_fact(pair)}" for name, pair in record["rewards"].items()]
    return Leaf(" ".join(title.split()), facts, shared, _answers(record, texts))


def _verdict(record: Mapping[str, Any]) -> str:
    margin = margin_of(record)
    if margin is None:
        return ""
    right = record.get("correct", margin > 0)
    told = "right" if right is True else "wrong" if right is False else ""
    return f"margin {margin:.4g} {told}".rstrip()


def _answers(record: Mapping[str, Any], texts: Mapping[str, Any]) -> list[Passage]:
    rewards = record.get("rewards", [record["reward"]] if "reward" in record else [])
    rewards = rewards if isinstance(rewards, list) else []
    if "candidates" in record:
        found = []
        for place, candidate in enumerate(record["candidates"]):
            named = candidate.get("name") or f"candidate {place + 1}"
            label = candidate.get("label")
            head = named if label is None else f"{named}, label {label}"
            found.append(Passage(head + _reward(rewards, place), _plain(candidate["output"])))
        if len(rewards) == len(found) and all(isinstance(r, int | float) for r in rewards):
            order = sorted(range(len(found)), key=lambda place: -rewards[place])
            found = [found[place] for place in order]
        return _marked(found)
    for sides, writers in (
        (("chosen", "rejected"), ("policy", "rejected_policy")),
        (("better", "worse"), ("better", "worse")),
    ):
        if all(side in texts for side in sides):
            pair = []
            for place, (side, writer) in enumerate(zip(sides, writers, strict=True)):
                name = record.get(writer)
                head = f"{side} ({name})" if isinstance(name, str) and name != side else side
                pair.append(Passage(head + _reward(rewards, place), _plain(texts[side])))
            negatives = record.get("negatives") or []
            return [
                *_marked(pair),
                *(Passage(f"negative {n}", _plain(text)) for n, text in enumerate(negatives, 1)),
            ]
    if "output" in record:
        head = "output" + (f" ({record['policy']})" if "policy" in record else "")
        return [Passage(head + _reward(rewards, 0), _plain(record["output"]))]
    return []


def _reward(rewards: Sequence[Any], place: int) -> str:
    if place >= len(rewards) or not isinstance(rewards[place], int | float):
        return ""
    return f": reward {rewards[place]:.4g}"


def _marked(answers: list[Passage]) -> list[Passage]:
    """Two answers with their differences; more stay as they are."""
    if len(answers) != 2:
        return answers
    marks = difference(answers[0].text, answers[1].text)
    return [Passage(a.head, a.text, found) for a, found in zip(answers, marks, strict=True)]


def _plain(text: Any) -> str:
    """A text field as text: of a conversation every message under its role."""
    if isinstance(text, str):
        return text.replace("\r\n", "\n")
    if isinstance(text, dict):  # what `--no-text` leaves
        return f"[{text.get('length', 0):,} characters, hash {text.get('hash')}]"
    parts = []
    for message in text:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        parts.append(f"{message['role']}: {content}")
    return "\n".join(parts).replace("\r\n", "\n")


def _fact(value: Any) -> str:
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    told = " ".join(told.split())
    return told if len(told) <= _LONGEST_FACT else told[: _LONGEST_FACT - 3] + "..."


def render(record: Leaf, width: int, *, color: bool) -> str:
    """The text that shows a record, lines of at most `width` columns.

    With colour, what one answer has and the other has not is bold and underlined; without, it
    stands in `{+ +}` (first answer) and `[- -]` (second), as of wdiff.

    Args:
        record: What to show.
        width: Columns; at least 20.
        color: Write the terminal's codes for colour.
    """
    import io

    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    console = Console(
        file=io.StringIO(),
        width=max(20, width),
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )

    def heading(text: str) -> Any:
        return Text(visible(text), style="bold cyan", overflow="fold")

    def body(answer: Passage, place: int) -> Any:
        text, last = Text(overflow="fold"), 0
        marks = ("{+", "+}") if place == 0 else ("[-", "-]")
        for start, end in answer.marks:
            text.append(visible(answer.text[last:start]))
            inside = visible(answer.text[start:end])
            style = f"bold underline {'green' if place == 0 else 'red'}"
            text.append(inside if color else inside.join(marks), style)
            last = end
        text.append(visible(answer.text[last:]))
        return Padding(text, (0, 0, 1, 0))

    console.print(Rule(characters="─"))
    console.print(heading(record.title))
    for fact in record.facts:
        console.print(Text(visible(fact), style="dim", overflow="fold"))
    for answer in record.texts:
        console.print(heading(answer.head))
        console.print(body(answer, 0))
    answers = list(record.answers)
    if width >= SIDE_BY_SIDE and len(answers) >= 2 and (answers[0].marks or answers[1].marks):
        beside = Table.grid(expand=True, padding=(0, 2, 0, 0))
        beside.add_column(ratio=1, overflow="fold")
        beside.add_column(ratio=1, overflow="fold")
        beside.add_row(*(Group(heading(a.head), body(a, i)) for i, a in enumerate(answers[:2])))
        console.print(beside)
        answers = answers[2:]
    for place, answer in enumerate(answers):
        console.print(heading(answer.head))
        console.print(body(answer, place))
    stream = console.file
    assert isinstance(stream, io.StringIO)
    lines = stream.getvalue().split("\n")
    return "\n".join(line if color else line.rstrip() for line in lines)
