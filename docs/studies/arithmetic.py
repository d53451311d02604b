r"""RFT with POLAR on short arithmetic with worked steps: a study that anyone can run again.

    python docs/studies/arithmetic.py --seed 0 1 2 -o arithmetic

Makes tiny policies that add two numbers in small steps (`37+48`: `Ones 15, tens 8, so 85.`). They
differ in competence, in systematic mistakes (a forgotten carry, exchanged digits, wrong sums of
some digits, a repeated or a missing step) and partly in style. Then the real stages run by their
command lines: sample, pair, pretrain, finetune, score, eval, rft. The same command again goes on
where it stopped. The results are in docs/studies/arithmetic.md.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from additions import Author, balanced, checked, corpus, questions, ranked
from study import Study, parser_of, say_cpu_minutes

from polarctl.evaluation.cases import estimate
from polarctl.quickstart.policies import bpe_tokenizer, lm_config, train_lm
from polarctl.quickstart.steps import TRUTH, read, write

# -- the policies ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; options are those of the stages."""

    base_steps: tuple[int, ...] = (120, 180, 280)
    run_steps: tuple[int, ...] = (80,)
    runs: tuple[tuple[str, Author], ...] = (
        ("good", Author(style=0)),
        ("wrong1", Author(0.25, style=1, seed=1)),
        ("wrong2", Author(0.35, style=2, seed=2)),
        ("wrong3", Author(0.45, style=3, seed=3)),
        ("wrong4", Author(0.55, style=0, seed=4)),
        ("carry", Author(0.2, "carry", style=2, seed=5)),
        ("swap", Author(0.1, "swap", style=3, seed=6)),
        ("ten", Author(0.1, "ten", style=1, seed=7)),
        ("less", Author(0.2, "less", style=2, seed=12)),
        ("order", Author(0.2, "order", style=0, seed=8)),
        ("twice", Author(0.2, "twice", style=1, seed=9)),
        ("short", Author(0.2, "short", style=2, seed=10)),
        ("loop", Author(0.2, "loop", style=3, seed=11)),
    )
    train: int = 640
    test: int = 320
    triples: int = 20
    labels: int = 200
    rft_prompts: int = 320
    pretrain: str = "--lr 2e-3 --batch-size 64 --max-steps 500"
    tune: str = "--lr 5e-4 --batch-size 32 --max-steps 100"
    scratch: str = "--lr 2e-3 --batch-size 32 --max-steps 100"
    rft: str = "--lr 1e-3 --batch-size 128 --num-generations 8"
    rft_steps: int = 20
    rounds: int = 4
    round_labels: int = 320
    check: str = "--check-steps 5"
    sft: str = "--lr 5e-3 --batch-size 256 --epochs 6"


SMALLEST = Sizes(
    base_steps=(180,),
    run_steps=(8,),
    runs=(("good", Author(style=0)), ("wrong", Author(0.4, style=1)), ("swap", Author(0, "swap"))),
    train=60,
    test=40,
    triples=4,
    labels=16,
    rft_prompts=32,
    pretrain="--lr 2e-3 --batch-size 16 --max-steps 6",
    tune="--lr 2e-4 --batch-size 8 --max-steps 2",
    scratch="--lr 2e-3 --batch-size 8 --max-steps 2",
    rft="--lr 1e-3 --batch-size 64 --num-generations 8",
    rft_steps=1,
    rounds=2,
    round_labels=16,
    check="--check-steps 1",
    sft="--lr 5e-3 --batch-size 64 --epochs 1",
)
CHECKS = 200  # prompts of the held-out check of a run
PATIENCE = ("--patience", "6")  # where the check has only fallen for long, the rest is not run
# What the policy to improve has learned from: it is unsure between these.
UNSURE = (Author(), Author(0.4, "carry", seed=100))


def tokenizer() -> Any:
    """A byte-level BPE: the prompt's digits are tokens, and so is each number of an answer."""
    from tokenizers import Regex, pre_tokenizers

    texts = itertools.islice(corpus([Author()], 0, "words"), 200)
    documents = ["\n".join(pair) for pair in texts]
    documents += ["".join(f" {number}" for number in range(200))] * 20
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" \d+|\d| ?[^\s\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe_tokenizer(documents, pieces, 1000)


def train_policies(folder: Path, sizes: Sizes, seed: int) -> list[str]:
    """Train every policy and save each as a model folder; their names, `mix` among them."""
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    made = tokenizer()
    model = Qwen3ForCausalLM(lm_config(made))
    names = []

    def learn(name: str, authors: Sequence[Author], steps: tuple[int, ...], warmup: int) -> None:
        texts = corpus(authors, seed, name)
        kept = train_lm(
            *(model, made, texts),
            steps=steps[-1],
            lr=1e-2,
            batch=32,
            checkpoints=steps,
            warmup=warmup,
        )
        for step, weights in kept.items():
            names.append(f"{name}-{step}")
            model.load_state_dict(weights)
            model.save_pretrained(folder / names[-1])
            made.save_pretrained(folder / names[-1])

    learn("base", [Author()], sizes.base_steps, 20)
    start = {name: weights.clone() for name, weights in model.state_dict().items()}
    for name, authors in [("mix", UNSURE), *((name, [one]) for name, one in sizes.runs)]:
        model.load_state_dict(start)
        learn(name, authors, sizes.run_steps, 5)
    return names


# -- the stages -----------------------------------------------------------------------------------


class AdditionStudy(Study):
    """One seed of the study, in one folder."""

    def __init__(self, folder: Path, sizes: Sizes, seed: int):
        super().__init__(folder, sizes, seed)
        self.mix = self.path(f"zoo/mix-{sizes.run_steps[-1]}")

    def make_policies(self) -> None:
        """The zoo, the pool of pre-training, the reward model's config, the prompts."""
        if self.is_made():
            return
        names = train_policies(self.folder / "zoo", self.sizes, self.seed)
        made = tokenizer()
        self.write_config(made, "rm-config")
        for part, count in (
            ("train", self.sizes.train),
            ("test", self.sizes.test),
            ("rft", self.sizes.rft_prompts),
        ):
            rows = questions(count, self.seed, part)
            write(self.folder / f"prompts-{part}.jsonl", rows)
            bare = [{**row, "reference": ""} for row in rows]
            write(self.folder / f"bare-{part}.jsonl", bare)
        # No test prompts, and none that RFT trains on.
        checks = read(self.folder / "prompts-train.jsonl")[:CHECKS]
        write(self.folder / "prompts-check.jsonl", checks)
        self.write_pool([name for name in names if not name.startswith("mix-")])

    def make_triples(self) -> None:
        """Samples of all policies, unlabelled triples, and triples ranked by the verifier."""
        for part in ("train", "test"):
            self.polarctl(
                *("sample", self.path(f"bare-{part}.jsonl"), "--pool", self.path("pool.jsonl")),
                *("--max-new-tokens", "24", "--batch-size", "512"),
                *("-o", self.path(f"samples-{part}.jsonl")),
            )
        self.polarctl(
            *("pair", self.path("samples-train.jsonl"), "-o", self.path("triples.jsonl")),
            *("--triples-per-prompt", str(self.sizes.triples)),
        )
        for part, count in (("train", self.sizes.labels), ("test", self.sizes.test)):
            rows = read(self.folder / f"samples-{part}.jsonl")
            triples = ranked(rows, count, self.seed)
            write(self.folder / f"ranked-{part}.jsonl", triples)

    def make_reward_models(self) -> None:
        """Pre-trained; fine-tuned from it, from random weights, and those without reference."""
        fresh = ("--init-from-config", self.path("rm-config"))
        labels = self.path("ranked-train.jsonl")
        self.polarctl(
            *("pretrain", self.path("triples.jsonl"), *fresh, *self.sizes.pretrain.split()),
            *("-o", self.path("rm")),
        )
        scratch = (*fresh, *self.sizes.scratch.split())
        for name, options in (
            ("rm-polar", ("-m", self.path("rm"), *self.sizes.tune.split())),
            ("rm-scratch", scratch),
            ("rm-bare", (*scratch, "--no-reference")),
        ):
            self.polarctl("finetune", labels, *options, "-o", self.path(name))
        for name in ("rm", "rm-polar", "rm-scratch", "rm-bare"):
            self.judge(name)

    def judge(self, name: str) -> None:
        """How often a reward model prefers the correct answer, on unseen prompts."""
        scores = self.path(f"{name}.scores.jsonl")
        bare = ("--no-reference",) if name == "rm-bare" else ()
        self.polarctl(
            *("score", self.path("ranked-test.jsonl"), "-m", self.path(name), *bare, "-o", scores)
        )
        self.polarctl("eval", scores, "-o", self.path(f"{name}.verdicts.jsonl"))

    def improve(
        self,
        name: str,
        start: str,
        model: str,
        steps: int,
        *more: str,
        part: str = "prompts",
        seed: int | None = None,
    ) -> None:
        """RFT of a policy with a reward model, or with the verifier (an empty `model`).

        The verifier looks at held-out prompts, and the best policy by it is the one that is kept.
        """
        watched = ("--check", TRUTH, "--check-prompts", self.path("prompts-check.jsonl"))
        reward = ("--reward-model", self.path(model), *watched, *self.sizes.check.split(), *more)
        self.polarctl(
            *("rft", self.path(f"{part}-rft.jsonl"), "-m", start, "-o", self.path(name)),
            *(reward if model else ("--reward", TRUTH)),
            *(*self.sizes.rft.split(), "--max-steps", str(steps), "--max-new-tokens", "24"),
            seed=seed,
        )

    def mend(self, number: int) -> str:
        """Fine-tune the pre-trained model on the labels and on what the policy itself wrote.

        Args:
            number: The round that comes.

        Returns:
            Name of the reward model.
        """
        name, seed = f"rm-round{number}", self.seed + number
        found = self.path(f"failures-{number - 1}.jsonl")
        self.polarctl(
            *("pair", self.path(f"round{number - 1}/rollouts.jsonl"), "--from-rollouts"),
            *("--label-by", TRUTH, "--triples-per-prompt", "8", "-o", found),
            seed=seed,
        )
        own = balanced(
            read(Path(found)),
            read(self.folder / "prompts-rft.jsonl"),
            self.sizes.round_labels,
            seed,
        )
        write(self.folder / f"labels-{number - 1}.jsonl", own)
        labels = [self.path(f"labels-{before}.jsonl") for before in range(1, number)]
        self.polarctl(
            *("finetune", self.path("ranked-train.jsonl"), *labels, "-m", self.path("rm")),
            *(*self.sizes.tune.split(), "-o", self.path(name)),
            seed=seed,
        )
        self.judge(name)
        return name

    def make_rounds(self) -> None:
        """RFT in rounds: after each the reward model learns the policy's own failures."""
        start, model = self.mix, "rm-polar"
        for number in range(1, self.sizes.rounds + 1):
            model = self.mend(number) if number > 1 else model
            name = f"round{number}"
            self.improve(name, start, model, self.sizes.rft_steps, seed=self.seed + number)
            start = self.path(name)

    def make_other_policies(self) -> None:
        """SFT, and RFT without rounds."""
        steps = self.sizes.rounds * self.sizes.rft_steps
        self.polarctl(
            *("rft", self.path("prompts-rft.jsonl"), "-m", self.mix, "-o", self.path("sft")),
            *("--method", "sft", *self.sizes.sft.split()),
        )
        self.improve("oracle", self.mix, "", steps)
        self.improve("polar", self.mix, "rm-polar", steps)
        self.improve("scratch", self.mix, "rm-scratch", steps, *PATIENCE)
        self.improve("bare", self.mix, "rm-bare", steps, *PATIENCE, part="bare")
        self.improve("polar-long", self.mix, "rm-polar", 3 * steps, *PATIENCE)

    def check_policies(self) -> None:
        """One answer of every policy to every unseen prompt."""
        models = {name: self.path(name) for name in POLICIES}
        models |= {"base": self.mix, "rounds": self.path(f"round{self.sizes.rounds}")}
        pool = [{"policy": name, "model": model} for name, model in models.items()]
        write(self.folder / "pool-final.jsonl", pool)
        self.polarctl(
            *("sample", self.path("prompts-test.jsonl"), "--samples", "1", "--top-p", "1"),
            *("--pool", self.path("pool-final.jsonl"), "--top-k", "0", "--max-new-tokens", "24"),
            *("--no-clean", "-o", self.path("samples-final.jsonl")),
        )

    def run(self) -> None:
        """Everything, in order."""
        self.make_policies()
        self.make_triples()
        self.make_reward_models()
        self.make_rounds()
        self.make_other_policies()
        self.check_policies()


# -- the results ----------------------------------------------------------------------------------

JUDGES = {
    "rm": "pre-trained, no label",
    "rm-polar": "pre-trained + fine-tuned",
    "rm-scratch": "fine-tuned only",
    "rm-bare": "fine-tuned only, without reference",
}
POLICIES = {
    "base": "untouched",
    "sft": "SFT on the references",
    "rounds": "RFT with POLAR, in rounds",
    "polar": "RFT with POLAR, no rounds",
    "polar-long": "the same, 3 times as long",
    "scratch": "RFT, RM without pre-training",
    "bare": "RFT, RM without pre-training and reference",
    "oracle": "RFT with the verifier as reward",
}
RUNS = ("polar", "polar-long", "scratch", "bare", "oracle")


def row_of(label: str, seeds: Sequence[Mapping[str, float]]) -> str:
    """A mean over all seeds with its interval over prompts, and the mean of each seed.

    Args:
        label: Start of the row.
        seeds: For each seed the figure of every prompt, by its id.
    """
    values = [value for seed in seeds for value in seed.values()]
    # A prompt that several seeds share is drawn with all its seeds.
    found = estimate(values, [name for seed in seeds for name in seed], 0)
    value, low, high = (100 * found[part] for part in ("value", "low", "high"))
    each = ", ".join(f"{100 * sum(seed.values()) / len(seed):.1f}" for seed in seeds)
    return f"{label} | {value:.1f} [{low:.1f}, {high:.1f}] | {each}"


def judged(folder: Path, name: str) -> dict[str, float]:
    """Prompt to 1.0 where a reward model preferred the correct answer, else 0.0."""
    prompts = {row["id"]: row["prompt"] for row in read(folder / "prompts-test.jsonl")}
    verdicts = read(folder / f"{name}.verdicts.jsonl")
    return {prompts[row["id"]]: float(row["correct"]) for row in verdicts}


def by_mistake(folders: Sequence[Path], name: str) -> str:
    """The same share for each mistake of the rejected answer."""
    right, cases = Counter[str](), Counter[str]()
    for folder in folders:
        kinds = {row["prompt"]: row["category"] for row in read(folder / "ranked-test.jsonl")}
        for prompt, correct in judged(folder, name).items():
            right[kinds[prompt]] += correct == 1
            cases[kinds[prompt]] += 1
    return ", ".join(f"{kind} {100 * right[kind] / cases[kind]:.0f}" for kind in sorted(cases))


def verified(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Prompt to what the verifier finds; no text at all is neither correct nor well-formed."""
    prompts = {row["prompt"]: row | {"output": ""} for row in read(folder / "prompts-test.jsonl")}
    for row in read(folder / "samples-final.jsonl"):
        if row["policy"] == name:
            prompts[row["prompt"]] = row
    return {prompt: checked(row) for prompt, row in prompts.items()}


def runs_of(folder: Path) -> list[str]:
    """The runs of reinforcement, rounds first."""
    return sorted(path.parent.name for path in folder.glob("round*/rollouts.jsonl")) + list(RUNS)


def checks(folders: Sequence[Path]) -> list[str]:
    """What the held-out check saw in each run: at its start, at best, in the end."""
    lines = ["", "| run, seed | check at the start, % | best, % (step) | at the end, % (step) |"]
    lines += ["|---|---|---|---|"]
    for folder, run in itertools.product(folders, runs_of(folders[0])):
        found = json.loads((folder / run / "manifest.json").read_bytes())["counts"]
        if "check_start" in found:
            start, best, last = (
                f"{100 * found[name]:.1f}" for name in ("check_start", "best_check", "last_check")
            )
            lines.append(
                f"| {run}, {folder.name.removeprefix('seed-')} | {start} | "
                f"{best} ({found['best_step']}) | {last} ({found['steps']}) |"
            )
    return lines


def tables(folders: Sequence[Path]) -> str:
    """What was found, as Markdown."""
    lines = ["| judge | prefers the correct answer, % | each seed | by mistake, % |"]
    lines += ["|---|---|---|---|"]
    for name, label in JUDGES.items():
        row = row_of(label, [judged(folder, name) for folder in folders])
        lines.append(f"| {row} | {by_mistake(folders, name)} |")
    lines += ["", "| policy | correct, % | each seed | well-formed, % | each seed |"]
    lines += ["|---|---|---|---|---|"]
    for name, label in POLICIES.items():
        answers = [verified(folder, name) for folder in folders]
        correct, form = (
            row_of(
                start, [{prompt: float(a[key]) for prompt, a in seed.items()} for seed in answers]
            )
            for start, key in ((f"| {label}", "correct"), ("", "form"))
        )
        lines.append(f"{correct}{form} |")
    lines += ["", "| run, seed | rollouts | reward | correct, % | well-formed, % | mistakes |"]
    lines += ["|---|---|---|---|---|---|"]
    for folder, run in itertools.product(folders, runs_of(folders[0])):
        rows = [row | checked(row) for row in read(folder / run / "rollouts.jsonl")]
        part = max(1, len(rows) // 5)
        for when, some in (("first fifth", rows[:part]), ("last fifth", rows[-part:])):
            reward, correct, form = (
                sum(row[key] for row in some) / len(some) for key in ("reward", "correct", "form")
            )
            kinds = Counter(row["mistake"] for row in some if row["mistake"]).most_common(3)
            told = ", ".join(f"{kind} {100 * count / len(some):.0f}" for kind, count in kinds)
            lines.append(
                f"| {run}, {folder.name.removeprefix('seed-')} | {when} | {reward:.2f} | "
                f"{100 * correct:.1f} | {100 * form:.1f} | {told} |"
            )
    return "\n".join(lines + checks(folders))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds and print the tables."""
    parser = parser_of(__doc__ or "", "arithmetic")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds of the study")
    options = parser.parse_args(arguments)
    sizes = SMALLEST if options.smallest else Sizes()
    folders = [options.output / f"seed-{seed}" for seed in options.seed]
    for seed, folder in zip(options.seed, folders, strict=True):
        AdditionStudy(folder, sizes, seed).run()
    text = tables(folders)
    (options.output / "tables.md").write_text(text + "\n")
    print(text)
    say_cpu_minutes()


if __name__ == "__main__":
    main()
