"""The config of an InternLM2 checkpoint as a Llama's, and back.

InternLM2 is Llama with q, k and v in one matrix; its config has Llama's keys but for `bias` (Llama:
`attention_bias`). Defaults of absent keys are those of the published `InternLM2Config`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers

from polarctl.errors import UsageError
from polarctl.model import source

MODEL_TYPE = "internlm2"
REWARD_MODEL, CAUSAL_LM = "InternLM2ForRewardModel", "InternLM2ForCausalLM"
# What the published client does (github InternLM/POLAR, `reward_func.py`).
TEMPLATE = {
    "separator": "<|reward|>",
    "reward_token": "[UNUSED_TOKEN_130]",
    "max_length": 16384,
    "max_response_length": 4096,
    "cut_side": "right",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_SAME = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read(path: str) -> dict[str, Any] | None:
    """The `config.json` of an InternLM2 checkpoint.

    Args:
        path: Folder or Hub id.

    Returns:
        Its content, or None when there is no config or it is another model's.

    Raises:
        MissingError: Nothing is there, and the Hub cannot be asked.
    """
    source.require(path)
    file = Path(path, "config.json")
    return _read(path, file.stat().st_mtime_ns if file.is_file() else None)


@functools.lru_cache(maxsize=64)
def _read(path: str, changed: int | None) -> dict[str, Any] | None:
    """`read`, once for each state of a folder: a load asks several times."""
    try:
        content, _ = transformers.PretrainedConfig.get_config_dict(path)
    except Exception:  # OSError, ValueError, ...: whoever loads it otherwise says what is wrong
        return None
    ours = isinstance(content, dict) and content.get("model_type") == MODEL_TYPE
    return content if ours else None


def to_llama(released: dict[str, Any]) -> transformers.LlamaConfig:
    """The config of the same model as a Llama: a classifier with one label, or a causal LM.

    Dynamic scaling of positions acts beyond `max_position_embeddings` alone. Where the template
    never gets there it is left out, because vLLM and SGLang apply it at every length (vLLM issues
    3488 and 41236) and would give other rewards. The original is kept for the way back.

    Args:
        released: The `config.json` of an InternLM2 checkpoint.

    Raises:
        UsageError: It lacks a size, or names an architecture or a scaling that is not supported.
    """
    missing = [key for key in _SIZES if not isinstance(released.get(key), int)]
    if missing:
        raise UsageError(f"config.json: InternLM2 without {', '.join(missing)}")
    architecture = (released.get("architectures") or [None])[0]
    if architecture not in (REWARD_MODEL, CAUSAL_LM):
        raise UsageError(
            f"config.json: the architecture `{architecture}` is not supported",
            hint=f"{REWARD_MODEL} or {CAUSAL_LM}",
        )
    config = transformers.LlamaConfig(
        **{key: released[key] for key in _SIZES},
        **{key: released.get(key, default) for key, default in _SAME.items()},
        attention_bias=bool(released.get("bias", True)),
        rope_parameters=_rope(released),
        architectures=["LlamaForCausalLM"],
        dtype=released.get("torch_dtype") or released.get("dtype"),
    )
    if released.get("rope_scaling"):
        config.internlm2_rope_scaling = dict(released["rope_scaling"])
    if architecture == REWARD_MODEL:
        config.architectures = ["LlamaForSequenceClassification"]
        config.num_labels, config.problem_type = 1, "regression"
        config.reward_token_id = released.get("reward_token_id")
        for key in ("polar", "polar_no_reference"):
            if key in released:
                setattr(config, key, released[key])
    return config


def to_internlm2(config: Any) -> dict[str, Any]:
    """The `config.json` of a Llama reward model in the published layout.

    Args:
        config: A `LlamaConfig`.

    Raises:
        UsageError: InternLM2 has no place for something that this Llama has.
    """
    rope = dict(config.rope_parameters)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    scaling = getattr(config, "internlm2_rope_scaling", None)
    if kind != "default":
        scaling = {"type": kind, "factor": rope.get("factor")}
    own_head_dim = config.head_dim * config.num_attention_heads != config.hidden_size
    for found, what in (
        (kind not in ("default", "dynamic", "linear"), f"positions scaled by `{kind}`"),
        (own_head_dim, "heads whose sizes do not add up to `hidden_size`"),
        (config.mlp_bias, "a bias in the MLP"),
    ):
        if found:
            raise UsageError(f"InternLM2 has no {what}")
    kept = ("polar", "polar_no_reference", "reward_token_id")
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype else None
    return {
        "architectures": [REWARD_MODEL],
        "model_type": MODEL_TYPE,
        **{key: getattr(config, key) for key in (*_SIZES, *_SAME)},
        "bias": config.attention_bias,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": False,
        **{key: getattr(config, key) for key in kept if hasattr(config, key)},
    }


def template(config: Any, tokenizer: Any) -> dict[str, Any]:
    """The input template of a published checkpoint.

    Args:
        config: Its config; the reward token is the one of `reward_token_id`.
        tokenizer: Its tokenizer.
    """
    index = getattr(config, "reward_token_id", None)
    token = None if index is None else tokenizer.convert_ids_to_tokens(index)
    return TEMPLATE if token is None else {**TEMPLATE, "reward_token": token}


def _rope(released: dict[str, Any]) -> dict[str, Any]:
    # Saved again by transformers 5 it is called `rope_parameters`, and holds the base as well.
    scaling = released.get("rope_scaling") or released.get("rope_parameters") or {}
    theta = released.get("rope_theta", scaling.get("rope_theta", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(theta)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "dynamic", "linear"):
        raise UsageError(f"config.json: positions scaled by `{kind}` are not supported")
    if kind == "default" or (kind == "dynamic" and _never_scaled(released)):
        return rope
    return {**rope, "rope_type": kind, "factor": float(scaling.get("factor", 1.0))}


def _never_scaled(released: dict[str, Any]) -> bool:
    longest = (released.get("polar") or TEMPLATE)["max_length"]
    return bool(released.get("max_position_embeddings", 2048) >= longest)
