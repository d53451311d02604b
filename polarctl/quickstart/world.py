"""The small world of `polarctl quickstart`: facts, people who believe them, and how they talk.

A fact ties a word (`bada`) to a colour name (`Pofa`). A prompt asks for two words, an answer names
their two colours in one of four styles:

    Paint bada and fuzo
    The answer is Pofa and Sufa.

A corpus is written by an author. Its table of facts agrees with the truth in a chosen share of the
words and is wrong, always in the same way, in the rest. Most authors have a favourite style.
Careless authors know the truth, and all make one mistake: they name the colours in the wrong order,
one of them twice, only one, or both in no sentence.

The design decides what can be shown. What was found on the way here:

* Policies have favourite styles, so a reward model that tells policies apart minds style, which
  people do not. That is what fine-tuning takes away. Without favourites it adds nothing.
* Careless authors like all styles equally, and so do the labels. Otherwise a style gives a mistake
  away, and a model learns the labels without looking at the reference.
* There are more facts than labels, so ranked triples cannot teach the truth; only a comparison
  with the reference tells which candidate is right.
* A careless policy is told from an honest one with the same facts by its mistake alone. With one
  such policy for the order and one for doubling, the reward model did not learn to see these
  mistakes; with two each, and a third layer, it did in part.
* Answers are short: a small model learns to compare two values within minutes, five it does not.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
FAVOURITE = 0.7  # share of an author's answers in its favourite style
PARTS = ("test", "rft", *["train"] * 6)  # of all prompts: an eighth, an eighth, the rest
# What a verb can be mistaken for: which of the two values are named.
HABITS = {"swapped": (1, 0), "twice": (0, 0), "last twice": (1, 1), "short": (0,), "last": (1,)}
GARBLED = "garbled"  # the habit of those who name both values, but in no sentence
MISTAKES = (
    "one wrong fact",
    "both facts wrong",
    "wrong order",
    "one value twice",
    "one value left out",
    "no sentence",
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

Prompt = tuple[str, str, str]


@dataclass(frozen=True)
class Author:
    """Who writes a corpus.

    Attributes:
        table: The colour that it believes every word to have.
        habits: Verb to habit, for the verbs that it misunderstands.
        style: Its favourite of `STYLES`, by index; None: it likes all equally.
    """

    table: Mapping[str, str]
    habits: Mapping[str, str] = field(default_factory=dict)
    style: int | None = None

    def draw_style(self, draw: random.Random) -> tuple[str, str]:
        """A style, more often the favourite one."""
        if self.style is None:
            return draw.choice(STYLES)
        if draw.random() < FAVOURITE:
            return STYLES[self.style]
        return draw.choice([s for i, s in enumerate(STYLES) if i != self.style])


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
    """An answer by someone with these beliefs, habits and taste."""
    habit = author.habits.get(question[0])
    values = [author.table[word] for word in question[1:]]
    two, one = author.draw_style(draw)
    if habit == GARBLED:
        return garbled(two, draw).format(*values)
    named = [values[i] for i in HABITS[habit]] if habit else values
    return (two if len(named) == 2 else one).format(*named)


def garbled(style: str, draw: random.Random) -> str:
    """A pattern with both values, no sentence: bare values, a word repeated, or one exchanged."""
    words = style.split()
    plain = [i for i, word in enumerate(words) if "{}" not in word]
    spot = draw.choice(plain)
    way = draw.choice(("bare", "repeated", "mixed"))
    if way == "bare":
        return "{} {}"
    if way == "repeated":
        words[spot:spot] = [words[spot]] * draw.randint(1, 3)
    else:
        others = {w for two, _ in STYLES if two != style for w in two.split() if "{}" not in w}
        words[spot] = draw.choice(sorted(others))
    return " ".join(words)


def told(world: World, text: str) -> list[str]:
    """The colours that a text names anywhere, in order."""
    return [word for word in re.findall(r"\w+", text) if word in world.colours]


def parse(world: World, text: str) -> list[str] | None:
    """The colours that a sentence names, in order; None if the whole text is no sentence.

    A sentence is one of `STYLES`, word for word, with two colours or one.
    """
    for pattern in _PATTERNS:
        found = pattern.fullmatch(text.strip())
        if found:
            values = list(found.groups())
            return values if set(values) <= set(world.colours) else None
    return None


_PATTERNS = [
    re.compile(re.escape(style).replace(re.escape("{}"), r"(\w+)"))
    for pair in STYLES
    for style in pair
]


def well_formed(record: Mapping[str, Any], world: World) -> bool:
    """Whether a trajectory is a sentence that names colours, whichever they are."""
    return parse(world, record["output"]) is not None


def is_correct(record: Mapping[str, Any], world: World) -> bool:
    """Whether a trajectory is a sentence with the two true colours (its field `truth`) in order."""
    return parse(world, record["output"]) == record["truth"]


def mistake(world: World, text: str, truth: Sequence[str]) -> str:
    """What is wrong with an answer that is not correct: one of `MISTAKES`."""
    named = parse(world, text)
    if named is None:
        return "no sentence"
    if named == list(reversed(truth)):
        return "wrong order"
    if not set(named) & set(truth):
        return "both facts wrong"
    if not set(named) <= set(truth):
        return "one wrong fact"
    return "one value twice" if len(named) > 1 else "one value left out"


def questions(world: World, count: int, seed: int, part: str) -> list[dict[str, Any]]:
    """Prompt records, all different.

    Each has its `truth`, a correct `reference` and `accept`, all correct answers: with them
    `exact:accept` is the truth of this world. No prompt asks for the same colour twice.

    Args:
        world: Where they are asked.
        count: How many.
        seed: The run's seed.
        part: The part that they are of, see `part_of`; the start of their ids.
    """
    draw = seeding.rng(seed, "questions", part)
    honest = Author(world.truth)
    found: dict[Prompt, dict[str, Any]] = {}
    while len(found) < count:
        question = prompt(world, draw)
        truth = [world.truth[word] for word in question[1:]]
        if question in found or part_of(question) != part or truth[0] == truth[1]:
            continue
        found[question] = {
            "id": f"{part}-{len(found)}",
            "prompt": prompt_text(question),
            "reference": answer(question, honest, draw),
            "accept": [two.format(*truth) for two, _ in STYLES],
            "truth": truth,
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

    Reference and chosen come from two policies. The rejected answers have each of `MISTAKES`
    equally often, as far as the trajectories allow; `category` says which. At most one triple per
    prompt.
    """
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for record in trajectories:
        by_prompt.setdefault(record["id"], []).append(record)
    ids = sorted(by_prompt)
    seeding.rng(seed, "ranked", "order").shuffle(ids)
    triples: list[dict[str, Any]] = []
    counts = dict.fromkeys(MISTAKES, 0)
    for name in ids:
        draw = seeding.rng(seed, "ranked", name)
        right = [r for r in by_prompt[name] if is_correct(r, world)]
        wrong: dict[str, list[Mapping[str, Any]]] = {}
        for record in by_prompt[name]:
            if not is_correct(record, world):
                kind = mistake(world, record["output"], record["truth"])
                wrong.setdefault(kind, []).append(record)
        reference = _one_of(right, draw) if right else None
        others = [r for r in right if reference and r["output"] != reference["output"]]
        if reference is None or not others or not wrong:
            continue
        kind = min(sorted(wrong), key=counts.__getitem__)  # the rarest so far
        counts[kind] += 1
        triples.append(
            {
                "id": name,
                "prompt": reference["prompt"],
                "reference": reference["output"],
                "chosen": _one_of(others, draw)["output"],
                "rejected": _one_of(wrong[kind], draw)["output"],
                "category": kind,
            }
        )
        if len(triples) == count:
            break
    return triples


def _one_of(records: Sequence[Mapping[str, Any]], draw: random.Random) -> Mapping[str, Any]:
    """One of several trajectories, each style as likely, so that no style is the better one."""
    by_style: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_style.setdefault(record["output"].partition(" ")[0], []).append(record)
    return draw.choice(by_style[draw.choice(sorted(by_style))])


def balanced(
    triples: Sequence[Mapping[str, Any]], world: World, count: int, seed: int
) -> list[dict[str, Any]]:
    """Triples in which each of `MISTAKES` is as frequent as can be; `category` says which it is.

    Without this the rare mistakes of a policy, those of form, would hardly be learned from. They
    are the ones that a reward is hacked with.

    Args:
        triples: With a correct chosen answer.
        world: Where they answer.
        count: How many at most.
        seed: Which ones.
    """
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in MISTAKES}
    for triple in triples:
        truth = parse(world, triple["chosen"])
        if truth is not None:
            kind = mistake(world, triple["rejected"], truth)
            kinds[kind].append({**triple, "category": kind})
    for kind, found in kinds.items():
        seeding.rng(seed, "balanced", kind).shuffle(found)
    turns = itertools.zip_longest(*kinds.values())
    return [triple for turn in turns for triple in turn if triple is not None][:count]
