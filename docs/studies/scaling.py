r"""Scaling laws of pre-training on two small worlds: a study that anyone can run again.

    python docs/studies/scaling.py -o scaling

(a) `world`: policies of the quickstart's world. (b) `text`: policies are small language models
trained on parts of Python's own standard library, trajectories are continuations of its files. In
both the real stages run by their command lines: sample, pair, pretrain for every model size and
number of steps, and `eval scaling` at the end. The same command again goes on where it stopped.
The results are in docs/studies/scaling.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import Study, parser_of, say_cpu_minutes

from polarctl import seeding
from polarctl.model.devices import quiet_libraries
from polarctl.quickstart import policies, world
from polarctl.quickstart.policies import Zoo, bpe_tokenizer, lm_config, train_lm
from polarctl.quickstart.steps import write


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything.

    Attributes:
        widths: Hidden sizes of the reward models, three layers each.
        steps: Numbers of optimiser steps: each model is trained for each of them.
        batch: Triples of a step.
        prompts: Prompts that every policy answers twice.
        triples: Triples of a prompt.
        held_out: Share of the prompts that the loss is measured on.
        runs: Runs of the quickstart's zoo, which are its policies.
        zoo_steps: Steps of the zoo's first run, and of each further one.
        parts: Packages of the standard library: one run of a language model each.
        text_steps: Steps of the first language model, and of each further one.
        new_tokens: Tokens of a continuation of a text.
    """

    widths: tuple[int, ...] = (16, 32, 48, 64, 96)
    steps: tuple[int, ...] = (100, 240, 600)
    batch: int = 32
    prompts: int = 900
    triples: int = 32
    held_out: float = 0.06
    runs: tuple[str, ...] = ("a", "b", "c", "d")
    zoo_steps: tuple[tuple[int, ...], tuple[int, ...]] = ((140, 200), (60, 120))
    parts: tuple[str, ...] = ("asyncio", "email", "encodings", "pydoc_data", "unittest", "xml")
    text_steps: tuple[tuple[int, ...], tuple[int, ...]] = ((150,), (60, 200))
    new_tokens: int = 24


TEXT = Sizes(steps=(120, 240, 400), batch=16, prompts=800, triples=30, held_out=0.05)

SMALLEST = Sizes(
    widths=(16, 32, 48),
    steps=(2, 4),
    batch=8,
    prompts=24,
    triples=4,
    held_out=0.3,
    runs=("a",),
    zoo_steps=((2,), (2,)),
    parts=("json", "email"),
    text_steps=((2,), (2,)),
    new_tokens=6,
)

# -- (b): texts of the standard library -----------------------------------------------------------


def library_files(part: str = "") -> list[Path]:
    """The source files of a package of the standard library, or those that are in none."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted((root / part).rglob("*.py") if part else root.glob("*.py"))


def pieces(files: Sequence[Path]) -> list[tuple[str, str]]:
    """All (line, the two lines after it) of some files; empty lines are left out."""
    found = []
    for file in files:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line.rstrip()[:100] for line in lines if line.strip()]
        found += [(a, f"{b}\n{c}") for a, b, c in zip(lines, lines[1:], lines[2:], strict=False)]
    return found


def documents(files: Sequence[Path], seed: int) -> Iterator[tuple[str, str]]:
    """Endless random pieces of some files."""
    found, draw = pieces(files), seeding.rng(seed, "documents", str(len(files)))
    while True:
        yield draw.choice(found)


def text_tokenizer(files: Sequence[Path]) -> Any:
    """A byte-level BPE of 1,000 tokens, without a chat template: its policies continue texts."""
    from tokenizers import pre_tokenizers

    texts = ["\n".join(piece) for piece in pieces(files)[::3]]
    made = bpe_tokenizer(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), 1000)
    made.chat_template = None
    return made


# -- the study ------------------------------------------------------------------------------------


class WorldStudy(Study):
    """(a): policies of the quickstart's world; they differ in facts, style and age."""

    def made(self, tokenizer: Any, names: list[str], prompts: Sequence[dict[str, Any]]) -> None:
        """Write what the stages read."""
        for width in self.sizes.widths:
            self.write_config(tokenizer, f"sizes/{width}", width)
        write(self.folder / "prompts.jsonl", prompts)
        self.write_pool(names)

    def make_policies(self) -> None:
        """Policies and prompts."""
        kept = tuple(run for run in Zoo().runs if run.name in self.sizes.runs)
        base, further = self.sizes.zoo_steps
        zoo = dataclasses.replace(
            Zoo(), runs=kept, seed=self.seed, base_steps=base, run_steps=further
        )
        names = self.train_zoo(zoo)
        here = zoo.world()
        rows = world.questions(here, self.sizes.prompts, self.seed, "train")
        shown = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
        self.made(policies.tokenizer(here), names, shown)

    def lengths(self) -> tuple[str, ...]:
        """How long a trajectory may be."""
        return ("--max-new-tokens", "12")

    def make_triples(self) -> None:
        """Two samples of every policy for every prompt, and triples of them."""
        if not self.is_made():
            quiet_libraries()
            self.make_policies()
        self.polarctl(
            *("sample", self.path("prompts.jsonl"), "--pool", self.path("pool.jsonl")),
            *(*self.lengths(), "--batch-size", "512", "-o", self.path("samples.jsonl")),
        )
        self.polarctl(
            *("pair", self.path("samples.jsonl"), "-o", self.path("triples.jsonl")),
            *("--triples-per-prompt", str(self.sizes.triples), "--equal-chosen", "drop"),
        )

    def train(self) -> None:
        """A reward model of every size for every number of steps, on the same stream of triples.

        All have the same held-out triples: the input and its seed are the same.
        """
        rate = {width: 2e-3 * math.sqrt(96 / width) for width in self.sizes.widths}
        for steps, width in itertools.product(self.sizes.steps, self.sizes.widths):
            self.polarctl(
                *("pretrain", self.path("triples.jsonl")),
                *("--init-from-config", self.path(f"sizes/{width}"), "--lr", f"{rate[width]:.2g}"),
                *("--batch-size", str(self.sizes.batch), "--max-steps", str(steps)),
                *("--val-fraction", str(self.sizes.held_out), "--device", "cpu"),
                *("--val-steps", str(steps), "-o", self.path(f"runs/{width}-{steps}")),
            )

    def fit(self) -> None:
        """The laws."""
        runs = [
            self.path(f"runs/{width}-{steps}")
            for steps, width in itertools.product(self.sizes.steps, self.sizes.widths)
        ]
        self.polarctl("eval", "scaling", *runs, "-o", self.path("laws"))

    def run(self) -> None:
        """Everything, in order."""
        self.make_triples()
        self.train()
        self.fit()


class TextStudy(WorldStudy):
    """(b): policies that continue texts of the standard library."""

    def make_policies(self) -> None:
        """One run on files that are in no package, then one on each package."""
        import torch
        from transformers import Qwen3ForCausalLM

        # Half of the files that are in no package are for the prompts alone.
        loose = library_files()
        first, held = loose[::2], loose[1::2]
        torch.manual_seed(self.seed)
        made = text_tokenizer(first)
        model = Qwen3ForCausalLM(lm_config(made))
        names = []

        def learn(name: str, files: Sequence[Path], steps: tuple[int, ...]) -> None:
            kept = train_lm(
                *(model, made, documents(files, self.seed)),
                steps=steps[-1],
                lr=1e-2,
                batch=32,
                checkpoints=steps,
            )
            for step, weights in kept.items():
                names.append(f"{name}-{step}")
                model.load_state_dict(weights)
                model.save_pretrained(self.folder / "zoo" / names[-1])
                made.save_pretrained(self.folder / "zoo" / names[-1])

        base, further = self.sizes.text_steps
        learn("base", first, base)
        start = {name: weights.clone() for name, weights in model.state_dict().items()}
        for part in self.sizes.parts:
            model.load_state_dict(start)
            learn(part, library_files(part), further)
        lines = sorted({f"{line}\n" for line, _ in pieces(held) if 15 <= len(line) <= 40})
        chosen = seeding.rng(self.seed, "prompts").sample(lines, self.sizes.prompts)
        rows = [{"id": f"line-{i}", "prompt": line} for i, line in enumerate(chosen)]
        self.made(made, names, rows)

    def lengths(self) -> tuple[str, ...]:
        """How long a continuation is; cleaning is for sentences, and this is code."""
        return ("--max-new-tokens", str(self.sizes.new_tokens), "--no-clean")


WORLDS = {"world": (WorldStudy, Sizes()), "text": (TextStudy, TEXT)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both worlds."""
    parser = parser_of(__doc__ or "", "scaling")
    parser.add_argument("--seed", type=int, default=0, help="seed of the study")
    parser.add_argument("--only", choices=WORLDS, help="one of the two worlds")
    options = parser.parse_args(arguments)
    for name in [options.only] if options.only else WORLDS:
        study, sizes = WORLDS[name]
        sizes = SMALLEST if options.smallest else sizes
        study(options.output / name, sizes, options.seed).run()
    say_cpu_minutes()


if __name__ == "__main__":
    main()
