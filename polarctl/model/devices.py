"""Where a run computes: device, precision and threads, chosen with a reason that is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from polarctl import console
from polarctl.errors import MissingError, UsageError
from polarctl.parallel import rank

# On idle cores two threads train 0.4 M parameters 1.7 times faster, on busy ones 4 times slower.
SMALL_TO_COMPUTE = 1_000_000  # parameters, for passes over whole sequences
SMALL_TO_DECODE = 2_000_000  # parameters, for one token a sequence at a time
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


def show_one_gpu(name: str) -> None:
    """Let this process see one GPU alone, as TRL's trainer demands of a process without others.

    CUDA reads the variable once, when it is first asked anything (`torch.cuda.is_available()` asks
    it): call this before torch is imported.

    Args:
        name: `--device`.

    Raises:
        UsageError: One GPU for several processes.
        MissingError: More GPUs are asked for than CUDA_VISIBLE_DEVICES names.
    """
    import os

    kind, _, index = name.partition(":")
    if rank.local() is not None:
        if index:
            raise UsageError(
                f"`--device {name}`: several processes choose their own GPUs", hint="--device cuda"
            )
        return
    if kind not in ("auto", "cuda") or (index and not index.isdecimal()):
        return  # `device_of` says what is wrong with it
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    number = int(index or 0)
    if not visible and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    elif visible and number < len(visible):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number]
    elif index:
        raise MissingError(
            f"`--device {name}`: CUDA_VISIBLE_DEVICES names {len(visible)} GPUs",
            hint="--device cuda, or another CUDA_VISIBLE_DEVICES",
        )


def dtype_of(name: str, device: str) -> Any:
    """A torch dtype; `auto` is bfloat16 on a GPU that has it, else float32.

    Raises:
        UsageError: No such precision.
    """
    import torch

    if name not in DTYPES:
        raise UsageError(f"`--dtype {name}`: unknown", hint=f"one of {', '.join(DTYPES)}")
    if name == "auto":
        fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(
            including_emulation=False  # a V100 or T4 computes it many times slower
        )
        name = "bfloat16" if fast else "float32"
        console.choice("dtype", name, "the GPU has it" if fast else f"exact, on {device}")
    return getattr(torch, name)


def quiet_libraries() -> None:
    """Keep model libraries from filling stderr with bars and advice; errors still come through."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available():
        # Where DeepSpeed is installed other libraries load it, and it warns that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def threads_for(*models: Any, under: int = SMALL_TO_COMPUTE) -> Iterator[None]:
    """One thread on a CPU, inside the block, for models too small to gain much from more.

    OMP_NUM_THREADS wins. Milliseconds with one thread and with two, on two cores:

        parameters     train 2,048 tokens   score 4,096 tokens   decode 9 tokens x 16
        0.14 M, idle         52   42              42   31               20   19
        0.43 M, idle        129   78             117   90               36   38
        1.32 M, idle        349  203             241  134               66   56
        0.43 M, busy        196  860             111  250               28  289

    On busy cores threads spin while they wait for each other, so a tie on idle ones is a loss.

    Args:
        models: The models (torch modules) that compute inside; their parameters are added up.
        under: Parameters of all models together at which every thread is used again.
    """
    import os

    import torch

    before = torch.get_num_threads()
    weights = [weight for model in models for weight in model.parameters()]
    if (
        before == 1
        or "OMP_NUM_THREADS" in os.environ
        or any(weight.device.type != "cpu" for weight in weights)
        or sum(weight.numel() for weight in weights) >= under
    ):
        yield
        return
    if "threads" not in console.choices():
        console.choice("threads", "1", f"for models under {under:,} parameters")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processes(config: Any) -> list[dict[str, str]]:
    """Environment variables of each process of `--gpus N`; none for one process, or for `--ray`.

    Args:
        config: With the options `gpus`, `device` and `ray`.

    Raises:
        MissingError: Fewer GPUs than processes.
        UsageError: A device for one process only.
    """
    if config.gpus == 1 or config.ray is not None:
        return []
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"`--device {config.device}` is one GPU, --gpus {config.gpus} takes more")
    import torch

    if config.device == "cpu":
        threads = max(1, torch.get_num_threads() // config.gpus)
        return [{"OMP_NUM_THREADS": str(threads)}] * config.gpus
    found = torch.cuda.device_count()
    if found < config.gpus:
        raise MissingError(
            f"`--gpus {config.gpus}`: {found} GPUs found", hint="--device cpu for processes on it"
        )
    return [{"CUDA_VISIBLE_DEVICES": name} for name in _visible(found)[: config.gpus]]


def _visible(found: int) -> list[str]:
    """Names of the GPUs as CUDA takes them: numbers, or what the user has left visible."""
    import os

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else list(map(str, range(found)))
