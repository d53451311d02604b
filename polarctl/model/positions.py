"""Positions that depend on how long a sequence is: every sequence gets those of its own length.

Two kinds of rotary embedding are a function of the length. `longrope` has other frequencies for
sequences longer than the original context; `dynamic` computes the frequencies anew for every
length beyond it. transformers chooses by the longest sequence of the batch, so that a sequence's
reward would depend on its neighbours. Here the embedding is computed once for each kind of length
in the batch, and each sequence takes the one that is its own.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Kind = Callable[[int], Hashable]


def kind_of_length(config: Any) -> Kind | None:
    """Which lengths have the same positions, by a model's config.

    Args:
        config: A transformers config.

    Returns:
        From a length in tokens to its kind: sequences of one kind may share a prefix. None: all
        lengths are of one kind.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    # Models with windows may have an embedding for each type of layer.
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    steps: list[int] = []  # two kinds, up to the limit and beyond it
    ramps: list[int] = []  # every length beyond the limit is a kind of its own
    for rope in kinds:
        if "dynamic" in rope.get("rope_type", ""):
            ramps.append(int(config.max_position_embeddings))
        elif rope.get("rope_type") == "longrope" or "long_mscale" in rope:
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            steps.append(int(limit))
    if not steps and not ramps:
        return None
    return lambda length: (
        *(length > limit for limit in steps),
        *(length if length > limit else 0 for limit in ramps),
    )


@contextmanager
def of_own_length(model: nn.Module, kinds: Sequence[Hashable], owner: Tensor) -> Iterator[None]:
    """Inside the block every sequence of a forward pass has the positions of its own length.

    Args:
        model: A model of transformers whose positions depend on the length.
        kinds: The kinds of length of the sequences (or of parts of a row).
        owner: Which of them a token belongs to, below 0 for padding. Shape: (B, T).
    """
    names = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    numbers = torch.tensor([names[kind] for kind in kinds], device=owner.device)
    numbers = torch.where(owner < 0, -1, numbers[owner])  # (B, T)

    def stitched(module: Any, given: Any, named: dict[str, Any], whole: Any) -> Any:
        if len(names) < 2:
            return whole
        named = dict(named)
        x, *rest = given or [named.pop("x")]
        positions = rest.pop(0) if rest else named.pop("position_ids")
        own = numbers.to(positions.device)
        positions = positions.expand(*positions.shape[:-2], *own.shape)
        parts: list[tuple[Tensor, ...]] = []
        for number in range(len(names)):
            _forget(module)
            # The longest position that is left is that of the sequences of this kind.
            found = module.forward(x, torch.where(own == number, positions, 0), *rest, **named)
            parts.append(found if isinstance(found, tuple) else (found,))
        mixed = []
        for tensors in zip(*parts, strict=True):
            out = tensors[0]
            for number, tensor in enumerate(tensors[1:], start=1):
                out = torch.where((own == number)[..., None], tensor, out)
            mixed.append(out)
        return tuple(mixed) if isinstance(whole, tuple) else mixed[0]

    handles = []
    for module in model.modules():
        if _originals(module):
            handles.append(module.register_forward_pre_hook(lambda module, _: _forget(module)))
            handles.append(module.register_forward_hook(stitched, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _originals(module: nn.Module) -> list[str]:
    """Names of the frequencies that a rotary embedding was made with, one for each of its kinds."""
    return [n for n in (*vars(module), *module._buffers) if n.endswith("original_inv_freq")]


def _forget(module: Any) -> None:
    """Set a rotary embedding back: transformers keeps the scaling of the longest input so far."""
    for name in _originals(module):
        prefix = name.removesuffix("original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, name).to(current.device))
        if hasattr(module, "original_max_seq_len"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        # With one embedding for each type of layer, a second long batch fails while this is there.
        vars(module).pop(f"{prefix}long_inv_freq", None)
