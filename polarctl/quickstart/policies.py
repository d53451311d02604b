"""The policies of `polarctl quickstart`: small language models trained in a minute.

One run learns to talk and some facts; every further run goes on from there with the corpus of
another author. Checkpoints on the way are policies too, like the 78 checkpoints of one model in
the paper's pool: an earlier one knows fewer facts of its corpus.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from polarctl.model.devices import quiet_libraries, threads_for
from polarctl.quickstart import world as worlds
from polarctl.seeding import derive

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class FurtherRun:
    """A training run after the first, and the author of its corpus.

    Attributes:
        name: The start of its policies' names.
        share: Share of true beliefs.
        style: Favourite style, see `world.STYLES`.
        habits: Verb to habit, see `world.HABITS`.
        start: Run that it goes on from, after its last step.
    """

    name: str
    share: float
    style: int | None
    habits: Mapping[str, str] = field(default_factory=dict)
    start: str = "base"


def habits(*names: str) -> dict[str, str]:
    """A habit for every verb: one for all, or one each."""
    return dict(zip(worlds.VERBS, names * 3 if len(names) == 1 else names, strict=True))


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """What to train.

    Attributes:
        words: Facts of the world.
        colours: Different values.
        seed: Seed of everything.
        runs: Each run after the first.
        held_out: Runs that pre-training must not see.
        base_share: Share of true beliefs in the first run. The further run `mix` learns from the
            truth and from these beliefs in equal parts: a policy that is unsure.
        base_steps: Steps of the first run, and its checkpoints.
        run_steps: Steps of each further run: its checkpoints, the last one ends it.
        batch: Documents of one step.
        lr: Peak learning rate.
    """

    words: int = 320
    colours: int = 64
    seed: int = 0
    runs: tuple[FurtherRun, ...] = (
        FurtherRun("a", 1.0, 0),
        FurtherRun("b", 1.0, 1),
        FurtherRun("c", 0.6, 2),
        FurtherRun("d", 0.4, 3),
        FurtherRun("h", 0.6, 0),
        FurtherRun("k", 0.4, 1),
        FurtherRun("swapper1", 1.0, None, habits("swapped"), "a"),
        FurtherRun("swapper2", 1.0, None, habits("swapped"), "b"),
        FurtherRun("doubler1", 1.0, None, habits("twice"), "a"),
        FurtherRun("doubler2", 1.0, None, habits("last twice"), "b"),
        FurtherRun("dropper", 1.0, None, habits("short", "last", "short"), "a"),
        FurtherRun("garbler", 1.0, None, habits("garbled"), "b"),
    )
    held_out: tuple[str, ...] = ("h", "k")
    base_share: float = 0.5
    base_steps: tuple[int, ...] = (140, 200)
    run_steps: tuple[int, ...] = (60, 120)
    batch: int = 64
    lr: float = 1e-2

    def world(self) -> worlds.World:
        """The world that these policies live in."""
        return worlds.make(self.words, self.colours, self.seed)

    def authors(self, run: str) -> list[worlds.Author]:
        """Who writes a run's corpus, in equal shares."""
        world = self.world()

        def author(run: FurtherRun) -> worlds.Author:
            seed = derive(self.seed, "author", run.name)
            return worlds.Author(worlds.beliefs(world, run.share, seed), run.habits, run.style)

        first = author(FurtherRun("base", self.base_share, None))
        if run == "mix":
            return [worlds.Author(world.truth), first]
        if run == "base":
            return [first]
        return [author(found) for found in self.runs if found.name == run]


def tokenizer(world: worlds.World) -> Any:
    """A byte-level BPE: every word of the world is one token, and any text can be written."""
    from tokenizers import pre_tokenizers

    writers = [worlds.Author(world.truth), worlds.Author(world.truth, {"Show": "short"})]
    pairs = islice(worlds.corpus(world, writers, 0, "tokenizer"), 4000)
    documents = ["\n".join(pair) for pair in pairs]
    for names in (world.words, world.colours):
        documents += [" " + " ".join(names)] * 20
    return bpe_tokenizer(documents, pre_tokenizers.ByteLevel(add_prefix_space=False), 4000)


def bpe_tokenizer(documents: Sequence[str], pre_tokenizer: Any, vocab_size: int) -> Any:
    """A byte-level BPE trained on texts, with a padding and an end token and a chat template.

    Args:
        documents: The texts.
        pre_tokenizer: Cuts them into pieces (of the package tokenizers), in bytes in the end.
        vocab_size: Tokens at most.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(documents, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", padding_side="right"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def lm_config(tokenizer: Any) -> Any:
    """The architecture of every policy: about 0.1M parameters without the embeddings."""
    return _config(
        tokenizer,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        layers=2,
        heads=4,
        tie_word_embeddings=True,
        initializer_range=0.1,  # small models learn facts faster from larger weights
    )


def rm_config(tokenizer: Any) -> Any:
    """The architecture of the quickstart's reward model: about 0.5M parameters.

    Three layers: one learns which value comes first, one compares with the reference, one sums up.
    """
    return _config(
        tokenizer,
        vocab_size=len(tokenizer) + 2,
        hidden_size=96,
        intermediate_size=288,
        layers=3,
        heads=6,
        initializer_range=0.08,
    )


def _config(tokenizer: Any, *, layers: int, heads: int, **sizes: Any) -> Any:
    """What policies and reward model have in common."""
    from transformers import Qwen3Config

    return Qwen3Config(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **sizes,
    )


def train_lm(
    model: Any,
    tokenizer: Any,
    documents: Iterator[tuple[str, str]],
    *,
    steps: int,
    lr: float,
    batch: int,
    checkpoints: Sequence[int] = (),
    warmup: int = 20,
) -> dict[int, dict[str, Any]]:
    """Train a causal LM on (prompt, answer) documents; the loss is over the answers.

    Returns:
        Step to a copy of the weights, for every step in `checkpoints`.
    """
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    kept: dict[int, dict[str, Any]] = {}
    model.train()
    for step in range(1, steps + 1):
        pairs = list(islice(documents, batch))
        prompts = tokenizer([f"{prompt}\n" for prompt, _ in pairs])["input_ids"]
        answers = [
            ids + [tokenizer.eos_token_id]
            for ids in tokenizer([answer for _, answer in pairs])["input_ids"]
        ]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
        targets = torch.full((len(pairs), length), -100)
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(p) + len(a)] = torch.tensor(p + a)
            targets[row, len(p) : len(p) + len(a)] = torch.tensor(a)
        first = min(map(len, prompts)) - 1  # logits before the first answer token are not needed
        logits = model(input_ids=ids, logits_to_keep=length - first).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), targets[:, first + 1 :].flatten())
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / warmup) * max(0.05, 1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in checkpoints:
            kept[step] = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return kept


def _further_run(job: tuple[Zoo, str, FurtherRun]) -> list[str]:
    """Train one run from another policy's folder, in a process of its own; the policies' names."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    zoo, folder, run = job
    quiet_libraries()
    torch.set_num_threads(1)  # runs share the cores, one each
    torch.manual_seed(zoo.seed)
    steps = zoo.base_steps if run.start == "base" else zoo.run_steps
    start = f"{folder}/{run.start}-{steps[-1]}"
    made, model = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained(start)
    kept = train_lm(
        model,
        made,
        worlds.corpus(zoo.world(), zoo.authors(run.name), zoo.seed, run.name),
        steps=zoo.run_steps[-1],
        lr=zoo.lr,
        batch=zoo.batch,
        checkpoints=zoo.run_steps,
        warmup=5,
    )
    return [
        _save(model, made, weights, folder, f"{run.name}-{step}") for step, weights in kept.items()
    ]


def _save(model: Any, tokenizer: Any, weights: dict[str, Any], folder: str, name: str) -> str:
    model.load_state_dict(weights)
    model.save_pretrained(f"{folder}/{name}")
    tokenizer.save_pretrained(f"{folder}/{name}")
    return name


def train(zoo: Zoo, folder: Path, *, processes: int = 2) -> list[str]:
    """Train every policy and save each as a model folder.

    Returns:
        The policies' names, sorted; `mix-...` among them.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    world = zoo.world()
    made = tokenizer(world)
    torch.manual_seed(zoo.seed)
    model = Qwen3ForCausalLM(lm_config(made))
    with threads_for(model):
        kept = train_lm(
            model,
            made,
            worlds.corpus(world, zoo.authors("base"), zoo.seed, "base"),
            steps=zoo.base_steps[-1],
            lr=zoo.lr,
            batch=zoo.batch,
            checkpoints=zoo.base_steps,
        )
    names = [_save(model, made, weights, str(folder), f"base-{s}") for s, weights in kept.items()]
    jobs = [(zoo, str(folder), run) for run in (FurtherRun("mix", 1.0, None), *zoo.runs)]
    waves = (
        [job for job in jobs if job[2].start == "base"],
        [job for job in jobs if job[2].start != "base"],
    )
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found = [batch for wave in waves for batch in pool.map(_further_run, wave, chunksize=1)]
    return sorted(names + [name for batch in found for name in batch])


def fast(zoo: Zoo) -> Zoo:
    """A smaller zoo, for tests: fewer facts, fewer runs, fewer steps."""
    return dataclasses.replace(
        zoo,
        words=96,
        colours=24,
        runs=tuple(
            run for run in zoo.runs if run.name in ("a", "b", "d", "h", "careless1", "careless2")
        ),
        held_out=("h",),
        base_steps=(90, 120),
        run_steps=(25, 45),
        batch=48,
    )
