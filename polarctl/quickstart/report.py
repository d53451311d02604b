"""What the quickstart found: figures with intervals, tables, plots, one page.

Everything is read from the files that the stages wrote, so the figures can be worked out again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from polarctl.evaluation.cases import estimate, interval_of
from polarctl.evaluation.page import Document, Image, Section, Table, format_interval, render_html
from polarctl.quickstart import world as worlds
from polarctl.quickstart.policies import Zoo
from polarctl.storage import atomic

DISCRIMINATION = {
    "seen": "policies seen in pre-training",
    "held-out": "a held-out policy against any other",
}
ARMS = {
    "zero-shot": "pre-trained, no label",
    "pretrained": "pre-trained + fine-tuned",
    "scratch": "fine-tuned only",
    "no-reference": "fine-tuned only, without reference",
}
BASELINES = {"length": "longer wins", "overlap": "word overlap (F1)"}
POLICIES = {
    "untouched": "untouched",
    "sft": "SFT on the references",
    "rounds": "RFT with POLAR, in rounds",
    "long": "RFT with POLAR, no rounds, as long",
    "oracle": "RFT with the truth as reward",
}


def collect(folder: Path, *, zoo: Zoo, seeds: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """All figures as estimates (`polarctl.records.Estimate`) by name."""
    world = zoo.world()
    reports = {path.parent.name: _json(path) for path in folder.glob("eval/*/report.json")}
    figures: dict[str, Any] = {
        "discrimination": {name: reports[name]["overall"]["model"] for name in DISCRIMINATION},
        "preference": {"zero-shot": reports["zero-shot"]["overall"]["model"]},
        "preference_by_seed": {},
        "baselines": {
            name: reports["zero-shot"]["overall"][name]
            for name in BASELINES
            if name in reports["zero-shot"]["overall"]
        },
        "mistakes": {
            arm: reports[name]["categories"]
            for arm, name in (("zero-shot", "zero-shot"), ("pretrained", "pretrained-0"))
        },
        "policies": _answers(folder, world),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    for arm in list(ARMS)[1:]:
        names = [f"{arm}-{seed}" for seed in range(seeds)]
        figures["preference_by_seed"][arm] = [reports[n]["overall"]["model"] for n in names]
        verdicts = [row for name in names for row in _lines(folder / "eval" / f"{name}.jsonl")]
        # The same prompts under every seed: the bootstrap draws prompts, with all their seeds.
        figures["preference"][arm] = estimate(
            [float(row["correct"]) for row in verdicts], [row["id"] for row in verdicts], zoo.seed
        )
    return figures


def _answers(folder: Path, world: Any) -> dict[str, Any]:
    """Policy to the shares of unseen prompts that it answers correctly and in a sentence."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _lines(folder / "samples-final.jsonl"):
        found.setdefault(row["policy"], []).append(row)
    checks = {"correct": worlds.is_correct, "well-formed": worlds.well_formed}
    return {
        name: {
            check: estimate(
                [float(holds(row, world)) for row in found[name]],
                [row["id"] for row in found[name]],
                0,
            )
            for check, holds in checks.items()
        }
        for name in POLICIES
        if name in found
    }


def truth_over_steps(folder: Path, runs: Sequence[str], world: Any) -> list[dict[str, float]]:
    """Reward, share correct and share well-formed of each step's rollouts, over runs in a row.

    Args:
        folder: The quickstart's folder.
        runs: Names of `rft` runs, each of which goes on from the one before.
        world: Where they answer.
    """
    points: list[dict[str, float]] = []
    for run in runs:
        steps: dict[int, list[dict[str, Any]]] = {}
        for row in _lines(folder / "rft" / run / "rollouts.jsonl"):
            steps.setdefault(row["step"], []).append(row)
        points += [
            {
                "reward": fmean(row["reward"] for row in rows),
                "correct": fmean(worlds.is_correct(row, world) for row in rows),
                "well-formed": fmean(worlds.well_formed(row, world) for row in rows),
            }
            for _, rows in sorted(steps.items())
        ]
    return points


def _json(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _text(figure: Mapping[str, Any]) -> str:
    return format_interval(interval_of(figure))


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Four tables: policies told apart, the better answer preferred, which mistakes, RFT."""
    by_seed = figures["preference_by_seed"]
    preference = [[BASELINES[name], _text(f), ""] for name, f in figures["baselines"].items()]
    for arm, label in ARMS.items():
        seeds = ", ".join(f"{100 * f['value']:.1f}" for f in by_seed.get(arm, []))
        preference.append([label, _text(figures["preference"][arm]), seeds])
    before, after = (figures["mistakes"][arm] for arm in ("zero-shot", "pretrained"))
    return [
        Table(
            ("which policies", "accuracy"),
            [[DISCRIMINATION[name], _text(f)] for name, f in figures["discrimination"].items()],
            "Telling policies apart, unseen prompts",
        ),
        Table(
            ("judge", "accuracy", "by seed, %"),
            preference,
            "Preferring the correct answer, unseen prompts",
        ),
        Table(
            ("mistake of the rejected answer", "cases", "no label", "fine-tuned"),
            [
                [name, str(row["model"]["n"]), _text(row["model"]), _text(after[name]["model"])]
                for name, row in before.items()
            ],
            "The same by mistake, pre-trained models (first seed)",
        ),
        Table(
            ("policy", "correct", "well-formed"),
            [
                [POLICIES[name], _text(figure["correct"]), _text(figure["well-formed"])]
                for name, figure in figures["policies"].items()
            ],
            "Answers to unseen prompts, checked against the truth",
        ),
    ]


def write(folder: Path, figures: Mapping[str, Any], zoo: Zoo) -> None:
    """Write figures.json and report.html."""
    from polarctl.evaluation import plots

    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    atomic.write(folder / "figures.json", orjson.dumps(dict(figures), option=options))
    apart, preferring, mistakes, improving = tables(figures)
    bars = plots.accuracy_bars(
        [
            (label, {"accuracy": interval_of(figures["preference"][arm])})
            for arm, label in ARMS.items()
        ],
        title="Preferring the correct answer",
    )
    steps = _lines(folder / "rm" / "metrics.jsonl")
    learning = plots.curves(
        {"accuracy of the batch": _smooth([(row["step"], row["accuracy"]) for row in steps])},
        xlabel="step",
        ylabel="accuracy",
        title="Pre-training: telling policies apart",
    )
    rounds = sorted(path.parent.name for path in folder.glob("rft/round-*/rollouts.jsonl"))
    runs = {"in rounds": rounds, "no rounds": ["long"], "truth as reward": ["oracle"]}
    courses = {
        name: truth_over_steps(folder, names, zoo.world())
        for name, names in runs.items()
        if (folder / "rft" / names[0]).exists()
    }

    def course(figure: str, title: str) -> bytes:
        lines = {
            name: _smooth([(i + 1, point[figure]) for i, point in enumerate(points)], 5)
            for name, points in courses.items()
        }
        return plots.curves(lines, xlabel="step", ylabel="mean of the rollouts", title=title)

    seconds = [[name, f"{value:.0f}"] for name, value in figures["seconds"].items()]
    page = Document(
        "polarctl quickstart",
        "Every figure with its 95 % interval over unseen prompts",
        [
            Section(
                "Telling policies apart",
                [
                    "The reward model sees a reference and two candidates, one by the policy that "
                    "wrote the reference, and prefers that one. No label is used. Two samples of a "
                    "policy differ, and two policies often agree, so no judge reaches 100 %."
                ],
                table=apart,
                images=[Image(learning, "Accuracy during pre-training")],
            ),
            Section(
                "Preferring the correct answer",
                ["The same ranked triples for every judge; several seeds each."],
                table=preferring,
                images=[Image(bars, "Preference accuracy by judge")],
            ),
            Section(
                "Which mistakes are seen",
                [
                    "The labels have every mistake equally often. What the reward model does not "
                    "mind, reinforcement finds."
                ],
                table=mistakes,
            ),
            Section(
                "Improving a policy",
                [
                    "RFT sees rewards, SFT sees the references themselves. Without rounds the "
                    "reward model stays as it is, and the policy finds what it does not mind. In "
                    "rounds the policy's own failures become labels for the reward model. The "
                    "curves are over the rollouts; each reward model has a scale of its own."
                ],
                table=improving,
                images=[
                    Image(course("reward", "The reward"), "Reward during RFT"),
                    Image(course("correct", "The truth: correct"), "Correct answers during RFT"),
                    Image(course("well-formed", "The form: sentences"), "Sentences during RFT"),
                ],
            ),
            Section("Seconds", table=Table(("step", "seconds"), seconds)),
        ],
    )
    atomic.write(folder / "report.html", render_html(page).encode())


def _smooth(points: Sequence[tuple[float, float]], width: int = 20) -> list[tuple[float, float]]:
    """Means of consecutive runs of points: batches are noisy."""
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def own_text(folder: Path, zoo: Zoo) -> str:
    """A line of shell that scores a text of the user's with the model just made."""
    import random

    world = zoo.world()
    question = worlds.prompt(world, random.Random(1))
    first, second = (world.truth[word] for word in question[1:])
    wrong = next(colour for colour in world.colours if colour not in (first, second))
    record = {
        "prompt": worlds.prompt_text(question),
        "reference": worlds.STYLES[0][0].format(first, second),
        "candidates": [
            {"output": worlds.STYLES[1][0].format(first, second)},
            {"output": worlds.STYLES[1][0].format(first, wrong)},
        ],
    }
    line = orjson.dumps(record).decode()
    return f"echo {shlex.quote(line)} | polarctl score -m {folder}/tuned/pretrained-0"
