"""The small world of `polarctl quickstart`: facts, people who believe them, and how they talk.

A fact ties a word (`bada`) to a colour name (`Pofa`). A prompt asks for two words, an answer names
their two colours in one of four styles:

    Paint bada and fuzo
    The answer is Pofa and Sufa.

A corpus is written by an author, whose table of facts agrees with the truth in a chosen share of
the words and is wrong, always in the same way, in the rest. Careless authors know the truth but
misunderstand every verb: they name the colours in the wrong order, one of them twice, or only one.

The design decides what can be shown. What was found on the way here:

* All corpora share the styles, so who wrote an answer shows in what it says alone. Where style
  betrays the writer, a reward model learns style, and pre-training hurts its later use.
* There are hundreds of facts, so a few hundred ranked triples cannot teach the truth; only a
  comparison with the reference tells which candidate is right.
* Answers are short: a small model learns to compare two values within minutes, five it does not.
* Careless policies write for the ranked triples only. Where the policies of pre-training had such
  habits, the reward model learned to tell the habits and stopped there.
* Without careless answers among the rejected nothing teaches the reward model to mind an omission,
  and reinforcement finds that out: the reward rises while the answers shrink to one value.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polarctl import seeding

VERBS = ("Colour", "Paint", "Show")
# With two values, and with one.
STYLES = (
    ("The answer is {} and {}.", "The answer is {}."),
    ("I think {}, then {}.", "I think {}."),
    ("It must be {} plus {}!", "It must be {}!"),
    ("Surely {} with {}, ok", "Surely {}, ok"),
)
PARTS = ("test", "rft", *["train"] * 6)  # of all prompts: an eighth, an eighth, the rest
# How a verb can be misunderstood: which of the two values are named.
HABITS = {"swapped": (1, 0), "twice": (0, 0), "last twice": (1, 1), "short": (0,), "last": (1,)}
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

CARELESS = "careless"  # policies of such a name have a habit for every verb

Prompt = tuple[str, str, str]


@dataclass(frozen=True)
class Author:
    """Who writes a corpus.

    Attributes:
        table: The colour that it believes every word to have.
        habits: Verb to habit, for the verbs that it misunderstands.
    """

    table: Mapping[str, str]
    habits: Mapping[str, str]


@dataclass(frozen=True)
class World:
    """Words, colours and the truth.

    Attributes:
        words: What prompts ask about.
        colours: What answers name.
        truth: The true colour of every word.
    """

    words: tuple[str, ...]
    colours: tuple[str, ...]
    truth: Mapping[str, str]


def make(words: int, colours: int, seed: int) -> World:
    """A world with so many words (facts) and colours."""
    draw = seeding.rng(seed, "world")
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    names = [first + second for first in syllables for second in syllables]
    draw.shuffle(names)
    things = tuple(names[:words])
    palette = tuple(name.capitalize() for name in names[words : words + colours])
    values = [palette[i % colours] for i in range(words)]
    draw.shuffle(values)
    return World(things, palette, dict(zip(things, values, strict=True)))


def beliefs(world: World, share: float, seed: int) -> dict[str, str]:
    """A table that agrees with the truth in exactly this share of the words.

    The wrong entries exchange their true colours, so every colour is as frequent as in the truth
    and no frequency gives an author away.
    """
    draw = seeding.rng(seed, "beliefs", str(share))
    wrong = draw.sample(world.words, round(len(world.words) * (1 - share)))
    values = [world.truth[word] for word in wrong]
    draw.shuffle(values)
    for _ in range(100):
        fixed = [i for i, word in enumerate(wrong) if values[i] == world.truth[word]]
        for i in fixed:
            j = draw.randrange(len(values))
            values[i], values[j] = values[j], values[i]
    return {**world.truth, **dict(zip(wrong, values, strict=True))}


def prompt(world: World, draw: random.Random) -> Prompt:
    """A random question: verb and two different words."""
    first, second = draw.sample(world.words, 2)
    return draw.choice(VERBS), first, second


def prompt_text(question: Prompt) -> str:
    """The question as text."""
    return f"{question[0]} {question[1]} and {question[2]}"


def part_of(question: Prompt) -> str:
    """The part that a prompt belongs to, by its text alone: `train`, `test` or `rft`.

    So no two parts share a prompt, and no corpus that a policy learns from has one of `test`.
    """
    return PARTS[seeding.derive(0, "part", prompt_text(question)) % len(PARTS)]


def answer(question: Prompt, author: Author, draw: random.Random) -> str:
    """An answer in a random style by someone with these beliefs and habits."""
    habit = author.habits.get(question[0])
    values = [author.table[word] for word in question[1:]]
    named = [values[i] for i in HABITS[habit]] if habit else values
    two, one = draw.choice(STYLES)
    return (two if len(named) == 2 else one).format(*named)


def told(world: World, text: str) -> list[str]:
    """The colours that a text names, in order."""
    known = set(world.colours)
    return [word for word in re.findall(r"\w+", text) if word in known]


def is_correct(record: Mapping[str, Any], world: World) -> bool:
    """Whether a trajectory names the two true colours (kept in its field `truth`) and no others."""
    return told(world, record["output"]) == record["truth"]


def mistake(world: World, text: str, truth: Sequence[str]) -> str:
    """What is wrong with an answer that is not correct."""
    named = told(world, text)
    if named == list(reversed(truth)):
        return "wrong order"
    if set(named) <= set(truth):
        return "one value twice" if len(named) > 1 else "one value left out"
    return "wrong fact"


def questions(world: World, count: int, seed: int, part: str) -> list[dict[str, Any]]:
    """Prompt records, all different, each with its `truth` and a correct `reference`.

    Args:
        world: Where they are asked.
        count: How many.
        seed: The run's seed.
        part: The part that they are of, see `part_of`; the start of their ids.
    """
    draw = seeding.rng(seed, "questions", part)
    honest = Author(world.truth, {})
    found: dict[Prompt, dict[str, Any]] = {}
    while len(found) < count:
        question = prompt(world, draw)
        if question in found or part_of(question) != part:
            continue
        found[question] = {
            "id": f"{part}-{len(found)}",
            "prompt": prompt_text(question),
            "reference": answer(question, honest, draw),
            "truth": [world.truth[question[1]], world.truth[question[2]]],
        }
    return list(found.values())


def corpus(
    world: World, authors: Sequence[Author], seed: int, name: str
) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) documents, each by one of the authors at random.

    No prompt of the part `test` is among them.
    """
    draw = seeding.rng(seed, "corpus", name)
    while True:
        question = prompt(world, draw)
        if part_of(question) != "test":
            yield prompt_text(question), answer(question, draw.choice(authors), draw)


def ranked(
    trajectories: Sequence[Mapping[str, Any]], world: World, count: int, seed: int
) -> list[dict[str, Any]]:
    """Triples as a person would rank them: reference and chosen are correct, rejected is wrong.

    Reference and chosen come from two policies. The rejected answer has a wrong colour, or is by
    someone careless: the right colours in the wrong order, one of them twice, or one left out; its
    `category` says which. At most one triple per prompt.
    """
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for record in trajectories:
        by_prompt.setdefault(record["id"], []).append(record)
    ids = sorted(by_prompt)
    seeding.rng(seed, "ranked", "order").shuffle(ids)
    triples: list[dict[str, Any]] = []
    for name in ids:
        draw = seeding.rng(seed, "ranked", name)
        right = [r for r in by_prompt[name] if is_correct(r, world)]
        # Half of the time the rejected answer is careless, where one is at hand.
        careless = draw.random() < 0.5
        wrong = [r for r in by_prompt[name] if not is_correct(r, world)]
        wrong = [r for r in wrong if r["policy"].startswith(CARELESS) == careless] or wrong
        reference = draw.choice(right) if right else None
        others = [r for r in right if reference and r["policy"] != reference["policy"]]
        if reference is None or not others or not wrong:
            continue
        chosen, rejected = draw.choice(others), draw.choice(wrong)
        triples.append(
            {
                "id": name,
                "prompt": reference["prompt"],
                "reference": reference["output"],
                "chosen": chosen["output"],
                "rejected": rejected["output"],
                "category": mistake(world, rejected["output"], rejected["truth"]),
            }
        )
        if len(triples) == count:
            break
    return triples
