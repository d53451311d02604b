"""The policy pool: which models write the trajectories, and how each is sampled."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polarctl.config import yaml_of
from polarctl.errors import MissingError, RecordError, UsageError
from polarctl.records import PoolPolicy, Record, check
from polarctl.storage import manifest
from polarctl.storage.read import Reader, expand

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")
_PATTERN = re.compile(r"[*?[]")
_SHOWS = "`polarctl schema pool` shows what a line holds"
_COLDEST_VLLM = 0.01  # below it vLLM samples at 0.01


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Logits are divided by it; > 0.
        top_p: Share of the probability that is kept, most likely tokens first; in (0, 1].
        top_k: Number of most likely tokens kept; 0 for all.
        max_new_tokens: Length limit in tokens.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    max_new_tokens: int = 4096


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One policy of a pool.

    Attributes:
        name: Unique name, written to trajectories.
        model: Folder or Hub id of a causal language model, or its name on a server.
        kind: `base`, `chat`, or None: told from the tokenizer.
        sampling: How its tokens are drawn.
        samples: Samples per prompt.
        where: Where the policy is named (`pool.jsonl:3`), for messages.
        backend: `transformers`, `vllm` or `openai`: what runs it.
        url: Address of the server; None for other backends.
        engine: Arguments of vLLM's engine, or further fields of each request to a server.
        revision: Commit, tag or branch of a Hub id, or None.
        dtype: Precision of computing, or None for the run's.
        group: Name that trajectories carry, or None.
        weight: Share of the prompts that it answers, in (0, 1].
    """

    name: str
    model: str
    kind: str | None = None
    sampling: Sampling = Sampling()
    samples: int = 2
    where: str = "--model"
    backend: str = "transformers"
    url: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict, hash=False)
    revision: str | None = None
    dtype: str | None = None
    group: str | None = None
    weight: float = 1.0

    def identity(self) -> list[Any]:
        """What decides this policy's texts: its name, its weights, how it is sampled.

        A server is told from another by the names that it lists and not by its address, which may
        change at a resume.
        """
        how = self.sampling
        served = self.backend == "openai"
        more = {
            name: value
            for name in ("backend", "engine", "revision", "dtype", "group")
            if (value := getattr(self, name)) and value != "transformers"
        }
        if self.weight < 1:
            more["weight"] = self.weight
        return [
            self.name,
            self.model if served else manifest.folder_identity(self.model),
            self.kind,
            [how.temperature, how.top_p, how.top_k, how.max_new_tokens],
            self.samples,
            *([more] if more else []),
        ]

    def facts(self) -> dict[str, Any]:
        """What is the same for all of its texts, for the manifest."""
        named = {name: getattr(self, name) for name in ("model", "backend", "revision", "group")}
        if self.weight < 1:
            named["weight"] = self.weight
        found = {**named, "engine": dict(self.engine), **dataclasses.asdict(self.sampling)}
        return {name: value for name, value in found.items() if value not in (None, {})}


def read_pool(path: str, default: Policy, given: Collection[str] = ()) -> list[Policy]:
    """The policies of a pool file, in its order.

    Args:
        path: JSONL file of `pool` records, or a YAML list of them (`.yaml`, `.yml`).
        default: Gives what a line leaves out.
        given: Names of options that the user has set, for lines that leave them out.

    Raises:
        UsageError: Unreadable, empty, a bad line, two policies of one name, or an option of
            `given` that every line sets itself.
        MissingError: A model's folder is not there.
    """
    if path == "-":
        raise UsageError("`--pool -`: the pool must be a file, standard input carries the prompts")
    try:
        records = [
            record
            for file in expand([path])
            for record in (
                _yaml_rows(file)
                if file.lower().endswith((".yaml", ".yml"))
                else Reader([file], "pool")
            )
        ]
    except RecordError as error:
        raise UsageError(str(error), hint=_SHOWS) from None
    for name in (*_SAMPLING, "samples", "dtype"):
        if name in given and all(name in record for record in records):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"`{flag}` has no effect here: every line of {path} has its own",
                hint="leave it out",
            )
    policies: dict[str, Policy] = {}
    for record in records:
        for policy in _policies(record, default, Path(path).parent):
            if policy.name in policies:
                raise UsageError(
                    f"{policy.where}: policy `{policy.name}` is named twice, "
                    f"first at {policies[policy.name].where}",
                    hint="give every line its own `policy`",
                )
            policies[policy.name] = policy
    return list(policies.values())


def _yaml_rows(path: str) -> Iterator[Record]:
    """The entries of a YAML list, each with its line."""
    import yaml

    rows = yaml_of(path)
    if not isinstance(rows, list) or not rows:
        raise RecordError("must be a list of policies", where=path)
    with open(path, encoding="utf-8-sig") as stream:
        entries: Any = yaml.compose(stream, yaml.SafeLoader)
    for row, entry in zip(rows, entries.value, strict=True):
        where = f"{path}:{entry.start_mark.line + 1}"
        if not isinstance(row, dict):
            raise RecordError("an entry that is no mapping", where=where)
        try:
            check(row, PoolPolicy)
        except RecordError as error:
            raise RecordError(error.reason, where=where, hint=_SHOWS) from None
        yield Record(row, where)


def _policies(record: Record, default: Policy, folder: Path) -> Iterator[Policy]:
    """The policy of a line; of a pattern one for each folder."""
    where = record.where or "pool"
    given = {key: record[key] for key in _SAMPLING if key in record}
    names = ("kind", "backend", "url", "revision", "dtype", "group", "samples", "weight")
    policy = replace(
        default,
        name=record["policy"],
        model=record["model"],
        sampling=replace(default.sampling, **given),
        engine=record.get("engine", {}),
        where=where,
        **{name: record[name] for name in names if name in record},
    )
    _check(policy)
    if policy.backend == "openai":
        yield policy
    elif _PATTERN.search(policy.model):
        for found in _matches(policy.model, where, folder):
            yield replace(policy, name=f"{policy.name}-{found.name}", model=str(found))
    else:
        model = find_model(policy.model, where, folder)
        if policy.revision is not None and Path(model).is_dir():
            raise UsageError(f"{where}: `revision` is of a Hub id, and {model} is a folder")
        yield replace(policy, model=model)


def _check(policy: Policy) -> None:
    """Raise UsageError for fields that do not go together."""
    where, served = policy.where, policy.backend == "openai"
    if served and not policy.url:
        raise UsageError(
            f"{where}: backend `openai` needs a `url`", hint='"url": "http://127.0.0.1:8000"'
        )
    if served and policy.kind is None:
        raise UsageError(
            f"{where}: backend `openai` needs a `kind`, `base` or `chat`",
            hint="base: /v1/completions, chat: /v1/chat/completions",
        )
    useless = {
        "url": policy.url and not served,
        "engine": policy.engine and policy.backend == "transformers",
        "revision": policy.revision and served,
        "dtype": policy.dtype and served,
    }
    for name in (name for name, wrong in useless.items() if wrong):
        raise UsageError(f"{where}: `{name}` has no effect with backend `{policy.backend}`")
    for name in policy.engine:
        if name.endswith(("token", "key", "secret", "password")):
            raise UsageError(
                f"{where}: `engine` with `{name}`: a secret would be in the manifest",
                hint="in the environment, such as HF_TOKEN",
            )
    if policy.backend == "vllm" and policy.sampling.temperature < _COLDEST_VLLM:
        raise UsageError(
            f"{where}: vLLM samples at a temperature of {_COLDEST_VLLM} at least",
            hint="top_k 1 takes the likeliest token",
        )


def _matches(pattern: str, where: str, folder: Path) -> list[Path]:
    """The model folders of a pattern, numbers in their order, seen from here or from the pool."""
    import glob

    for place in (pattern, str(folder / pattern)):
        found = [Path(path) for path in glob.glob(place) if Path(path, "config.json").is_file()]
        if found:
            return sorted(found, key=lambda path: _in_numbers(str(path)))
    raise MissingError(
        f"{where}: {pattern}: matches no model folder", hint="a folder with config.json"
    )


def _in_numbers(text: str) -> list[tuple[int, str]]:
    """A sort key that has `step-9` before `step-10`."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def find_model(name: str, where: str, folder: Path | None = None) -> str:
    """A model folder, seen from here or from the pool file's folder, or else a Hub id.

    Raises:
        MissingError: Neither.
    """
    places = [Path(name)] if folder is None else [Path(name), folder / name]
    for place in places:
        if place.is_dir():
            return str(place)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise MissingError(
            f"{where}: {name}: no such model folder", hint="a folder with config.json, or a Hub id"
        )
    return name
