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
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polarctl.errors import PolarctlError
from polarctl.policies.pool import Sampling

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Seeds: TypeAlias = NDArray[np.uint64]


def uniforms(seeds: Seeds, step: int) -> Floats:
    """One number in [0, 1) per sequence for a step: output `step` of SplitMix64 from each seed.

    Counter-based: any step of any sequence can be had alone. Source: Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64((step + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


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
) -> list[tuple[list[int], bool]]:
    """Continue token sequences.

    Args:
        model: A causal LM with a key-value cache.
        prompts: Token ids of each prompt, at least one.
        seeds: A seed for each, in [0, 2**64).
        limits: Tokens to write at most for each.
        sampling: Temperature, top-k and top-p.
        stop: Token ids that end a sequence.
        batch_size: Sequences computed together; those of like length go together.
        on_done: Called with the number of sequences finished after each batch.

    Returns:
        For each prompt the new tokens, without the one that ended it, and whether one did.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    results: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        written = _decode(
            model,
            [prompts[i] for i in batch],
            np.array([seeds[i] for i in batch], dtype=np.uint64),
            np.array([limits[i] for i in batch]),
            sampling,
            np.array(list(stop), dtype=np.int64),
        )
        for i, result in zip(batch, written, strict=True):
            results[i] = result
        on_done(len(batch))
    return results


def _decode(
    model: Any,
    prompts: list[Sequence[int]],
    seeds: Seeds,
    limits: Ints,
    sampling: Sampling,
    stop: Ints,
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
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    tokens = np.zeros((len(prompts), longest), dtype=np.int64)
    written = np.zeros(len(prompts), dtype=np.int64)
    ended = np.zeros(len(prompts), dtype=bool)
    live = np.arange(len(prompts))
    cache = None
    for step in range(longest):
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        inputs["attention_mask"] = mask[:, : width + step]
        if "position_ids" in accepted:
            inputs["position_ids"] = positions
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        out = model(**inputs)
        cache, logits = out.past_key_values, out.logits[:, -1]
        rows = np.arange(len(live))  # of the cache, for the sequences that are live
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
        if step == 0 or not going.all():
            kept = torch.from_numpy(rows[going]).to(model.device)
            cache.batch_select_indices(kept)
            mask, live, chosen = mask[kept], live[going], chosen[going]
        ids = torch.from_numpy(chosen[:, None]).to(model.device)
        positions = torch.from_numpy(lengths[live, None] + step).to(model.device)
    return [(tokens[row, : written[row]].tolist(), bool(ended[row])) for row in range(len(prompts))]
