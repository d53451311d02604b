r"""Ablations of POLAR in small: what each part is worth, on the quickstart's world.

    python docs/studies/ablations.py --seed 0 1 2 -o ablations
    python docs/studies/ablations.py --only temperature -o ablations

Seven parts: `paper` (without pre-training, without references, without both), `policies`,
`checkpoints`, `negatives`, `references`, `temperature`, `copies`. Every row differs from the first
in one thing; steps, triples of a step and labels are the same for all. The real stages run by their
command lines, and the same command again goes on where it stopped. The results are in
docs/studies/ablations.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from study import Study, parser_of, say_cpu_minutes

from polarctl import seeding
from polarctl.evaluation import plots
from polarctl.evaluation.metrics import Interval, bootstrap_interval
from polarctl.model.devices import quiet_libraries
from polarctl.quickstart import policies, world
from polarctl.quickstart.policies import Zoo
from polarctl.quickstart.steps import read, write


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; options are those of the stages.

    Attributes:
        zoo: The policies.
        train: Prompts that the policies answer for training.
        test: Prompts that no training sees.
        triples: Triples of a training prompt.
        labels: Triples ranked by the truth, for fine-tuning.
        few: Numbers of policies to pre-train on, beside all of them.
        pretrain: Options of `pretrain`.
        tune: Options of `finetune` from the pre-trained model.
        scratch: Options of `finetune` from random weights.
    """

    zoo: Zoo = Zoo(
        words=120,
        colours=32,
        runs=tuple(run for run in Zoo().runs if run.name in "abcdhk"),
        held_out=("h",),
        base_steps=(100, 150),
        run_steps=(40, 80),
        batch=48,
    )
    train: int = 400
    test: int = 300
    triples: int = 24
    labels: int = 120
    few: tuple[int, int] = (3, 6)
    pretrain: str = "--lr 2e-3 --batch-size 32 --max-steps 200"
    tune: str = "--lr 5e-4 --batch-size 32 --max-steps 40"
    scratch: str = "--lr 2e-3 --batch-size 32 --max-steps 40"


SMALLEST = Sizes(
    zoo=Zoo(
        words=40,
        colours=12,
        runs=tuple(run for run in Zoo().runs if run.name in ("a", "d", "h")),
        held_out=("h",),
        base_steps=(30, 60),
        run_steps=(6, 12),
    ),
    train=40,
    test=40,
    triples=4,
    labels=16,
    few=(2, 3),
    pretrain="--lr 2e-3 --batch-size 8 --max-steps 3",
    tune="--lr 5e-4 --batch-size 8 --max-steps 2",
    scratch="--lr 2e-3 --batch-size 8 --max-steps 2",
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is different.

    Attributes:
        label: Its row in the tables.
        pretrained: Whether there is pre-training.
        reference: Whether any training or judgement sees a reference.
        policies: Number of policies, drawn by the seed, the same first ones for each number: an
            index into `Sizes.few`, or None: all.
        last: Only the last checkpoint of each run of policies.
        negatives: Rejected texts of a triple.
        temperature: Of the samples that pre-training sees.
        references: To judge by: the mean of the rewards.
        copies: Whether a chosen text may be the reference itself.
        model: Another arm whose models it takes.
    """

    label: str
    pretrained: bool = True
    reference: bool = True
    policies: int | None = None
    last: bool = False
    negatives: int = 1
    temperature: str = "1"
    references: int = 1
    copies: bool = True
    model: str = ""


ALL = "all"
ARMS = {ALL: Arm(label="with everything")}
PARTS = {
    "paper": {
        "no-pretraining": Arm(label="without pre-training", pretrained=False),
        "no-reference": Arm(label="without references", reference=False),
        "neither": Arm(label="without both", pretrained=False, reference=False),
    },
    "policies": {
        "policies-few": Arm(label="{few[0]} policies", policies=0),
        "policies-half": Arm(label="{few[1]} policies", policies=1),
    },
    "checkpoints": {"last": Arm(label="last checkpoints only", last=True)},
    "negatives": {"negatives-4": Arm(label="4 negatives", negatives=4)},
    "references": {"references-3": Arm(label="3 references", references=3, model=ALL)},
    "temperature": {
        "cool": Arm(label="temperature 0.5", temperature="0.5"),
        "hot": Arm(label="temperature 1.5", temperature="1.5"),
    },
    "copies": {"no-copies": Arm(label="no copies as chosen", copies=False)},
}
for _arms in PARTS.values():
    ARMS |= _arms

# What is measured: of the pre-trained model, then of the fine-tuned one.
SEEN, NEW, NO_LABEL, TUNED = "seen", "new", "no-label", "tuned"
MEASURES = {
    SEEN: "policies apart, new prompts",
    NEW: "policies apart, a new policy",
    NO_LABEL: "correct answer, no label",
    TUNED: "correct answer, fine-tuned",
}


class AblationStudy(Study):
    """One seed."""

    def make_policies(self) -> None:
        """The zoo, the prompts, the reward model's config, the pool."""
        if self.is_made():
            return
        quiet_libraries()
        zoo = dataclasses.replace(self.sizes.zoo, seed=self.seed)
        names = self.train_zoo(zoo)
        here = zoo.world()
        for part, count in (("train", self.sizes.train), ("test", self.sizes.test)):
            rows = world.questions(here, count, self.seed, part)
            # The trajectories are to become references; those of the rows are the truth's.
            rows = [{k: v for k, v in row.items() if k != "reference"} for row in rows]
            write(self.folder / f"prompts-{part}.jsonl", rows)
        self.write_config(policies.tokenizer(here), "config")
        self.write_pool(names)

    def sample(self, part: str, temperature: str) -> str:
        """Two samples of every policy for every prompt; their file."""
        name = self.path(f"samples-{part}-{temperature}.jsonl")
        self.polarctl(
            *("sample", self.path(f"prompts-{part}.jsonl"), "--pool", self.path("pool.jsonl")),
            *("--max-new-tokens", "12", "--batch-size", "512", "--temperature", temperature),
            *("-o", name),
        )
        return name

    @property
    def held_out(self) -> list[str]:
        """Patterns of the policies that pre-training does not see."""
        return [f"{run}-*" for run in self.sizes.zoo.held_out]

    def make_tests(self) -> None:
        """What every arm is judged by: triples of policies, and triples that the truth ranked."""
        test = self.sample("test", "1")
        exclude = options("--exclude-policies", self.held_out)
        self.polarctl("pair", test, *exclude, "-o", self.path(f"{SEEN}.jsonl"))
        require = options("--require", self.held_out)
        self.polarctl("pair", test, *require, "-o", self.path(f"{NEW}.jsonl"))
        here = dataclasses.replace(self.sizes.zoo, seed=self.seed).world()
        seen = tuple(f"{run}-" for run in self.sizes.zoo.held_out)
        counts = {"train": self.sizes.labels, "test": self.sizes.test}
        for part, file in (("train", self.sample("train", "1")), ("test", test)):
            rows = [row for row in read(Path(file)) if not row["policy"].startswith(seen)]
            triples = world.ranked(rows, here, counts[part], self.seed)
            write(self.folder / f"ranked-{part}.jsonl", triples)
        accept = {row["id"]: row["accept"] for row in read(self.folder / "prompts-test.jsonl")}
        for number in {arm.references for arm in ARMS.values()} - {1}:
            groups = [more_references(row, accept[row["id"]], number) for row in triples]
            write(self.folder / f"ranked-test-{number}.jsonl", groups)

    def chosen_policies(self, arm: Arm) -> list[str]:
        """Options of `pair` for the policies of an arm."""
        if arm.policies is not None:
            held = tuple(f"{run}-" for run in self.sizes.zoo.held_out)
            names = [row["policy"] for row in read(self.folder / "pool.jsonl")]
            names = sorted(name for name in names if not name.startswith(held))
            seeding.rng(self.seed, "few policies").shuffle(names)
            return options("--policies", names[: self.sizes.few[arm.policies]])
        zoo = self.sizes.zoo
        early = [f"base-{step}" for step in zoo.base_steps[:-1]]
        early += [f"*-{step}" for step in zoo.run_steps[:-1]]
        return options("--exclude-policies", self.held_out + (early if arm.last else []))

    def train(self, name: str, arm: Arm) -> None:
        """The models of an arm."""
        place = f"arms/{name}"
        (self.folder / place).mkdir(parents=True, exist_ok=True)
        bare = () if arm.reference else ("--no-reference",)
        start = ("--init-from-config", self.path("config"))
        negatives = ("--negatives", str(arm.negatives))
        tune = self.sizes.scratch
        if arm.pretrained:
            triples = self.path(f"{place}/triples.jsonl")
            self.polarctl(
                *("pair", self.sample("train", arm.temperature), *self.chosen_policies(arm)),
                *("--triples-per-prompt", str(self.sizes.triples), *negatives, "-o", triples),
                *(() if arm.copies else ("--equal-chosen", "resample")),
            )
            self.polarctl(
                *("pretrain", triples, *start, *self.sizes.pretrain.split(), *negatives, *bare),
                *("-o", self.path(f"{place}/rm")),
            )
            start, tune = ("-m", self.path(f"{place}/rm")), self.sizes.tune
        self.polarctl(
            *("finetune", self.path("ranked-train.jsonl"), *start, *tune.split(), *bare),
            *("-o", self.path(f"{place}/tuned")),
        )

    def judge(self, name: str, arm: Arm) -> None:
        """Accuracies of an arm's models."""
        (self.folder / "arms" / name).mkdir(parents=True, exist_ok=True)
        several = f"-{arm.references}" if arm.references > 1 else ""
        wanted = {TUNED: (f"ranked-test{several}", "tuned")}
        if arm.pretrained:
            wanted[NO_LABEL] = (f"ranked-test{several}", "rm")
            if arm.references == 1:
                wanted |= {SEEN: (SEEN, "rm"), NEW: (NEW, "rm")}
        for measure, (data, model) in wanted.items():
            self.polarctl(
                *("eval", self.path(f"{data}.jsonl")),
                *("-m", self.path(f"arms/{arm.model or name}/{model}")),
                *(() if arm.reference else ("--no-reference",)),
                *("--no-text", "-o", self.path(f"arms/{name}/{measure}.jsonl")),
            )

    def run(self, names: Sequence[str]) -> None:
        """The policies, the tests, and some arms."""
        self.make_policies()
        self.make_tests()
        for name in names:
            if not ARMS[name].model:
                self.train(name, ARMS[name])
            self.judge(name, ARMS[name])


def options(flag: str, values: Sequence[str]) -> list[str]:
    """An option that is given for each value."""
    return [word for value in values for word in (flag, value)]


def more_references(triple: Mapping[str, Any], accept: Sequence[str], most: int) -> dict[str, Any]:
    """A ranked triple as a group with several correct references, none of them an answer of it."""
    others = [text for text in accept if text not in (triple["reference"], triple["chosen"])]
    return {
        "id": triple["id"],
        "prompt": triple["prompt"],
        "references": [triple["reference"], *others][:most],
        "candidates": [
            {"output": triple["chosen"], "label": 1},
            {"output": triple["rejected"], "label": 0},
        ],
    }


# -- the results ----------------------------------------------------------------------------------


Figure = tuple[float, float, float]  # a value and the two ends of its interval


def right(folder: Path, name: str, measure: str) -> dict[str, float]:
    """Prompt to 1 where an arm's model was right and to 0 where not; empty: not measured."""
    path = folder / "arms" / name / f"{measure}.jsonl"
    if not Path(f"{path}.manifest.json").exists():
        return {}
    return {row["id"]: float(row["correct"]) for row in read(path)}


def over_seeds(values: Sequence[float]) -> Figure:
    """A mean and its 95 % interval by Student's t."""
    from scipy.stats import t

    mean = fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def figure(seeds: Sequence[Mapping[str, float]], least: float = 0.0) -> Figure:
    """The mean of numbers from `least` to 1 and its 95 % interval, cut to that range.

    Three seeds or more: the interval is over seeds. Fewer: over the prompts of these seeds.
    """
    if len(seeds) > 2:
        value, low, high = over_seeds([fmean(seed.values()) for seed in seeds])
        return value, max(least, low), min(1.0, high)
    prompts = [(seed, name) for seed, found in enumerate(seeds) for name in found]
    values = [(value + 1) / 2 for found in seeds for value in found.values()]
    found = bootstrap_interval(values, prompts, seed=0)
    low, value, high = (2 * end - 1 for end in (found.low, found.value, found.high))
    return value, low, high


def told(seeds: Sequence[Mapping[str, float]], form: str, least: float = 0.0) -> str:
    """That figure in percent, and the means of the seeds."""
    if not seeds:
        return ""
    value, low, high = (f"{100 * number:{form}}" for number in figure(seeds, least))
    each = ", ".join(f"{100 * fmean(seed.values()):{form}}" for seed in seeds)
    return f"{value} [{low}, {high}]" + (f" ({each})" if len(seeds) > 1 else "")


def tables(folders: Sequence[Path], names: Sequence[str], sizes: Sizes) -> str:
    """Accuracies, and their differences to the first row, seed by seed, as Markdown."""
    heads = " | ".join(MEASURES.values())
    rule = "|---" * (len(MEASURES) + 1) + "|"
    lines = [f"| accuracy, % | {heads} |", rule]
    changes = [f"| minus the first row, points | {heads} |", rule]
    for name in names:
        cells, gaps = [], []
        for measure in MEASURES:
            mine = [right(folder, name, measure) for folder in folders]
            first = [right(folder, ALL, measure) for folder in folders]
            cells.append(told([seed for seed in mine if seed], ".1f"))
            pairs = [(a, b) for a, b in zip(mine, first, strict=True) if a and b]
            apart = [{id_: a[id_] - b[id_] for id_ in a} for a, b in pairs]
            gaps.append(told(apart, "+.1f", least=-1.0))
        label = ARMS[name].label.format(few=sizes.few)
        lines.append(f"| {label} | {' | '.join(cells)} |")
        if name != ALL:
            changes.append(f"| {label} | {' | '.join(gaps)} |")
    return "\n".join([*lines, "", *changes])


def picture(folders: Sequence[Path], names: Sequence[str], sizes: Sizes) -> plots.Drawing:
    """The same accuracies as bars, with their intervals."""
    rows = []
    for name in names:
        bars = {}
        for measure, label in MEASURES.items():
            seeds = [found for folder in folders if (found := right(folder, name, measure))]
            if seeds:
                value, low, high = figure(seeds)
                cases = sum(map(len, seeds))
                bars[label] = Interval(value, low, high, cases, len(seeds))
        rows.append((ARMS[name].label.format(few=sizes.few), bars))
    return plots.accuracy_bars(rows, title="What each part is worth")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds and print the tables."""
    parser = parser_of(__doc__ or "", "ablations")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--only", choices=PARTS, help="one of the parts, and the first row")
    chosen = parser.parse_args(arguments)
    sizes = SMALLEST if chosen.smallest else Sizes()
    names = [ALL, *PARTS[chosen.only]] if chosen.only else list(ARMS)
    folders = [chosen.output / f"seed-{seed}" for seed in chosen.seed]
    for seed, folder in zip(chosen.seed, folders, strict=True):
        AblationStudy(folder, sizes, seed).run(names)
    text = tables(folders, names, sizes)
    ending = f"-{chosen.only}" if chosen.only else ""
    (chosen.output / f"tables{ending}.md").write_text(text + "\n")
    plots.write(chosen.output / f"ablations{ending}.png", picture(folders, names, sizes))
    print(text)
    say_cpu_minutes()


if __name__ == "__main__":
    main()
