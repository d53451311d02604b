"""The steps of `polarctl quickstart`: the real stages, one after the other, in one folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from polarctl import console
from polarctl.errors import Interrupted, PolarctlError
from polarctl.model.devices import quiet_libraries
from polarctl.quickstart import policies as zoo
from polarctl.quickstart import world
from polarctl.quickstart.policies import Zoo
from polarctl.storage import atomic
from polarctl.storage.read import Reader

TRUTH = "exact:accept"  # the verifier that knows all correct answers


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything.

    Attributes:
        train: Prompts for pre-training and ranking.
        test: Prompts that no training sees.
        triples: Triples per training prompt for pre-training.
        labels: Ranked triples for fine-tuning; and of a round, at most.
        seeds: Repetitions of the fine-tuning ablation.
        pretrain: Options of `pretrain`.
        tune: Options of `finetune` from the pre-trained model.
        scratch: Options of `finetune` from random weights.
        rft: Options of `rft`; its prompts are `rft_prompts`.
        rft_prompts: Prompts of `rft`.
        rft_steps: Steps of `rft` in one round.
        rounds: Rounds of reinforcement; after each but the last the reward model is mended.
        mend: Options of `finetune` with the labels of the rounds.
        sft: Options of the supervised run.
    """

    train: int = 1300
    test: int = 1000
    triples: int = 30
    labels: int = 400
    seeds: int = 3
    pretrain: tuple[str, ...] = ("--lr", "2e-3", "--batch-size", "64", "--max-steps", "600")
    tune: tuple[str, ...] = ("--lr", "5e-4", "--batch-size", "32", "--epochs", "6")
    scratch: tuple[str, ...] = ("--lr", "2e-3", "--batch-size", "32", "--epochs", "6")
    rft: tuple[str, ...] = ("--lr", "2e-3", "--batch-size", "256", "--max-new-tokens", "12")
    rft_prompts: int = 2560
    rft_steps: int = 25
    rounds: int = 4
    mend: tuple[str, ...] = ("--lr", "5e-4", "--batch-size", "32", "--max-steps", "90")
    sft: tuple[str, ...] = ("--lr", "5e-3", "--batch-size", "256")


FAST = Sizes(
    train=500,
    test=300,
    triples=8,
    labels=120,
    seeds=3,
    pretrain=("--lr", "2e-3", "--batch-size", "48", "--max-steps", "80"),
    tune=("--lr", "2e-4", "--batch-size", "32", "--epochs", "3"),
    scratch=("--lr", "2e-3", "--batch-size", "32", "--max-steps", "20"),
    rft=("--lr", "1e-3", "--batch-size", "64", "--max-new-tokens", "12"),
    rft_prompts=48,
    rft_steps=3,
    rounds=2,
    mend=("--lr", "4e-4", "--batch-size", "32", "--max-steps", "10"),
    sft=("--lr", "5e-3", "--batch-size", "64"),
)


@dataclass
class Tour:
    """The steps in order, and the times that they took.

    Attributes:
        folder: Where everything goes.
        sizes: How much of everything.
        zoo: The policies.
        seed: The run's seed.
        run: Runs a command line in this process and returns its exit status.
        seconds: Step to the seconds that it took.
    """

    folder: Path
    sizes: Sizes
    zoo: Zoo
    seed: int
    run: Callable[[list[str]], int]
    seconds: dict[str, float] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """A path inside the folder."""
        return str(self.folder / name)

    def polarctl(self, stage: str, *arguments: str) -> None:
        """Print a command and run it in this process.

        Raises:
            PolarctlError: It failed; its own message is on stderr.
        """
        seeded = stage != "score"  # a reward needs no random choice
        words = [stage, *arguments, *(("--seed", str(self.seed)) if seeded else ())]
        console.note(f"$ polarctl {shlex.join(words)}")
        status = self.timed(stage, lambda: self.run([*words, "--quiet"]))
        if status in (75, 130):
            by = "SIGTERM" if status == 75 else "Ctrl-C"
            raise Interrupted(
                f"stopped by {by}", hint="the same command goes on from here", exit_status=status
            )
        if status:
            raise PolarctlError(f"`polarctl {stage}` ended with status {status}")

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`; its seconds are added to `name`."""
        start = time.monotonic()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        return result

    def make_world(self) -> None:
        """Prompts, the zoo of policies, the pool file, the reward model's config."""
        if (self.folder / "pool.jsonl").exists():
            return
        here = self.zoo.world()
        quiet_libraries()
        runs = 2 + len(self.zoo.runs)
        console.note(f"training {runs} runs of small language models: each checkpoint is a policy")
        names = self.timed("zoo", lambda: zoo.train(self.zoo, self.folder / "zoo"))
        made = zoo.tokenizer(here)
        made.save_pretrained(self.path("rm-config"))
        zoo.rm_config(made).save_pretrained(self.path("rm-config"))
        for name, count in (
            ("train", self.sizes.train),
            ("test", self.sizes.test),
            ("rft", self.sizes.rft_prompts),
        ):
            rows = world.questions(here, count, self.seed, name)
            # What `sample` reads carries no reference: the trajectories are to become one.
            shown = rows if name != "train" else [_without(row, "reference") for row in rows]
            write(self.folder / f"prompts-{name}.jsonl", shown)
        policies = [name for name in names if not name.startswith("mix-")]
        pool = [{"policy": name, "model": self.path(f"zoo/{name}")} for name in policies]
        write(self.folder / "pool.jsonl", pool)

    def sample(self) -> None:
        """Two samples of every policy for every prompt."""
        for part in ("train", "test"):
            self.polarctl(
                "sample",
                self.path(f"prompts-{part}.jsonl"),
                *("--pool", self.path("pool.jsonl"), "--max-new-tokens", "12"),
                *("--batch-size", "512", "-o", self.path(f"samples-{part}.jsonl")),
            )

    def pretrain(self) -> None:
        """Triples from the policies that are not held out; the reward model."""
        held = [f"{run}-*" for run in self.zoo.held_out]
        exclude = [word for glob in held for word in ("--exclude-policies", glob)]
        require = [word for glob in held for word in ("--require", glob)]
        train, test = self.path("samples-train.jsonl"), self.path("samples-test.jsonl")
        many = ("--triples-per-prompt", str(self.sizes.triples))
        self.polarctl("pair", train, *exclude, *many, "-o", self.path("triples.jsonl"))
        self.polarctl("pair", test, *exclude, "-o", self.path("test-seen.jsonl"))
        self.polarctl("pair", test, *require, "-o", self.path("test-held-out.jsonl"))
        self.polarctl(
            "pretrain",
            self.path("triples.jsonl"),
            *("--init-from-config", self.path("rm-config"), *self.sizes.pretrain),
            *("-o", self.path("rm")),
        )
        for name in ("seen", "held-out"):
            self.evaluate(f"test-{name}.jsonl", "rm", name)

    def evaluate(self, triples: str, model: str, name: str, *more: str) -> None:
        """Score triples with a model and judge the rewards."""
        scores, target = self.path(f"eval/{name}.scores.jsonl"), self.path(f"eval/{name}")
        self.polarctl("score", self.path(triples), "-m", self.path(model), *more, "-o", scores)
        self.polarctl("eval", scores, "-o", f"{target}.jsonl", "--report", target)

    def ablate(self) -> None:
        """Fine-tune on the same labels with and without pre-training and reference."""
        here = self.zoo.world()
        held = tuple(f"{run}-" for run in self.zoo.held_out)
        for part, count in (("train", self.sizes.labels), ("test", self.sizes.test)):
            rows = read(self.folder / f"samples-{part}.jsonl")
            rows = [row for row in rows if not row["policy"].startswith(held)]
            write(self.folder / f"ranked-{part}.jsonl", world.ranked(rows, here, count, self.seed))
        self.evaluate("ranked-test.jsonl", "rm", "zero-shot")
        fresh = ("--init-from-config", self.path("rm-config"), *self.sizes.scratch)
        arms: dict[str, tuple[Sequence[str], Sequence[str]]] = {
            "pretrained": (("-m", self.path("rm"), *self.sizes.tune), ()),
            "scratch": (fresh, ()),
            "no-reference": (fresh, ("--no-reference",)),
        }
        for arm, (options, reference) in arms.items():
            for seed in range(self.sizes.seeds):
                name = f"{arm}-{seed}"
                tour = replace(self, seed=self.seed + seed)
                tour.polarctl(
                    "finetune",
                    self.path("ranked-train.jsonl"),
                    *(*options, *reference, "-o", self.path(f"tuned/{name}")),
                )
                self.evaluate("ranked-test.jsonl", f"tuned/{name}", name, *reference)

    def improve(self) -> None:
        """An unsure policy, improved in several ways; what they answer to unseen prompts."""
        start = self.path(f"zoo/mix-{self.zoo.run_steps[-1]}")
        sizes = self.sizes
        steps = str(sizes.rounds * sizes.rft_steps)
        judge = ("--reward-model", self.path("tuned/pretrained-0"))
        policies = {
            "untouched": start,
            "sft": self.rft("sft", start, "--method", "sft", *sizes.sft),
            "rounds": self.rounds(start),
            "long": self.rft("long", start, *judge, *sizes.rft, "--max-steps", steps),
            "oracle": self.rft(
                "oracle", start, "--reward", TRUTH, *sizes.rft, "--max-steps", steps
            ),
        }
        pool = [{"policy": name, "model": model} for name, model in policies.items()]
        write(self.folder / "pool-final.jsonl", pool)
        self.polarctl(
            "sample",
            self.path("prompts-test.jsonl"),
            *("--pool", self.path("pool-final.jsonl"), "--samples", "1"),
            *("--max-new-tokens", "12", "--top-p", "1", "--top-k", "0"),
            *("-o", self.path("samples-final.jsonl")),
        )

    def rft(self, name: str, start: str, *options: str) -> str:
        """A policy trained on the prompts of reinforcement; its folder."""
        target = self.path(f"rft/{name}")
        self.polarctl("rft", self.path("prompts-rft.jsonl"), "-m", start, *options, "-o", target)
        return target

    def rounds(self, start: str) -> str:
        """The policy improved round by round; its folder.

        After a round a verifier labels the policy's own rollouts, and the reward model learns them.
        It never rewards them: it labels, and by `--check` it looks at prompts that are held out, so
        that a round gives the best policy it came by, the one it began with included.
        """
        policy, judge = start, "tuned/pretrained-0"
        labels = [self.path("ranked-train.jsonl")]
        watched = ("--check", TRUTH, "--check-steps", "5")
        here = self.zoo.world()
        for number in range(1, self.sizes.rounds + 1):
            # Another seed, so that a round does not begin with the prompts of the one before.
            tour = replace(self, seed=self.seed + number)
            if number > 1:
                rollouts = self.path(f"rft/round-{number - 1}/rollouts.jsonl")
                found = self.path(f"rft/failures-{number - 1}.jsonl")
                how = ("--from-rollouts", "--label-by", TRUTH, "--triples-per-prompt", "8")
                tour.polarctl("pair", rollouts, *how, "-o", found)
                labels.append(self.path(f"rft/labels-{number - 1}.jsonl"))
                chosen = world.balanced(read(Path(found)), here, self.sizes.labels, tour.seed)
                write(Path(labels[-1]), chosen)
                judge = f"rft/judge-{number}"
                options = ("-m", self.path("rm"), *self.sizes.mend)
                tour.polarctl("finetune", *labels, *options, "-o", self.path(judge))
            policy = tour.rft(
                f"round-{number}",
                policy,
                *("--reward-model", self.path(judge), *watched),
                *(*self.sizes.rft, "--max-steps", str(self.sizes.rft_steps)),
            )
        return policy


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file."""
    return [dict(record) for record in Reader([str(path)], None)]


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records in one step."""
    atomic.write(path, b"".join(orjson.dumps(record) + b"\n" for record in records))


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}
