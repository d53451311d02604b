"""Memory of one process that trains, and the room that a run takes on disk: estimates.

N weights, of which T are trained, over P processes; bytes:

                       weights            gradients       AdamW        buffers
    float32            4 N                4 T (8 T)       8 T
    autocast           4 N + 2 N          4 T (8 T)       8 T
    ZeRO-1, bfloat16   2 N + 4 T / P      4 T + 4 T / P   8 T / P      2e9
    ZeRO-2, bfloat16   2 N + 4 T / P      6 T / P         8 T / P      1e9
    ZeRO-3, bfloat16   (2 N + 4 T) / P    4 T / P         8 T / P      1e9 + 2 min(N, 1e9)

Autocast keeps a copy of the weights in half precision for the pass. 8 T: with several processes
torch's DDP holds every gradient once more, in its buckets. ZeRO in bfloat16 has the weights in half
precision and a shard of them in float32; over P processes that is the 2 N + 18 N / P and 18 N / P
of DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, `..._zero3_...`), to which
come its buckets (`reduce_bucket_size`, 5e8 elements) and the weights that ZeRO-3 has gathered
(`stage3_max_live_parameters`, 1e9). ZeRO-1 sums whole gradients in float32. ZeRO in float32: 4 in
place of 2 for the weights, 4 in place of 6 for gradients.

Activations are what autograd keeps of a Llama's layer for each token, counted tensor by tensor: the
two norms, the inputs of the linear layers, queries, keys and values as the kernel gets them (those
of a prefix once for each candidate), its output, and the MLP. With E the width, Q and K the widths
of all query heads and of all key heads, I the width of the MLP:

    autocast             26 E + 4 Q +  8 K +  8 I
    bfloat16 weights     16 E + 4 Q +  8 K +  8 I
    float32              24 E + 8 Q + 16 K + 16 I

and 6 (Q + K), in float32 8 (Q + K), where queries and keys are normed. With gradient checkpointing
they are kept for one layer, and of all others the input alone. Korthikanti et al. 2022
(arXiv 2205.05198) count 34 E for GPT's layer with fused attention, in half precision throughout.

Two moments beside the steady state can need more: AdamW's step, with one more float32 copy of what
it updates, when the activations are gone; and the start, when every process holds the whole model
in float32. CUDA itself, its libraries and fragments take 1 to 3 GB more and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_BUCKET, _GATHERED = 5e8, 1e9  # elements; DeepSpeed's defaults
_KEPT = 2  # checkpoints (`polarctl.storage.checkpoint`), and one that is being written


@dataclass(frozen=True, kw_only=True)
class Model:
    """What of a model decides over memory.

    Attributes:
        parameters: All weights.
        layers: Its layers.
        width: Of the hidden states.
        queries: Width of all query heads together.
        keys: Width of all key heads together.
        mlp: Width between the two halves of an MLP.
        normed: Queries and keys have norms of their own.
        linear: Input and output width of each linear layer but the head.
        new_tokens: Tokens whose embeddings are new.
    """

    parameters: int
    layers: int
    width: int
    queries: int
    keys: int
    mlp: int
    normed: bool = False
    linear: tuple[tuple[int, int], ...] = ()
    new_tokens: int = 0

    @classmethod
    def of(cls, classifier: Any, new_tokens: int = 0) -> Model:
        """The figures of a `...ForSequenceClassification`, on any device, `meta` too.

        Args:
            classifier: The model.
            new_tokens: Tokens whose embeddings are new.
        """
        config = classifier.config.get_text_config()
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        named = dict(classifier.named_modules())
        linear = [
            (module.in_features, module.out_features)
            for name, module in named.items()
            if type(module).__name__ == "Linear" and name != "score"
        ]
        return cls(
            parameters=sum(p.numel() for p in classifier.parameters()),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            queries=heads * head,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
            mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            normed=any(name.endswith("q_norm") for name in named),
            linear=tuple(linear),
            new_tokens=new_tokens,
        )

    def adapted(self, rank: int) -> tuple[int, int]:
        """All weights and those that are trained with adapters of a rank.

        A linear layer from a to b gets rank (a + b) weights (LoRA, arXiv 2106.09685). The head is
        trained in a copy, and the embeddings of new tokens beside the frozen ones.

        Args:
            rank: Of the adapters.
        """
        own = sum(rank * (inner + outer) for inner, outer in self.linear)
        trained = own + self.width + self.new_tokens * self.width
        return self.parameters + trained, trained


Computing = Literal["float32", "autocast", "bfloat16"]


def per_token(model: Model, computing: Computing) -> int:
    """Bytes of activations that one layer keeps for each token.

    Args:
        model: Its widths.
        computing: `autocast`: in bfloat16 with float32 weights; `bfloat16`: weights too (ZeRO).
    """
    size = 8 if computing == "float32" else 4
    norms = {"float32": 24, "autocast": 26, "bfloat16": 16}[computing] * model.width
    attention = size * (model.queries + 2 * model.keys)
    own = (size + 2 if size == 4 else size) * (model.queries + model.keys) if model.normed else 0
    return norms + attention + own + 2 * size * model.mlp


def activations(model: Model, tokens: int, computing: Computing, *, checkpointing: bool) -> int:
    """Bytes of activations of one forward pass.

    Args:
        model: Its widths.
        tokens: Of the pass (`--batch-tokens`).
        computing: See `per_token`.
        checkpointing: They are computed again in the backward pass.
    """
    layer = tokens * per_token(model, computing)
    if not checkpointing:
        return model.layers * layer
    kept = 2 if computing == "bfloat16" else 4
    return layer + model.layers * tokens * kept * model.width


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process, estimated; see the top of this file.

    Attributes:
        weights: In all their copies.
        gradients: In all their copies.
        optimizer: AdamW's two moments.
        activations: Of one forward pass.
        buffers: DeepSpeed's.
        cast: What of `weights` is there during a pass alone.
        step: What AdamW's step needs for a moment.
        start: The whole model in float32, before anything is cut up.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float = 0.0
    cast: float = 0.0
    step: float = 0.0
    start: float = 0.0

    @property
    def total(self) -> float:
        """The most that is needed at one time."""
        states = self.weights - self.cast + self.gradients + self.optimizer + self.buffers
        return max(self.start, states + max(self.cast + self.activations, self.step))


def memory(
    model: Model,
    batch_tokens: int,
    *,
    half: bool,
    checkpointing: bool,
    zero: int,
    processes: int,
    lora_rank: int | None = None,
) -> Memory:
    """What a process needs; formulas and sources are at the top of this file.

    Args:
        model: Its weights and widths.
        batch_tokens: Tokens of one forward pass.
        half: Computing in bfloat16.
        checkpointing: Activations are computed again.
        zero: ZeRO's stage, 0 without.
        processes: Processes that shards are spread over.
        lora_rank: Rank of adapters, or None: all weights are trained.
    """
    every = trained = model.parameters
    if lora_rank is not None:
        every, trained = model.adapted(lora_rank)
    computing: Computing = "float32" if not half else "bfloat16" if zero else "autocast"
    kept = activations(model, batch_tokens, computing, checkpointing=checkpointing)
    if not zero:
        cast = 2.0 * every if half else 0.0
        return Memory(
            weights=4.0 * every + cast,
            gradients=(8.0 if processes > 1 else 4.0) * trained,
            optimizer=8.0 * trained,
            activations=kept,
            cast=cast,
            step=4.0 * trained,
            start=4.0 * every,
        )
    size, share = (2 if half else 4), trained / processes
    buffers = _BUCKET * (2 if half and zero > 1 else 4)
    if zero == 3:
        buffers += size * min(every, _GATHERED)
    return Memory(
        weights=(size * every / processes if zero == 3 else size * every) + 4 * share,
        gradients={1: 4 * trained + 4 * share, 2: (6 if half else 4) * share, 3: 4 * share}[zero],
        optimizer=8 * share,
        activations=kept,
        buffers=buffers,
        step=4 * share,
        start=4.0 * every,
    )


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of a run's folder.

    Attributes:
        checkpoint: One.
        final: The finished model.
        most: At one time: two checkpoints, one that is being written, the model, the best one.
    """

    checkpoint: float
    final: float
    most: float


def disk(model: Model, *, half: bool, zero: int, lora_rank: int | None, validated: bool) -> Disk:
    """What a run writes.

    A checkpoint holds the trained weights in float32 and AdamW's two moments, 12 T; that of ZeRO-1
    and ZeRO-2 the whole weights as well, as they compute.

    Args:
        model: Its weights.
        half: Computing in bfloat16: the finished model is in that.
        zero: ZeRO's stage, 0 without.
        lora_rank: Rank of adapters, or None.
        validated: The best model is kept beside the last.
    """
    every = trained = model.parameters
    if lora_rank is not None:
        every, trained = model.adapted(lora_rank)
    size = 2 if half else 4
    checkpoint = 12.0 * trained + (size * every if zero in (1, 2) else 0)
    final = float(size * model.parameters)
    best = 2 * final if validated else 0.0  # the old one and its successor
    return Disk(checkpoint=checkpoint, final=final, most=(_KEPT + 1) * checkpoint + final + best)
