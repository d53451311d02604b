"""README.md of what is published on the Hub, written from its manifest and its files.

A card says only what a scrubbed manifest says (`polarctl.hub.scrub`): no host, no paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any

import yaml

from polarctl.config import BOOKKEEPING
from polarctl.hub.statistics import COLUMNS, Statistics
from polarctl.records import KINDS
from polarctl.schemas.export import json_schema

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGE = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
# In every card written here: such a card may be replaced, one that a person has edited may not.
MARK = "<!-- Written by `polarctl push`. Delete this line to keep your changes. -->"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_VALIDATION = re.compile(r"(?:val|valid|validation|eval|dev|test)[_/.]")


@dataclass(frozen=True)
class DataFile:
    """What a card says of a data file.

    Attributes:
        name: File name.
        kind: Kind of record (`polarctl.records.KINDS`).
        records: Number of records.
        size: Bytes.
        sha256: Hash of the file's bytes.
        fields: Names of the records' fields, in order of appearance.
        manifest: Scrubbed manifest, or None.
        statistics: Its policies and lengths.
        plots: Names of its plots in the repository, and what each shows.
    """

    name: str
    kind: str
    records: int
    size: int
    sha256: str
    fields: tuple[str, ...]
    manifest: Mapping[str, Any] | None
    statistics: Statistics
    plots: Mapping[str, str] = field(default_factory=dict)


def splits(files: Sequence[DataFile]) -> dict[str, dict[str, list[DataFile]]]:
    """Kind of record to split to files.

    The only file of a kind is `train`, and so are all where none is. Else a name with a part such
    as `val`, `dev` or `held` is `validation` and one with `test` is `test`.
    """
    found: dict[str, dict[str, list[DataFile]]] = {}
    for kind in dict.fromkeys(file.kind for file in files):
        alike = [file for file in files if file.kind == kind]
        parts = found.setdefault(kind, {})
        named = [_split_of(file.name) for file in alike]
        for file, split in zip(alike, named, strict=True):
            parts.setdefault(split if "train" in named else "train", []).append(file)
    return found


def _split_of(name: str) -> str:
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & {"val", "valid", "validation", "dev", "eval", "held", "heldout", "unseen"}:
        return "validation"
    return "test" if "test" in words else "train"


def model_card(
    repo_id: str,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any] | None,
    metrics: Mapping[str, float],
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The card of a reward model or of a policy.

    Args:
        repo_id: `owner/name` on the Hub.
        config: The model's config.json.
        manifest: Scrubbed manifest, or None.
        metrics: Last logged value of each metric.
        license: Licence for the front matter.
        datasets: Hub ids of the training data for the front matter.
    """
    kinds = config.get("architectures")
    is_reward = "polar" in config or "CausalLM" not in str(kinds)
    chat = "polar" not in config and "SequenceClassification" in str(kinds)
    base = _base(manifest)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
        "tags": (["reward-model"] if chat else ["polar", "reward-model"])
        if is_reward
        else ["polar"],
        "base_model": base if base and _HUB_ID.fullmatch(base) else None,
        "license": license,
        "datasets": list(datasets),
    }
    polar = config.get("polar") or {}
    separator = str(polar.get("separator", "<|reward|>"))
    token = str(polar.get("reward_token", "[UNUSED_TOKEN_130]"))
    return _fill(
        "chat_reward_model.md" if chat else "reward_model.md" if is_reward else "policy_model.md",
        front_matter=_front(front),
        name=repo_id.partition("/")[2] or repo_id,
        repo_id=repo_id,
        started_from=f"\nTraining started from `{base}`." if base else "",
        template=rf"{{prompt}}\n{{reference}}{separator}{{prompt}}\n{{candidate}}{token}",
        separator_literal=json.dumps(separator),
        reward_token_literal=json.dumps(token),
        reward_token=token,
        limits=_limits(polar),
        provenance=_provenance({"": manifest} if manifest else {}, metrics),
    )


def dataset_card(
    repo_id: str,
    files: Sequence[DataFile],
    *,
    license: str | None = None,
    dataset_info: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of one or more data files.

    Args:
        repo_id: `owner/name` on the Hub.
        files: The files.
        license: Licence for the front matter.
        dataset_info: One entry for each kind of record where there are Parquet shards
            (`polarctl.hub.shards`).
    """
    parts = splits(files)
    kinds = list(parts)
    total = sum(file.records for file in files)
    front = {
        "tags": ["polar"],
        "license": license,
        "size_categories": [size_category(total)],
        # Named, or the Hub's viewer takes the manifests for data too.
        "configs": [
            {"config_name": kind, "data_files": _data_files(kind, parts[kind], bool(dataset_info))}
            for kind in kinds
        ],
        "dataset_info": list(dataset_info),
    }
    shards = "" if not dataset_info else " The same as Parquet, by split: the viewer reads that."
    return _fill(
        "dataset.md",
        front_matter=_front(front),
        name=repo_id.partition("/")[2] or repo_id,
        repo_id=repo_id,
        summary=f"{total:,} records for reward models in the manner of "
        "[POLAR](https://arxiv.org/abs/2507.05197), made with `polarctl`. JSON lines, one record "
        f"a line.{shards}",
        files=_table(
            ("File", "Kind", "Records", "Bytes", "SHA-256"),
            (
                (f"`{f.name}`", f"`{f.kind}`", f"{f.records:,}", f"{f.size:,}", f"`{f.sha256}`")
                for f in files
            ),
        ),
        fields="\n\n".join(_fields(kind, files) for kind in kinds),
        contents="".join(_contents(file) for file in files),
        first_config=kinds[0],
        provenance=_provenance({f.name: f.manifest for f in files if f.manifest}, {}),
    )


def _data_files(kind: str, parts: Mapping[str, Sequence[DataFile]], parquet: bool) -> list[Any]:
    if parquet:
        return [{"split": split, "path": f"{kind}/{split}-*.parquet"} for split in parts]
    if len(parts) == 1:
        return [file.name for files in parts.values() for file in files]
    return [{"split": s, "path": [file.name for file in files]} for s, files in parts.items()]


def _contents(file: DataFile) -> str:
    """Tables and plots of a file's texts and policies, and of what was left out."""
    found = file.statistics
    rows = (
        (f"`{name}`", *(f"{number:,}" for number in numbers)) for name, *numbers in found.texts()
    )
    head = ("Characters of", "In all", "Median", "95 % at most", "Longest")
    text = f"\n## Contents of `{file.name}`\n\n{_table(head, rows)}\n"
    if found.policies:
        columns = found.columns()
        named = sorted(found.policies.items())
        rows = ((f"`{name}`", *(f"{c[column]:,}" for column in columns)) for name, c in named)
        text += f"\n{_table(('Policy', *(COLUMNS[c] for c in columns)), rows)}\n"
    if cleaned := [f"{n:,} ({share:.1%}) have {what}" for what, n, share in found.cleaned()]:
        text += f"\nOf its texts {'; '.join(cleaned)}.\n"
    if found.discards:
        rows = ((why, f"{count:,}") for why, count in found.discards.items())
        text += f"\nNot in it:\n\n{_table(('What', 'How many'), rows)}\n"
    for name, shows in file.plots.items():
        text += f"\n![{shows}](<{name}>)\n"
    return text


def size_category(records: int) -> str:
    """The Hub's tag for a number of records."""
    return next((tag for bound, tag in _SIZES + _LARGE if records < bound), "n>1B")


def last_metrics(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of every number in metrics.jsonl, those of the validation first."""
    last: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for inner, number in entries:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    last[f"{key}/{inner}" if inner else key] = number
    return dict(sorted(last.items(), key=lambda item: not _VALIDATION.match(item[0])))


def _base(manifest: Mapping[str, Any] | None) -> str | None:
    config = (manifest or {}).get("config") or {}
    keys = ("policy", "init", "model") if (manifest or {}).get("stage") == "rft" else ("model",)
    found = next((config[key] for key in (*keys, "init", "base") if config.get(key)), None)
    return found if isinstance(found, str) else None


def _limits(polar: Mapping[str, Any]) -> str:
    if not {"max_length", "max_response_length"} <= polar.keys():
        return ""
    kept = "last" if polar.get("cut_side") == "left" else "first"
    return (
        f"\n\nIt was trained on up to {polar['max_length']} tokens in all and "
        f"{polar['max_response_length']} of each answer. A longer answer keeps its {kept} tokens, "
        "a longer prompt its last."
    )


def _fields(kind: str, files: Sequence[DataFile]) -> str:
    known = json_schema(kind)["properties"]
    names = dict.fromkeys(name for file in files if file.kind == kind for name in file.fields)
    rows = (
        (f"`{name}`", known.get(name, {}).get("description", "Passed through from the source."))
        for name in names
    )
    about = " ".join((KINDS[kind].__doc__ or "").partition("\n")[0].split())
    return f"`{kind}`: {about}\n\n" + _table(("Field", "Meaning"), rows)


def _provenance(manifests: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    parts = [_one_provenance(name, manifest) for name, manifest in manifests.items()]
    if metrics:
        rows = ((f"`{key}`", f"{value:.6g}") for key, value in metrics.items())
        parts.append("## Last logged values\n\n" + _table(("Metric", "Value"), rows))
    return "".join(f"\n{part}\n" for part in parts)


def _one_provenance(name: str, manifest: Mapping[str, Any]) -> str:
    rows = [("Made by", f"`polarctl {manifest.get('stage')}` {manifest.get('version')}")]
    for entry in manifest.get("inputs") or []:
        facts = [f"{entry[k]:,} {k}" for k in ("records", "bytes") if entry.get(k) is not None]
        facts += [f"sha256 `{entry['sha256']}`"] if entry.get("sha256") else []
        path = str(entry.get("path", "-"))
        rows.append(("Read", ", ".join([f"`{path}`" if path != "-" else "a pipe", *facts])))
    counts = manifest.get("counts") or {}
    rows += [(f"Count: {k}", _value(v)) for k, v in counts.items() if k != "policies"]
    environment = manifest.get("environment") or {}
    rows += [(key, _value(value)) for key, value in environment.items()]
    text = f"## Provenance{f' of `{name}`' if name else ''}\n\n" + _table(("What", "Value"), rows)
    options = {
        key: value
        for key, value in (manifest.get("config") or {}).items()
        if key not in BOOKKEEPING and value is not None
    }
    if options:
        cells = ((f"`{key}`", _value(value)) for key, value in options.items())
        text += "\n\nOptions:\n\n" + _table(("Option", "Value"), cells)
    choices = manifest.get("choices") or {}
    if choices:
        picked = ((k, _value(c.get("value")), c.get("reason", "")) for k, c in choices.items())
        text += "\n\nAutomatic choices:\n\n" + _table(("What", "Choice", "Reason"), picked)
    return text


def _value(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        flat = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(flat)} |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _front(values: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in values.items() if value}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _fill(template: str, /, **values: str) -> str:
    text = resources.files("polarctl.hub").joinpath("templates", template).read_text("utf-8")
    return Template(text).substitute(values).rstrip() + f"\n\n{MARK}\n"
