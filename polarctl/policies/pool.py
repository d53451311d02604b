"""The policy pool: which models write the trajectories, and how each is sampled."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polarctl.errors import MissingError, RecordError, UsageError
from polarctl.records import Record
from polarctl.storage import manifest
from polarctl.storage.read import Reader, expand

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")


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
        model: Folder or Hub id of a causal language model.
        kind: `base`, `chat`, or None: told from the tokenizer.
        sampling: How its tokens are drawn.
        samples: Samples per prompt.
        where: Where the policy is named (`pool.jsonl:3`), for messages.
    """

    name: str
    model: str
    kind: str | None = None
    sampling: Sampling = Sampling()
    samples: int = 2
    where: str = "--model"

    def identity(self) -> list[Any]:
        """What decides this policy's texts: its name, its weights, how it is sampled."""
        how = self.sampling
        return [
            self.name,
            manifest.folder_identity(self.model),
            self.kind,
            [how.temperature, how.top_p, how.top_k, how.max_new_tokens],
            self.samples,
        ]


def read_pool(path: str, default: Policy, given: Collection[str] = ()) -> list[Policy]:
    """The policies of a pool file, in its order.

    Args:
        path: JSONL file of `pool` records.
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
        records = list(Reader(expand([path]), "pool"))
    except RecordError as error:
        raise UsageError(
            str(error), hint="`polarctl schema pool` shows what a line holds"
        ) from None
    for name in (*_SAMPLING, "samples"):
        if name in given and all(name in record for record in records):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"`{flag}` has no effect here: every line of {path} has its own",
                hint="leave it out",
            )
    policies: dict[str, Policy] = {}
    for record in records:
        policy = _policy(record, default, Path(path).parent)
        if policy.name in policies:
            raise UsageError(
                f"{policy.where}: policy `{policy.name}` is named twice, "
                f"first at {policies[policy.name].where}",
                hint="give every line its own `policy`",
            )
        policies[policy.name] = policy
    return list(policies.values())


def _policy(record: Record, default: Policy, folder: Path) -> Policy:
    where = record.where or "pool"
    given = {key: record[key] for key in _SAMPLING if key in record}
    return replace(
        default,
        name=record["policy"],
        model=find_model(record["model"], where, folder),
        kind=record.get("kind"),
        sampling=replace(default.sampling, **given),
        samples=record.get("samples", default.samples),
        where=where,
    )


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
