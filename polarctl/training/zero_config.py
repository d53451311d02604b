"""DeepSpeed's config: one of ours by name, or a user's file that must not disagree with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from polarctl.errors import UsageError

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_HINT = f"{', '.join(STAGES)}, or the path of a JSON file"


def config_of(name: str, *, dtype: str, clip: float) -> dict[str, Any]:
    """The config of a run.

    Args:
        name: `zero1`, `zero2`, `zero3` or the path of a JSON file. What the file leaves out or
            calls "auto" is ours to fill or DeepSpeed's default.
        dtype: `float32` or `bfloat16`.
        clip: Largest gradient norm.

    Raises:
        UsageError: No such config, or one that disagrees with the run.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"`{dtype}` does not train with ZeRO", hint="float32 or bfloat16")
    half = dtype == "bfloat16"
    ours: dict[str, Any] = {
        # A formality: DeepSpeed counts samples with it. The loop says where a step ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "bf16": {"enabled": half},
        "fp16": {"enabled": False},
    }
    if name in STAGES:
        extra: dict[str, Any] = {"zero_optimization": {"stage": STAGES[name]}}
        if half:  # else gradients of many micro-batches and processes are summed with 8 bits
            extra["data_types"] = {"grad_accum_dtype": "fp32"}
            extra["communication_data_type"] = "fp32"
        return ours | extra
    given = _read(name)
    _agree(name, given, ours)
    merged: dict[str, Any] = _without_auto(given)
    for key, value in ours.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def _read(path: str) -> dict[str, Any]:
    try:
        found = orjson.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such DeepSpeed config", hint=_HINT) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a DeepSpeed config: {error}", hint=_HINT) from None
    zero = found.get("zero_optimization") if isinstance(found, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in STAGES.values():
        raise UsageError(
            f"{path}: `zero_optimization.stage` has to be 1, 2 or 3", hint="leave DeepSpeed out"
        )
    return dict(found)


def _agree(path: str, given: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse what would change the loss, the step or what a log says of them."""
    wanted = {
        "train_batch_size": None,  # pairs, which DeepSpeed does not see
        **{k: v for k, v in ours.items() if not isinstance(v, dict)},
        "bf16.enabled": ours["bf16"]["enabled"],
        "fp16.enabled": False,
        "bf16.check_grad_overflow": True,  # what keeps NaN out of the weights
        "optimizer": None,
        "scheduler": None,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "sequence_parallel_size": 1,
        "tensor_parallel": None,
        "zero_optimization.compute_grad_norm": True,
    }
    for key, value in wanted.items():
        section, _, leaf = key.rpartition(".")
        found = given.get(section, {}) if section else given
        if not isinstance(found, dict):
            raise UsageError(f"{path}: `{section}` is not an object")
        if leaf in found and found[leaf] not in ("auto", value):
            raise UsageError(
                f"{path}: `{key}` disagrees with the run"
                + ("" if value is None else f", which has {value}"),
                hint=f'leave `{key}` out or set it to "auto": the command line decides it',
            )


def _without_auto(value: Any) -> Any:
    """A config without its "auto" entries."""
    if not isinstance(value, dict):
        return value
    return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
