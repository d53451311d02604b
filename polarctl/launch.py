"""Where a run computes: device and precision, chosen with a reason that is said."""

from __future__ import annotations

from typing import Any

from polarctl import console
from polarctl.errors import MissingError, UsageError

SMALL_MODEL = 5_000_000  # parameters
DTYPES = ("auto", "float32", "bfloat16", "float16")


def device_of(name: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:I` as a torch device name.

    Raises:
        MissingError: A GPU is asked for and there is none.
        UsageError: No such device.
    """
    import torch

    gpus = torch.cuda.device_count()
    if name == "auto":
        found = "cuda" if gpus else "cpu"
        console.choice("device", found, f"{gpus} GPUs found" if gpus else "no GPU found")
        return found
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UsageError(f"`--device {name}`: no such device", hint="auto, cpu, cuda or cuda:0")
    if kind == "cuda" and int(index or 0) >= gpus:
        raise MissingError(f"`--device {name}`: {gpus} GPUs found", hint="--device cpu")
    return name


def dtype_of(name: str, device: str) -> Any:
    """A torch dtype; `auto` is bfloat16 on a GPU that has it, else float32.

    Raises:
        UsageError: No such precision.
    """
    import torch

    if name not in DTYPES:
        raise UsageError(f"`--dtype {name}`: unknown", hint=f"one of {', '.join(DTYPES)}")
    if name == "auto":
        fast = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        name = "bfloat16" if fast else "float32"
        console.choice("dtype", name, "the GPU has it" if fast else f"exact, on {device}")
    return getattr(torch, name)


def quiet_libraries() -> None:
    """Keep model libraries from filling stderr with bars and advice; errors still come through."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def threads_for(parameters: int, device: str) -> None:
    """One thread for a model so small that threads cost more than they bring.

    On a busy machine of two cores a step of a model of 100,000 parameters took 4 s with two
    threads, which spin while they wait for each other, and 0.3 s with one. OMP_NUM_THREADS wins.
    """
    import os

    import torch

    if device == "cpu" and parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        console.choice("threads", "1", f"{parameters:,} parameters are too few to share out")
