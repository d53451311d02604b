"""A model of the same kind as another, small enough to be computed twice in float64.

What two ways of computing a model have in common does not depend on its width, but on its layers:
windows, layers without rotary embedding, scales by position. So a miniature keeps the config's
kinds of layers and shrinks everything that only costs time: widths, heads, experts, vocabulary. It
shrinks windows and original context lengths too, so that texts of a few dozen tokens pass them.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.initialization import no_init_weights

WINDOW, CONTEXT = 8, 24  # tokens; the probe's texts are longer
VOCABULARY = 64
_HEADS, _WIDTH = 4, 16
_LARGEST = 2**18  # numbers of one tensor
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": _HEADS * _WIDTH,
    "embedding_size": _HEADS * _WIDTH,
    "word_embed_proj_dim": _HEADS * _WIDTH,
    "num_attention_heads": _HEADS,
    "head_dim": _WIDTH,
    "rotary_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "attention_chunk_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": WINDOW,
    "sliding_window": WINDOW,
}
_AT_MOST = {"num_experts_per_tok": 2, "moe_topk": 2, "n_group": 2, "topk_group": 1}


class CannotShrink(Exception):
    """No miniature can be made of this config."""


class Exact(TorchFunctionMode):
    """Inside this context torch computes in float64 where a model asks for float32.

    transformers casts norms, softmax and rotary embeddings to float32 whatever the weights are. A
    tensor larger than a miniature's is refused, before a size that was not shrunk takes all memory.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        args = tuple(_wide(value) for value in args)
        if function is torch.empty and math.prod(_shape(args, kwargs)) > _LARGEST:
            raise CannotShrink("a size of its config is not known here")
        return function(*args, **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _shape(args: Any, kwargs: Any) -> Any:
    if "size" in kwargs:
        return kwargs["size"]
    return args[0] if args and not isinstance(args[0], int) else args


def of(classifier: Any) -> Any:
    """The miniature of a classifier, in float64, with random weights and its own attention.

    To be called and computed inside of `Exact`; draws nothing from torch's own generators.

    Args:
        classifier: A `...ForSequenceClassification` of transformers.

    Raises:
        CannotShrink: Its config, or its class, is of a kind that is not known here.
    """
    config = copy.deepcopy(classifier.config)
    try:
        shrink(config)
        config._attn_implementation = config._experts_implementation = "eager"
        with torch.random.fork_rng(devices=[]), no_init_weights():
            made = type(classifier)(config)
        thin(made)
        made = made.to("cpu", torch.float64).eval()
    except CannotShrink:
        raise
    except Exception as error:  # configs check themselves in all sorts of ways
        raise CannotShrink(str(error)) from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            # Matrices keep the size of what they multiply; norms and biases are near 1.
            scale = 1 / math.sqrt(weight.shape[-1])
            weight.copy_(scale * noise if weight.ndim > 1 else 1 + 0.3 * noise)
        made.get_input_embeddings().weight.normal_(generator=generator)
    return made


def thin(model: Any) -> None:
    """Keep the first layer of each kind, and the last layer, in place.

    Layers are of one kind when they are built alike: the same modules, with the same numbers, words
    and switches in them, and the same entries in the config's lists.

    Args:
        model: A model of transformers; one whose layers are not found stays as it is.
    """
    layers, config = getattr(model.base_model, "layers", None), model.config
    count = config.num_hidden_layers
    if layers is None or len(layers) != count:
        return
    told = {n: v for n, v in vars(config).items() if isinstance(v, list) and len(v) == count}
    first: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        kind = tuple(
            (name, type(part), tuple(sorted(_simple(part)))) for name, part in layer.named_modules()
        )
        first.setdefault((kind, str([values[index] for values in told.values()])), index)
    kept = sorted({*first.values(), count - 1})
    model.base_model.layers = nn.ModuleList(layers[index] for index in kept)
    for name, values in told.items():
        setattr(config, name, [values[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _simple(part: nn.Module) -> list[tuple[str, str]]:
    """What tells two modules of a class apart, but for their place."""
    return [
        (name, repr(value))
        for name, value in vars(part).items()
        if name not in ("layer_idx", "layer_id")
        and isinstance(value, bool | int | float | str | tuple | None)
    ]


def shrink(config: Any) -> None:
    """Shrink a config in place; kinds of layers, ratios and switches stay.

    Raises:
        CannotShrink: It has parts for other things than text.
    """
    text = config.get_text_config()
    if text is not config:
        raise CannotShrink("it has parts for other things than text")
    groups = _groups(config)
    rotary_alone = getattr(config, "qk_rope_head_dim", 0) == getattr(config, "head_dim", None)
    for name, size in _SIZES.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            setattr(config, name, size)
    for name, size in _AT_MOST.items():
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(config, name, min(value, size))
    for name, value in list(vars(config).items()):
        if name.endswith(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")):
            if isinstance(value, list):
                setattr(config, name, [24] * len(value))
            elif isinstance(value, int):
                setattr(config, name, 24)
        elif name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, value % VOCABULARY)
    if groups is not None:
        config.num_key_value_heads = groups
    if rotary_alone:  # latent attention calls the width of its rotary part so
        config.head_dim = config.qk_rope_head_dim
    _shrink_positions(config)


def _groups(config: Any) -> int | None:
    """Heads of keys and values: one, as many as queries have, or half of them."""
    queries = config.num_attention_heads
    found = getattr(config, "num_key_value_heads", None)
    if not isinstance(found, int):
        return None
    return 1 if found == 1 else _HEADS if found == queries else _HEADS // 2


def _shrink_positions(config: Any) -> None:
    """Shrink context lengths, keeping what lies between the original and the longest one."""
    longest = getattr(config, "max_position_embeddings", None) or CONTEXT
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    room = 4 * CONTEXT
    for rope in kinds:
        original = rope.get("original_max_position_embeddings")
        if original:
            room = round(CONTEXT * longest / original)
            rope["original_max_position_embeddings"] = CONTEXT
        elif "dynamic" in rope.get("rope_type", ""):
            room = CONTEXT
        width = getattr(config, "qk_rope_head_dim", None) or _WIDTH
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if rope.get(name):
                values = rope[name]
                rope[name] = [values[i * len(values) // half] for i in range(half)]
        if rope.get("mrope_section"):
            third = half // 3
            rope["mrope_section"] = [half - 2 * third, third, third]
    if getattr(config, "original_max_position_embeddings", None):
        config.original_max_position_embeddings = CONTEXT
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = room
