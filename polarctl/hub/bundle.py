"""What may be published: an allow-list of files, all whole, without links and without secrets.

Everything here happens before the first request. A file that is not on the list stays behind and
is said; a file that should not lie there at all stops the publication.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from polarctl import console
from polarctl.errors import RecordError, UsageError
from polarctl.hub.cards import DataFile, last_metrics
from polarctl.hub.checks import check_hashes, check_weights, json_object, read_manifest, refuse_link
from polarctl.hub.scrub import scrub_manifest
from polarctl.hub.secrets import HASH_DIGITS, Secret, find_secrets
from polarctl.hub.statistics import Statistics
from polarctl.records import kind_of
from polarctl.storage.manifest import sha256
from polarctl.storage.read import Reader, open_bytes

_TEXT = r"README\.md|(?:LICENSE|NOTICE)(?:\.txt|\.md)?"
_MODEL_FILE = re.compile(
    r"config\.json|generation_config\.json|metrics\.jsonl|manifest\.json"
    r"|model(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model\.safetensors"
    r"|tokenizer\.(?:json|model)|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|chat_template\.(?:jinja|json)|" + _TEXT
)
_DATA_FILE = re.compile(r"[^.].*\.jsonl(?:\.gz|\.zst)?")
_EDITABLE = re.compile(_TEXT)  # may differ from what the manifest says
_CREDENTIALS = re.compile(
    r"\.env.*|.*\.(?:pem|key|p12|pfx|ppk)|id_(?:rsa|dsa|ecdsa|ed25519).*|\.netrc|\.pypirc|\.npmrc"
    r"|\.?(?:git-)?credentials.*|\.?secrets?(?:\..*)?|\.?token",
    re.IGNORECASE,
)
_SMALL_BYTES = 64 << 20
_SAID_SECRETS = 20
_REASONS = (
    (re.compile(r".*\.(?:bin|pt|pth|ckpt|pkl|pickle)"), "a pickle can run code when it is loaded"),
    (re.compile(r".*\.py"), "code is not published"),
    (_DATA_FILE, "data: publish it by itself"),
    (re.compile(r"\..*"), "hidden"),
)


@dataclass(frozen=True)
class HubFile:
    """A file to be published: its name there, and its content as a path or as bytes."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass
class Bundle:
    """What is published, and what a card needs to know of it.

    Attributes:
        items: The files, by name.
        left_out: `{name: reason}`.
        config: A model's config.json.
        manifest: A model's scrubbed manifest.
        metrics: A model's last logged metrics.
        data: Data files.
    """

    items: dict[str, HubFile] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    data: list[DataFile] = field(default_factory=list)

    def add(self, name: str, source: Path | bytes) -> None:
        """Add a file."""
        self.items[name] = HubFile(name, source)


def tell_type(path: Path) -> tuple[str, str]:
    """`model` or `dataset`, and why.

    Raises:
        UsageError: Neither, or no such path.
    """
    if path.is_dir():
        if (path / "config.json").exists():
            return "model", "a folder with config.json"
        if any(_DATA_FILE.fullmatch(name) for name in os.listdir(path)):
            return "dataset", "a folder with .jsonl files"
        raise UsageError(f"{path}: neither a model (config.json) nor data (.jsonl) is in it")
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if _DATA_FILE.fullmatch(path.name):
        return "dataset", "a .jsonl file"
    raise UsageError(
        f"{path}: is neither a folder nor a .jsonl file", hint="name the folder that it is in"
    )


def collect_model(folder: Path, *, force: bool = False) -> Bundle:
    """The publishable files of a checkpoint folder.

    Args:
        folder: A folder written by `pretrain`, `finetune` or `rft`.
        force: Accept a folder without a manifest, unverified.

    Raises:
        UsageError: Something is missing, damaged, a link, or looks like credentials.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: is no folder", hint="a model is published as a folder")
    bundle = Bundle()
    for path in _allowed(folder, _MODEL_FILE, "not a file of a model", bundle.left_out):
        bundle.add(path.name, path)
    if "config.json" not in bundle.items:
        raise UsageError(f"{folder}: no config.json")
    bundle.config = json_object(folder / "config.json")
    check_weights(folder, bundle.items)
    manifest = read_manifest(folder / "manifest.json", folder, force)
    if manifest is not None:
        outputs = manifest["outputs"]
        for name in outputs:
            if _MODEL_FILE.fullmatch(name) and name not in bundle.items:
                raise UsageError(f"{folder / name}: is in manifest.json but not in the folder")
        named = [n for n in bundle.items if n != "manifest.json" and not _EDITABLE.fullmatch(n)]
        check_hashes({folder / name: outputs.get(name) for name in named})
        kept = {name: entry for name, entry in outputs.items() if name in bundle.items}
        bundle.manifest = scrub_manifest({**manifest, "outputs": kept})
        bundle.add("manifest.json", _as_bytes(bundle.manifest))
    if not any(name.startswith(("tokenizer.", "vocab.")) for name in bundle.items):
        console.warn(f"{folder}: there is no tokenizer in it: the model cannot be used without one")
    if "metrics.jsonl" in bundle.items:
        bundle.metrics = last_metrics(Reader([str(folder / "metrics.jsonl")], None))
    return bundle


def collect_data(path: Path, *, force: bool = False) -> Bundle:
    """A data file, or those of a folder, with their manifests.

    Args:
        path: A .jsonl file (.gz and .zst too) or a folder of them.
        force: Accept files without a manifest; their records are checked instead.

    Raises:
        UsageError: Something is missing, damaged, a link, or looks like credentials.
        RecordError: A file does not hold records.
    """
    bundle = Bundle()
    if path.is_dir():
        manifests = r"|.*\.jsonl(?:\.gz|\.zst)?\.manifest\.json"
        allowed = re.compile(f"{_DATA_FILE.pattern}|{_TEXT}{manifests}")
        for file in _allowed(path, allowed, "not a data file", bundle.left_out):
            if not file.name.endswith(".manifest.json"):
                bundle.add(file.name, file)
    else:
        refuse_link(path)
        bundle.add(path.name, path)
    files = [Path(i.source) for i in bundle.items.values() if _DATA_FILE.fullmatch(i.name)]  # type: ignore[arg-type]
    if not files:
        raise UsageError(f"{path}: no .jsonl file is in it")
    for file in files:
        mark = file.with_name(f"{file.name}.manifest.json")
        if file.with_name(f"{file.name}.journal").exists():
            raise UsageError(f"{file}: is not complete", hint="run its command again to finish it")
        manifest = read_manifest(mark, file, force)
        if manifest is not None:
            outputs = manifest["outputs"]
            only = next(iter(outputs.values())) if len(outputs) == 1 else None  # a renamed file
            check_hashes({file: outputs.get(file.name, only)})
            manifest = scrub_manifest(manifest)
            bundle.add(mark.name, _as_bytes(manifest))
        bundle.data.append(_data_file(file, manifest))
    return bundle


def refuse_secrets(
    bundle: Bundle, known: Mapping[str, bytes], allowed: Collection[str] = ()
) -> None:
    """Look for secrets in all files but the numbers of the weights.

    Args:
        bundle: What is to be published.
        known: `{what: value}` of secrets to be found by their value.
        allowed: Hashes of what is no secret.

    Raises:
        MissingError: The package that looks for them is not installed.
        UsageError: Names the first place and what was found; the next are warnings. Or an allowed
            hash is the hash of nothing.
    """
    for given in allowed:
        if not re.fullmatch(f"[0-9a-f]{{{HASH_DIGITS}}}", given):
            raise UsageError(
                "`--allow-secret`: not the hash of a place",
                hint=f"the {HASH_DIGITS} digits from the message that refuses the file",
            )
    found: list[tuple[str, str]] = []
    count, idle = 0, set(allowed)
    total = sum(item.size for item in bundle.items.values())
    with console.progress("look for secrets", total, "bytes") as bar:
        done = 0
        for item in bundle.items.values():
            for secret in _secrets_in(item, known):
                idle.discard(secret.hash)
                if secret.hash in allowed:
                    continue
                count += 1
                if len(found) < _SAID_SECRETS:
                    said = f"{item.name}:{secret.line}: holds a secret: {secret.what}"
                    found.append((f"{said}, hash {secret.hash}", secret.hash))
            done += item.size
            bar.update(done)
    for text, _ in found[1:]:
        console.warn(text)
    if found:
        more = f" ({count:,} places in all)" if count > 1 else ""
        raise UsageError(
            f"{found[0][0]}{more}; nothing was uploaded",
            hint="take it out of the file, and revoke it if others have seen the file; "
            f"if it is no secret: --allow-secret {found[0][1]}",
        )
    if idle:
        raise UsageError(
            f"`--allow-secret {min(idle)}` has no effect here: nothing has this hash",
            hint="leave it out",
        )


def _secrets_in(item: HubFile, known: Mapping[str, bytes]) -> Iterator[Secret]:
    is_json = item.name.endswith((".json", ".jsonl", ".jsonl.gz", ".jsonl.zst"))
    if isinstance(item.source, bytes):
        yield from find_secrets(io.BytesIO(item.source), known, escaped=is_json)
    elif item.name.endswith(".safetensors"):
        with open(item.source, "rb") as stream:
            head = stream.read(int.from_bytes(stream.read(8), "little"))
        yield from find_secrets(io.BytesIO(head), known, escaped=True)
    else:
        with open_bytes(str(item.source)) as stream:
            yield from find_secrets(stream, known, escaped=is_json)


def warn_of_local_paths(bundle: Bundle) -> None:
    """Say which of the small JSON files name a folder of this user."""
    home = str(Path.home()).encode()
    for item in bundle.items.values():
        if isinstance(item.source, Path) and item.name.endswith(".json") and len(home) > 1:
            if item.size < _SMALL_BYTES and home + b"/" in item.source.read_bytes():
                console.warn(f"{item.name} names a path below your home folder: it will be public")


def _allowed(
    folder: Path, allowed: re.Pattern[str], otherwise: str, left_out: dict[str, str]
) -> Iterator[Path]:
    """The allowed plain files right in a folder; says no to links and credentials."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if _CREDENTIALS.fullmatch(entry.name):
            raise UsageError(
                f"{path}: looks like credentials; nothing was uploaded",
                hint="move it out of the folder",
            )
        if allowed.fullmatch(entry.name):
            refuse_link(path)
            yield path
        elif entry.is_symlink():
            left_out[entry.name] = "a link"
        elif entry.is_dir():
            left_out[f"{entry.name}/"] = "a folder"
        else:
            reasons = (why for pattern, why in _REASONS if pattern.fullmatch(entry.name))
            left_out[entry.name] = next(reasons, otherwise)


def _data_file(path: Path, manifest: Mapping[str, Any] | None) -> DataFile:
    """Facts for the card: every record is read and checked."""
    reader = Reader([str(path)], kind_of)
    names: dict[str, None] = {}
    statistics = Statistics()
    kind = ""
    try:
        for record in reader:
            kind = kind or kind_of(record)
            names.update(dict.fromkeys(record))
            statistics.add(record)
    except RecordError as error:  # its hint is for stages that can set records aside
        hint = f"`polarctl validate {path}` names the bad lines"
        raise RecordError(error.reason, where=error.where, hint=hint) from None
    outputs = (manifest or {}).get("outputs") or {}
    statistics.add_manifest((manifest or {}).get("counts") or {})
    entry = outputs.get(path.name) or (next(iter(outputs.values())) if outputs else {})
    return DataFile(
        name=path.name,
        kind=kind,
        records=entry.get("records", reader.rows),
        size=path.stat().st_size,
        sha256=entry.get("sha256") or sha256(path),
        fields=tuple(names),
        manifest=manifest,
        statistics=statistics,
    )


def _as_bytes(manifest: Mapping[str, Any]) -> bytes:
    return orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n"
