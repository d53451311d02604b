"""The weight files of a checkpoint, read tensor by tensor and never executed.

A `.bin` is a pickle. It is opened by torch's reader for weights alone, which refuses everything
that is not a tensor, and mapped into memory, so that a tensor costs memory once it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polarctl.errors import MissingError
from polarctl.model import source

_NAMES = ("model.safetensors", "pytorch_model.bin")
_SETTINGS = ["*.json", "*.jinja", "tokenizer.model"]
SHARD_BYTES = 5 * 10**9


def folder_of(path: str, *, weights: bool = True) -> Path:
    """The folder itself, or the one into which a Hub id is downloaded; never any code.

    Args:
        path: Folder or Hub id.
        weights: Whether the weights are needed, too.

    Raises:
        MissingError: It is on neither side.
    """
    if Path(path).is_dir():
        return Path(path)
    source.require(path)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, allow_patterns=_SETTINGS))
        for pattern in ("*.safetensors", "*.bin") if weights else ():
            if _file_of(folder) is None:
                snapshot_download(path, allow_patterns=[*_SETTINGS, pattern])
    except Exception as error:  # its own errors, those of requests, OSError, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise MissingError(
            f"{path}: cannot be read ({reason})", hint="a folder, or the id of a model on the Hub"
        ) from None
    return folder


class WeightFiles:
    """All weights of a folder by their names.

    Args:
        folder: Holds `model.safetensors` or `pytorch_model.bin`, or shards with their index.

    Raises:
        MissingError: No weights, a broken file, or one that holds more than weights.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = _file_of(folder)
        if found is None:
            raise MissingError(
                f"{folder}: has no weights",
                hint=f"{' or '.join(_NAMES)}, or shards with their index",
            )
        files = _shards(found) if found.suffix == ".json" else [found]
        self._of: dict[str, Any] = {}
        for file in files:
            opened = _open(file)
            # The published files say `model.` before all but the head; the bare names are older.
            self._of.update((_full(name), (opened, name)) for name in opened.keys())

    def names(self) -> set[str]:
        """Names of all weights; buffers that old versions saved are left out."""
        return {name for name in self._of if not name.endswith("rotary_emb.inv_freq")}

    def __getitem__(self, name: str) -> Tensor:
        """A weight, on the CPU, as it is in the file."""
        opened, inner = self._of[name]
        tensor: Tensor = opened[inner] if isinstance(opened, dict) else opened.get_tensor(inner)
        return tensor

    def require(self, wanted: set[str], optional: Iterable[str] = ()) -> None:
        """Check that exactly these weights are there.

        Raises:
            MissingError: A weight is missing, or one is there that nothing would read.
        """
        names = self.names()
        unknown = names - wanted - set(optional)
        for found, what in ((wanted - names, "missing"), (unknown, "unknown")):
            if found:
                raise MissingError(
                    f"{self.folder}: weights are {what}: {listed(found)}",
                    hint="the folder must hold one whole checkpoint, as config.json describes it",
                )


def listed(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def write_shards(
    folder: Path, weights: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards with their index; one shard is in memory at a time.

    Args:
        folder: Where to.
        weights: Names and tensors, taken one by one.
        limit: Bytes of one shard at most (a larger tensor goes alone).
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total = 0

    def put() -> None:
        shards.append(list(held))
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        held.clear()

    for name, tensor in weights:
        if held and held_bytes + tensor.nbytes > limit:
            put()
            held_bytes = 0
        # A clone: tensors of one mapped file may share their memory, which is refused.
        held[name] = tensor.contiguous().clone()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    put()
    if len(shards) == 1:
        (folder / "part-1").rename(folder / _NAMES[0])
        return
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        index.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": total}, "weight_map": index}
    text = json.dumps(content, indent=2) + "\n"
    (folder / f"{_NAMES[0]}.index.json").write_text(text, encoding="utf-8")


def _file_of(folder: Path) -> Path | None:
    tried = [folder / (name + end) for name in _NAMES for end in ("", ".index.json")]
    return next((file for file in tried if file.is_file()), None)


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MissingError(f"{index}: is no index of weights") from None
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise MissingError(f"{index}: the shard `{file.name}` is not in its folder")
    return files


def _open(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        try:
            return safe_open(file, framework="pt")
        except Exception as error:  # SafetensorError is an Exception and no more
            raise MissingError(f"{file}: cannot be read ({error})") from None
    opened = _unpickled(file)
    if not isinstance(opened, Mapping) or not all(isinstance(x, Tensor) for x in opened.values()):
        raise MissingError(f"{file}: holds something else than weights, and was not used")
    return dict(opened)


def _unpickled(file: Path) -> Any:
    import pickle
    import zipfile

    try:
        # Files of torch before 1.6 are not zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise MissingError(
            f"{file}: holds more than weights, and was not opened",
            hint="a pickle can run any program; ask for the weights as safetensors",
        ) from None
    except Exception as error:  # RuntimeError, EOFError, ... of a broken file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise MissingError(f"{file}: cannot be read ({reason})") from None


def _full(name: str) -> str:
    bare = name.startswith(("tok_embeddings.", "layers.", "norm."))
    return f"model.{name}" if bare else name
