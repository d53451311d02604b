"""Drawing tokens from a causal language model: the sampling rule and the decode loop.

What a sequence becomes depends on its token ids, its seed and the model alone: every sequence has
its own stream of uniform numbers, one a step, and each token is where that number falls in the
cumulative distribution. Batches only decide the rounding of the logits, which in float32 all but
never moves a token (about one in 10^7); in bfloat16 the same batch size is needed for the same
texts.

Shapes: B sequences, T tokens so far, V vocabulary, K candidates for the next token.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, cache_utils

from polarctl.errors import PolarctlError
from polarctl.policies.pool import Sampling
from polarctl.policies.uniforms import Floats, Seeds, uniforms

Ints: TypeAlias = NDArray[np.int64]


def draw(logits: Tensor, numbers: Floats, sampling: Sampling) -> Ints:
    """The next token of every sequence.

    Temperature, then top-k, then top-p over what top-k left (the order of transformers and vLLM);
    the share that top-p keeps is the smallest that reaches `top_p`. The token is found by inverse
    CDF in float64, in the order of token ids, where near-equal logits cannot swap places.

    Args:
        logits: Any float dtype and device. Shape: (B, V).
        numbers: From `uniforms`. Shape: (B,).
        sampling: Temperature, top-k and top-p.

    Returns:
        Token ids. Shape: (B,).

    Raises:
        PolarctlError: A logit is NaN or the largest is infinite.
    """
    values, ids = _candidates(logits.float(), sampling.top_k)
    best = values.max(axis=1, keepdims=True)
    if not np.isfinite(best).all():
        raise PolarctlError("the model's logits are not finite", hint="--dtype float32")
    ranked = np.sort(values, axis=1)[:, ::-1]
    weights = np.exp((ranked - best) / sampling.temperature)
    before = np.cumsum(weights, axis=1) - weights
    kept = (before < sampling.top_p * weights.sum(axis=1, keepdims=True)).sum(axis=1)
    lowest = np.take_along_axis(ranked, kept[:, None] - 1, axis=1)
    weights = np.where(values >= lowest, np.exp((values - best) / sampling.temperature), 0.0)
    cumulative = np.cumsum(weights, axis=1)
    place = (cumulative <= numbers[:, None] * cumulative[:, -1:]).sum(axis=1)
    chosen: Ints = np.take_along_axis(ids, place[:, None], axis=1)[:, 0]
    return chosen


def _candidates(logits: Tensor, top_k: int) -> tuple[Floats, Ints]:
    """The top-k logits of every row in the order of ids, padded with -inf. Shape: (B, K) twice."""
    rows, vocabulary = logits.shape
    k = min(top_k or vocabulary, vocabulary)
    if logits.is_cuda and k < vocabulary:
        top = torch.topk(logits, k)
        values, ids = top.values.cpu().numpy(), top.indices.cpu().numpy()
        order = np.argsort(ids, axis=1)
        values, ids = (np.take_along_axis(x, order, axis=1) for x in (values, ids))
        return values.astype(np.float64), ids
    array = logits.cpu().numpy()
    if k == vocabulary:
        return array.astype(np.float64), np.broadcast_to(np.arange(k), array.shape)
    # Far faster on a CPU than torch.topk. NaN sorts last, so it stays and is found by `draw`.
    bound = np.partition(array, vocabulary - k, axis=1)[:, vocabulary - k, None]
    row, token = np.nonzero(~(array < bound))
    counts = np.bincount(row, minlength=rows)
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = np.full((rows, counts.max()), -np.inf)
    ids = np.zeros((rows, counts.max()), dtype=np.int64)
    values[row, column] = array[row, token]
    ids[row, column] = token
    return values, ids


# -- decoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a model is given what it has to read.

    Attributes:
        cache: Argument that carries what it has read already, or None: it reads the whole text
            again for every token.
        padded: Texts of unlike length can go together, left-padded.
    """

    cache: str | None
    padded: bool


@torch.inference_mode()
def reading_of(model: Any) -> Reading:
    """How a causal LM has to be read, found by giving it two tokens.

    Texts are padded where there is nothing but keys and values, and positions can be given. A
    recurrent state takes padding in, in some models. From an unknown cache no rows can be selected.

    Raises:
        ValueError: It gives no logits for each token.
        Exception: What a model that cannot read a text alone raises.
    """
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in accepted), None)
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    out = model(input_ids=ids) if name is None else model(input_ids=ids, use_cache=True)
    if out.logits.dim() != 3 or out.logits.shape[:2] != (1, 2):
        raise ValueError("no logits for each token of a text")
    cache: Any = getattr(out, name or "", None)
    kinds = {type(layer) for layer in cache.layers} if type(cache) is DynamicCache else {None}
    if (
        name is None
        or not kinds <= _ATTENTION | _RECURRENT
        or not _goes_on(model, ids, name, cache)
    ):
        return Reading(None, padded=False)
    padded = kinds <= _ATTENTION and "position_ids" in accepted
    return Reading(name, padded and _takes_positions(model, ids, out.logits))


def _goes_on(model: Any, ids: Tensor, name: str, cache: Any) -> bool:
    """Whether a model can go on from its own cache."""
    try:
        out = model(input_ids=ids[:, :1], use_cache=True, **{name: cache})
    except Exception:  # what a model's own code raises for a cache that it cannot use
        return False
    return out.logits.shape[1] == 1


def _takes_positions(model: Any, ids: Tensor, logits: Tensor) -> bool:
    """Whether positions count from 0: in some models from another number, or of another kind."""
    try:
        out = model(input_ids=ids, position_ids=torch.arange(2, device=ids.device)[None])
    except Exception:  # likewise for positions
        return False
    return torch.equal(out.logits, logits)


_ATTENTION = {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer}
_RECURRENT = {
    cache_utils.LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
}


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    limits: Sequence[int],
    *,
    sampling: Sampling,
    stop: Sequence[int] = (),
    batch_size: int = 64,
    on_done: Callable[[int], None] = lambda count: None,
    reading: Reading | None = None,
) -> list[tuple[list[int], bool]]:
    """Continue token sequences.

    Args:
        model: A causal LM.
        prompts: Token ids of each prompt, at least one.
        seeds: A seed for each, in [0, 2**64).
        limits: Tokens to write at most for each.
        sampling: Temperature, top-k and top-p.
        stop: Token ids that end a sequence.
        batch_size: Sequences computed together; those of like length go together.
        on_done: Called with the number of sequences finished after each batch.
        reading: See `reading_of`; found where it is not given.

    Returns:
        For each prompt the new tokens, without the one that ended it, and whether one did.
    """
    reading = reading or reading_of(model)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    results: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    for batch in _batches(order, [len(prompt) for prompt in prompts], batch_size, reading):
        written = _decode(
            model,
            [prompts[i] for i in batch],
            np.array([seeds[i] for i in batch], dtype=np.uint64),
            np.array([limits[i] for i in batch]),
            sampling,
            np.array(list(stop), dtype=np.int64),
            reading,
        )
        for i, result in zip(batch, written, strict=True):
            results[i] = result
        on_done(len(batch))
    return results


def _batches(
    order: list[int], lengths: list[int], size: int, reading: Reading
) -> Iterator[list[int]]:
    """The same order in batches; in each one length alone, where texts cannot be padded."""
    for _, run in itertools.groupby(order, lambda i: None if reading.padded else lengths[i]):
        members = list(run)
        yield from (members[first : first + size] for first in range(0, len(members), size))


def _decode(
    model: Any,
    prompts: list[Sequence[int]],
    seeds: Seeds,
    limits: Ints,
    sampling: Sampling,
    stop: Ints,
    reading: Reading,
) -> list[tuple[list[int], bool]]:
    """One batch, left-padded. Equal prompts are read once; a finished sequence leaves at once."""
    accepted = inspect.signature(model.forward).parameters
    index: dict[tuple[int, ...], int] = {}
    source = np.array([index.setdefault(tuple(prompt), len(index)) for prompt in prompts])
    lengths = np.array([len(prompt) for prompt in prompts])
    width, longest = int(lengths.max()), int(limits.max())
    ids = torch.zeros((len(index), width), dtype=torch.long)
    mask = torch.ones((len(index), width + longest), dtype=torch.long)
    for prompt, row in index.items():
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tokens = np.zeros((len(prompts), longest), dtype=np.int64)
    written = np.zeros(len(prompts), dtype=np.int64)
    ended = np.zeros(len(prompts), dtype=bool)
    live = np.arange(len(prompts))
    cache = None
    for step in range(longest):
        end = width + step
        given: dict[str, Any] = {"logits_to_keep": 1, "use_cache": reading.cache is not None}
        if reading.padded:  # else the model's own are right
            given["attention_mask"] = mask[:, :end]
            given["position_ids"] = positions[:, end - ids.shape[1] : end]
        inputs = {name: value for name, value in given.items() if name in accepted}
        if reading.cache is not None:
            inputs[reading.cache] = cache
        out = model(input_ids=ids, **inputs)
        logits = out.logits[:, -1]
        rows = np.arange(len(live))  # of the model's batch, for the sequences that are live
        if step == 0:
            rows, logits = source, logits[torch.from_numpy(source).to(model.device)]
        chosen = draw(logits, uniforms(seeds[live], step), sampling)
        stopped = np.isin(chosen, stop)
        tokens[live, step] = chosen
        written[live] += ~stopped
        ended[live] = stopped
        going = ~stopped & (step + 1 < limits[live])
        if not going.any():
            break
        new = torch.from_numpy(chosen[going, None]).to(model.device)
        if reading.cache is not None:
            cache = getattr(out, reading.cache)
        if step == 0 or not going.all():
            kept = torch.from_numpy(rows[going]).to(model.device)
            live, ids, mask, positions = live[going], ids[kept], mask[kept], positions[kept]
            if cache is not None:
                cache.reorder_cache(kept)  # of every layer; batch_select_indices not all have
        ids = new if cache is not None else torch.cat([ids, new], dim=1)
    return [(tokens[row, : written[row]].tolist(), bool(ended[row])) for row in range(len(prompts))]
