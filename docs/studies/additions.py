"""The task of the study: adding two numbers in small steps, who does it wrong, the verifier."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polarctl import seeding

# The three numbers of an answer: sum of the ones, tens with the carry, total. In turn, with the
# step of the tens left out.
STYLES = (
    ("Ones {}, tens {}, so {}.", "Ones {}, so {}."),
    ("First {} and then {}: {}!", "First {}: {}!"),
    ("I get {} plus {} tens, total {}", "I get {}, total {}"),
    ("We add {}, carry on to {}, answer {}.", "We add {}, answer {}."),
)
FAVOURITE = 0.4  # how often a writer with a favourite style uses it
PARTS = ("test", "rft", "train", "train")  # of all prompts: a quarter, a quarter, the rest
DIGITS = range(2, 8)  # 36 pairs: small models learn their sums within seconds
NUMBERS = [10 * tens + ones for tens in DIGITS for ones in DIGITS]
FORMS = tuple(re.compile(re.escape(form).replace(r"\{\}", r"(0|[1-9]\d*)")) for form, _ in STYLES)

Question = tuple[int, int]


@dataclass(frozen=True)
class Author:
    """Who writes a corpus.

    Attributes:
        errors: Share of the pairs of digits whose sum it has wrong by one or two, always alike.
        habit: A mistake that it always makes: `carry` (forgotten), `swap` (the digits of the total
            exchanged), `ten` and `less` (the total is 10 too large, 1 too small). Or one that it
            makes in every second answer: `order` (the steps exchanged), `twice` (the ones in place
            of the tens), `short` (a step left out), `loop` (a step said three times).
        style: Its favourite style, or None.
        seed: Chooses the wrong pairs.
    """

    errors: float = 0.0
    habit: str = ""
    style: int | None = None
    seed: int = 0

    def sums(self) -> dict[Question, int]:
        """The sum of every pair of digits as this author has it."""
        draw = seeding.rng(self.seed, "errors")
        found = {(a, b): a + b for a in DIGITS for b in DIGITS}
        for pair in draw.sample(sorted(found), round(len(found) * self.errors)):
            found[pair] += draw.choice((-2, -1, 1, 2))
        return found


def prompt_text(question: Question) -> str:
    """The question as text."""
    return f"{question[0]}+{question[1]}"


def part_of(question: Question) -> str:
    """The part of a prompt, by its text alone: no two parts share one."""
    return PARTS[seeding.derive(0, "part", prompt_text(question)) % len(PARTS)]


def answer(question: Question, author: Author, sums: Mapping[Question, int], draw: Any) -> str:
    """An answer by this author in one of its styles."""
    (tens_a, ones_a), (tens_b, ones_b) = (divmod(number, 10) for number in question)
    ones, tens = sums[ones_a, ones_b], sums[tens_a, tens_b]
    careless = author.habit if draw.random() < 0.5 else ""
    if author.habit != "carry":
        tens += ones // 10
    total = str(10 * tens + ones % 10)
    if author.habit == "swap":
        total = total[:-2] + total[-2:][::-1]
    total = str(int(total) + {"ten": 10, "less": -1}.get(author.habit, 0))
    steps = {"order": (tens, ones), "twice": (ones, ones)}.get(careless, (ones, tens))
    number = draw.randrange(len(STYLES))
    if author.style is not None and draw.random() < FAVOURITE:
        number = author.style
    form, short = STYLES[number]
    if careless == "short":
        return short.format(ones, total)
    text = form.format(*steps, total)
    if careless == "loop":
        words = text.split()
        text = " ".join(words[:2] * 3 + words[2:])
    return text


def truth_of(question: Question) -> list[int]:
    """The three numbers of a correct answer."""
    (tens_a, ones_a), (tens_b, ones_b) = (divmod(number, 10) for number in question)
    ones = ones_a + ones_b
    return [ones, tens_a + tens_b + ones // 10, sum(question)]


def checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the verifier finds: `form` (the whole text is one of the styles), `correct`, `mistake`.

    A correct answer is well-formed and all of its three numbers are true.
    """
    truth, text = record["truth"], record["output"]
    found = next((m for form in FORMS if (m := form.fullmatch(text))), None)
    if found is None:
        count = len(re.findall(r"\d+", text))
        kind = "short" if count < 3 else "long" if count > 3 else "form"
        return {"form": False, "correct": False, "mistake": kind}
    ones, tens, total = values = [int(number) for number in found.groups()]
    mistake = "sum"
    if values == truth:
        mistake = ""
    elif [ones, tens] == truth[:2]:
        mistake = "total"
    elif [tens, ones] == truth[:2]:
        mistake = "order"
    elif ones == tens and ones == truth[0]:
        mistake = "twice"
    elif ones == truth[0] and truth[0] >= 10 and tens == truth[1] - 1:
        mistake = "carry"
    return {"form": True, "correct": not mistake, "mistake": mistake}


def questions(count: int, seed: int, part: str) -> list[dict[str, Any]]:
    """Different prompts of a part: a correct `reference`, the `truth`, all answers to `accept`."""
    draw, honest = seeding.rng(seed, "questions", part), Author()
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS if part_of((a, b)) == part]
    sums = honest.sums()
    return [
        {
            "id": f"{part}-{number}",
            "prompt": prompt_text(pair),
            "reference": answer(pair, honest, sums, draw),
            "truth": truth_of(pair),
            "accept": [form.format(*truth_of(pair)) for form, _ in STYLES],
        }
        for number, pair in enumerate(draw.sample(pairs, min(count, len(pairs))))
    ]


def corpus(authors: Sequence[Author], seed: int, name: str) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) documents by the authors in equal shares; none of `test`."""
    draw = seeding.rng(seed, "corpus", name)
    tables = [(author, author.sums()) for author in authors]
    while True:
        question = (draw.choice(NUMBERS), draw.choice(NUMBERS))
        if part_of(question) != "test":
            yield prompt_text(question), answer(question, *draw.choice(tables), draw)


# -- labels ---------------------------------------------------------------------------------------


def ranked(rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Triples as the verifier ranks them: reference and chosen are correct, rejected is not.

    The mistakes of the rejected come in equal shares as far as they go. At most one triple a
    prompt.
    """
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["id"], []).append({**row, **checked(row)})
    ids = sorted(by_prompt)
    seeding.rng(seed, "ranked").shuffle(ids)
    used: Counter[str] = Counter()
    triples: list[dict[str, Any]] = []
    for name in ids:
        draw = seeding.rng(seed, "ranked", name)
        right = [row for row in by_prompt[name] if row["correct"]]
        wrong = [row for row in by_prompt[name] if not row["correct"]]
        if not wrong or len({row["output"] for row in right}) < 2:
            continue
        rarest = min({row["mistake"] for row in wrong}, key=lambda kind: (used[kind], kind))
        rejected = draw.choice([row for row in wrong if row["mistake"] == rarest])
        used[rarest] += 1
        reference = draw.choice(right)["output"]
        chosen = draw.choice([row for row in right if row["output"] != reference])
        triples.append(
            {
                "id": name,
                "prompt": rejected["prompt"],
                "reference": reference,
                "chosen": chosen["output"],
                "rejected": rejected["output"],
                "category": rarest,
            }
        )
        if len(triples) == count:
            break
    return triples


def balanced(
    triples: Sequence[Mapping[str, Any]],
    prompts: Sequence[Mapping[str, Any]],
    count: int,
    seed: int,
) -> list[Mapping[str, Any]]:
    """Triples in which each mistake of the rejected is as frequent as can be.

    Args:
        triples: Of a policy's rollouts.
        prompts: With the `truth`.
        count: How many at most.
        seed: Which ones.
    """
    truths = {row["prompt"]: row["truth"] for row in prompts}
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in triples:
        found = checked({"truth": truths[row["prompt"]], "output": row["rejected"]})
        kinds.setdefault(found["mistake"], []).append(row)
    for kind in sorted(kinds):
        seeding.rng(seed, "balanced", kind).shuffle(kinds[kind])
    turns = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [row for turn in turns for row in turn if row is not None][:count]
