"""Provenance beside every output, and the identity of model folders."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import orjson

from polarctl import __version__, console
from polarctl.config import Basic, Common, resolved
from polarctl.errors import PolarctlError, UsageError
from polarctl.parallel import rank
from polarctl.records import SCHEMA_VERSION
from polarctl.storage import atomic

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "trl",
    "vllm",
    "deepspeed",
    "rensa",
    "py3langid",
)
# What a start may cost: other weights differ everywhere, so a part of a large file tells them apart
# (a MiB of every 64). Data may differ in one row, so all of it is read, 4 s at 1 GB/s at the most.
_WHOLE_FILE_BYTES = 256 << 20
_WHOLE_DATA_BYTES = 4 << 30
_PART_EVERY_BYTES = 64 << 20
_WHOLE_MODEL_BYTES = 32 << 30
MANIFEST = "manifest.json"
_START = time.time()


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with _readable(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _readable(path: str | Path) -> Iterator[IO[bytes]]:
    """An opened file; what goes wrong with it is not taken for a full disk.

    Raises:
        PolarctlError: It cannot be opened or read.
    """
    try:
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise PolarctlError(f"{path}: cannot be read: {error.strerror}") from None


def hashed(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`polarctl.storage.read.sizes` entries with the SHA-256 of every input that is not a pipe."""
    return [
        entry if entry["bytes"] is None else {**entry, "sha256": sha256(entry["path"])}
        for entry in inputs
    ]


def folder_identity(path: str) -> str:
    """A hash that tells one model folder from another; a Hub id is its own identity.

    Names and contents of the files, as `_add_file` reads them.
    """
    root = Path(path)
    if not root.is_dir():
        return path
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in root.iterdir() if p.is_file() and p.name != "manifest.json"):
        _add_file(digest, file, file.name)
    return digest.hexdigest()


def file_identity(path: str | Path) -> str:
    """A hash that tells one file from another, as `_add_file` reads it."""
    digest = hashlib.blake2b(digest_size=16)
    _add_file(digest, Path(path), "", whole=_WHOLE_DATA_BYTES)
    return digest.hexdigest()


def _add_file(digest: Any, file: Path, name: str, *, whole: int = _WHOLE_FILE_BYTES) -> None:
    """Add name, size and content to a hash; of a file past `whole` bytes some parts."""
    size = file.stat().st_size
    digest.update(f"{name}\0{size}\0".encode())
    with _readable(file) as stream:
        if size <= whole:
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        for start in range(0, size, _PART_EVERY_BYTES):
            stream.seek(start)
            digest.update(stream.read(1 << 20))
        stream.seek(-(1 << 20), os.SEEK_END)
        digest.update(stream.read())


def check_model(path: str) -> None:
    """Refuse a model whose files are not those that its manifest names; once for each state of it.

    Weights with a changed bit load well and give other rewards. All bytes are read, which warms the
    cache of the system for the load that follows; of more than 32 GiB only the sizes are compared,
    which is said. A folder without a manifest of ours, or a Hub id, is taken as it is.

    Args:
        path: A model's folder, a config file or a Hub id.

    Raises:
        UsageError: Says which file.
    """
    mark = Path(path, MANIFEST)
    if not mark.is_file() or not rank.is_first() or os.environ.get("POLARCTL_WORKER", "0") != "0":
        return
    try:
        outputs = orjson.loads(mark.read_bytes())["outputs"]
        named = {
            Path(path, name): (str(facts["bytes"]), str(facts["sha256"]))
            for name, facts in outputs.items()
            if "/" not in name and not name.endswith((".jsonl", ".md"))  # logs and cards
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # another program's
    if Path(path, "config.json") in named:
        state = [(f.stat().st_size, f.stat().st_mtime_ns) if f.is_file() else None for f in named]
        _check_files(path, tuple(named.items()), tuple(state))


@functools.lru_cache(maxsize=64)
def _check_files(path: str, named: tuple[Any, ...], state: tuple[Any, ...]) -> None:
    sizes = [0 if found is None else found[0] for found in state]
    wrong = [f for (f, (told, _)), own in zip(named, sizes, strict=True) if told != str(own)]
    if not wrong and sum(sizes) > _WHOLE_MODEL_BYTES:
        size = f"more than {_WHOLE_MODEL_BYTES >> 30} GiB"
        console.choice("model files", "sizes compared with the manifest, not hashes", size)
    elif not wrong:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(sha256, [file for file, _ in named])
            wrong = [f for (f, (_, told)), own in zip(named, digests, strict=True) if told != own]
    if wrong:
        raise UsageError(
            f"{wrong[0]}: is not the file that {path}/{MANIFEST} names",
            hint=f"copy the model again; if you have changed it yourself, remove its {MANIFEST}",
        )


def environment() -> dict[str, str]:
    """Versions, platform, host and times."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    stamp = "%Y-%m-%dT%H:%M:%SZ"
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "started": time.strftime(stamp, time.gmtime(_START)),
        "finished": time.strftime(stamp, time.gmtime()),
    }


def write(
    path: str | Path,
    stage: str,
    config: Common | Basic,
    *,
    inputs: list[dict[str, Any]],
    outputs: dict[str, dict[str, Any]],
    counts: dict[str, Any],
    fingerprint: dict[str, Any] | None = None,
) -> None:
    """Write the manifest of an output crash-safely (see `polarctl.records.Manifest`).

    Args:
        path: Where to.
        stage: The stage that made the output.
        config: Its options.
        inputs: What was read.
        outputs: File name to what was written.
        counts: What was counted.
        fingerprint: What a resume must find unchanged.
    """
    record = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "version": __version__,
        "config": resolved(config),
        "inputs": inputs,
        "outputs": outputs,
        "counts": counts,
        "choices": console.choices(),
        "environment": environment(),
    }
    if fingerprint is not None:
        record["fingerprint"] = fingerprint
    atomic.write(path, orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")


def folder_files(folder: Path) -> dict[str, dict[str, Any]]:
    """`{name: {sha256, bytes}}` of the files of a checkpoint folder, its manifest left out."""
    return {
        str(file.relative_to(folder)): {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / "manifest.json"
    }
