"""Are files what they should be: plain, complete, and as their manifest says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import orjson

from polarctl import console
from polarctl.errors import RecordError, UsageError
from polarctl.records import Manifest, check
from polarctl.storage.manifest import sha256

_HEADER_MAX_BYTES = 100 << 20


def refuse_link(path: Path) -> None:
    """Raise UsageError for anything but a plain file."""
    if path.is_symlink():
        raise UsageError(
            f"{path}: is a link, and links are not followed", hint="put the file itself there"
        )
    if not path.is_file():
        raise UsageError(f"{path}: is no plain file")


def read_manifest(mark: Path, of: Path, force: bool) -> dict[str, Any] | None:
    """The manifest that says that an output is complete; None if it is missing and `force`.

    Raises:
        UsageError: It is missing, or is not a manifest.
    """
    if not mark.exists():
        if not force:
            raise UsageError(
                f"{of}: is not complete: {mark.name} is missing",
                hint="run its command again to finish it, or pass --force to publish it unverified",
            )
        console.warn(f"{of}: has no {mark.name}: published unverified")
        return None
    refuse_link(mark)
    manifest = json_object(mark)
    try:
        check(manifest, Manifest)
    except RecordError as error:
        raise UsageError(f"{mark}: {error}") from None
    return manifest


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises UsageError for any other."""
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: is not a JSON object")
    return value


def check_hashes(entries: dict[Path, Any]) -> None:
    """Each file is what its manifest says.

    Args:
        entries: File to `{bytes, sha256}`, or to None if the manifest does not name it.

    Raises:
        UsageError: Names the first that is not.
    """
    total = sum(path.stat().st_size for path in entries)
    done = 0
    with console.progress("check", total, "bytes") as bar:
        for path, entry in entries.items():
            again = "write the output again, or publish the untouched one"
            if entry is None:
                raise UsageError(f"{path}: the manifest does not name it", hint=again)
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise UsageError(
                    f"{path}: has {size:,} bytes, the manifest says {entry['bytes']:,}", hint=again
                )
            if sha256(path) != entry["sha256"]:
                raise UsageError(f"{path}: is not what the manifest says (SHA-256)", hint=again)
            done += size
            bar.update(done)


def check_weights(folder: Path, names: Iterable[str]) -> None:
    """Weights are there and whole: every tensor of the index is in its file.

    Args:
        folder: The model's folder.
        names: Its publishable files.

    Raises:
        UsageError: Says what is missing or damaged.
    """
    tensors = {n: _tensors(folder / n) for n in names if n.endswith(".safetensors")}
    if not tensors:
        raise UsageError(
            f"{folder}: no weights in safetensors format",
            hint="pickles (.bin, .pt) are not published; `polarctl convert checkpoint` writes it",
        )
    index = folder / "model.safetensors.index.json"
    shards = [name for name in tensors if name.startswith("model-")]
    if not index.exists():
        if shards:
            raise UsageError(f"{folder / shards[0]}: a part of the weights, but no {index.name}")
        return
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UsageError(f"{index}: no `weight_map`")
    for tensor, name in weight_map.items():
        if name not in tensors:
            raise UsageError(f"{index}: names {json.dumps(name)}, which is not in the folder")
        if tensor not in tensors[name]:
            raise UsageError(
                f"{folder / name}: `{tensor}` is missing, which {index.name} puts there"
            )


def _tensors(path: Path) -> set[str]:
    """Names of the tensors of a safetensors file, which is as long as its header says."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= min(size, _HEADER_MAX_BYTES) else b""
    try:
        found = msgspec.json.decode(header, type=dict[str, dict[str, Any]])
        found.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in found.values()), default=0)
    except (msgspec.DecodeError, KeyError, IndexError, TypeError):
        raise UsageError(f"{path}: is no safetensors file") from None
    if size != 8 + length + end:
        raise UsageError(f"{path}: is damaged: {size:,} bytes, not {8 + length + end:,}")
    return set(found)
