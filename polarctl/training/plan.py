"""What a run will be, before it is: tokens, packing, memory; from a sample of its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polarctl import console
from polarctl.model.packing import pack, span_of
from polarctl.training.loop import Hyperparameters

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a sample of the encoded triples shows.

    Attributes:
        triples: Triples of the sample.
        tokens: Mean tokens of a triple, its sequences counted whole.
        computed: Mean tokens of a triple in a row, its prefix counted once.
        fill: Share of the rows' budget that is used; a last, unfilled row is left out.
        cut: How many triples had a piece cut, by piece, and `any`.
    """

    triples: int
    tokens: float
    computed: float
    fill: float
    cut: Counter[str]

    @property
    def saved(self) -> float:
        """Share of the tokens that sharing prefixes saves."""
        return 1 - self.computed / self.tokens


def look(groups: Sequence[Any], batch_tokens: int) -> Sample:
    """What some encoded triples show of the whole.

    Args:
        groups: Encoded triples (`polarctl.training.data.Group`).
        batch_tokens: Tokens of a row.
    """
    spans = [span_of(group.ids) for group in groups]
    rows = sorted(len(row.ids) for row in pack([group.ids for group in groups], batch_tokens))
    full = rows[1:] or rows
    cut: Counter[str] = Counter()
    for group in groups:
        cut.update(group.cut)
        cut["any"] += bool(group.cut)
    return Sample(
        triples=len(groups),
        tokens=sum(span.unshared for span in spans) / len(spans),
        computed=sum(span.tokens for span in spans) / len(spans),
        fill=sum(full) / (len(full) * batch_tokens),
        cut=cut,
    )


def warn_of_cuts(sample: Sample) -> None:
    """Warn when triples are longer than the template."""
    if sample.cut["any"]:
        pieces = ", ".join(
            f"{piece}: {sample.cut[piece]:,}"
            for piece in ("prompt", "reference", "output")
            if sample.cut[piece]
        )
        console.warn(
            f"{sample.cut['any']:,} of a sample of {sample.triples:,} triples are longer than "
            f"--max-length and --max-response-length allow and are cut ({pieces})"
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process, estimated."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def line(self) -> str:
        """In words."""
        parts = " + ".join(
            f"{name} {_size(getattr(self, name))}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        return f"{_size(self.total)} a process ({parts})"


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"


def memory(
    config: Any,
    parameters: int,
    trained: int,
    batch_tokens: int,
    *,
    half: bool,
    checkpointing: bool,
    zero: int,
    processes: int,
) -> Memory:
    """An estimate of what a process needs.

    Weights, gradients and AdamW's two moments in float32; activations of 34 bytes for each token,
    layer and unit of width in half precision (Korthikanti et al. 2022, arXiv 2205.05198, with fused
    attention), or with gradient checkpointing those of one layer and each layer's input.

    Args:
        config: The model's config.
        parameters: All weights.
        trained: Those that are trained.
        batch_tokens: Tokens of one forward pass.
        half: Computing in half precision, beside the float32 weights.
        checkpointing: Activations are computed again.
        zero: ZeRO's stage, 0 without.
        processes: Processes that shards are spread over.
    """
    stages = {"optimizer": 1, "gradients": 2, "weights": 3}
    share = {name: processes if zero >= stage else 1 for name, stage in stages.items()}
    text = config.get_text_config()
    layer = 34 * batch_tokens * text.hidden_size * (1 if half else 2)
    kept = text.num_hidden_layers * 2 * batch_tokens * text.hidden_size * (1 if half else 2)
    return Memory(
        weights=(4 + (2 if half else 0)) * parameters / share["weights"],
        gradients=4 * trained / share["gradients"],
        optimizer=8 * trained / share["optimizer"],
        activations=kept + layer if checkpointing else layer * text.num_hidden_layers,
    )


def lines(sample: Sample, plan: Hyperparameters, triples: int | None, memory: Memory) -> list[str]:
    """The plan in words, a line each."""
    total = None if triples is None else triples * sample.tokens
    use = plan.steps * plan.batch_size
    return [
        f"triples: {'not counted' if triples is None else f'{triples:,}'}"
        + ("" if total is None else f", about {total:,.0f} tokens"),
        f"a triple: {sample.tokens:,.0f} tokens, {sample.computed:,.0f} with its prefix once "
        f"({sample.saved:.0%} saved), from a sample of {sample.triples:,}",
        f"rows of {plan.batch_tokens:,} tokens: {sample.fill:.0%} full",
        f"steps: {plan.steps:,} of {plan.batch_size:,} triples, {use:,} triples in all, "
        f"{use * sample.tokens:,.0f} tokens, peak learning rate {plan.lr:.4g}",
        f"memory: about {memory.line()}",
    ]
