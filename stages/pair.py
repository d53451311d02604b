r"""Pair trajectories into triples: two samples of one policy, one of another.

Reads trajectories. Writes triples (`prompt, reference, chosen, rejected, wrapper, policy,
rejected_policy`): the first policy's samples are `reference` and `chosen`, the other's is
`rejected`. Policies meet only within a prompt and a wrapper. With the same seed a prompt gets the
same triples whatever the order of the input.

\b
polarctl pair trajectories.jsonl -o train.jsonl --exclude-policies 'held-*'
polarctl pair trajectories.jsonl -o unseen.jsonl --require 'held-*'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polarctl.config import Common

if TYPE_CHECKING:
    from polarctl.policies.pairing import Pairing, PromptGroup
    from polarctl.storage.write import Output

READ_ROWS = 1024
# Prompts of a unit of work.
WINDOW_PROMPTS = 4096
SHOWN_POLICIES = 24


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl pair`."""

    triples_per_prompt: Annotated[
        int, typer.Option(min=1, help="Triples per prompt at most, of different policies first.")
    ] = 1
    negatives: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rejected texts of a triple at most; those after the first go to `negatives`.",
        ),
    ] = 1
    equal_chosen: Annotated[
        Literal["keep", "drop", "resample"],
        typer.Option(
            help="A triple whose chosen text is its reference: keep it, drop it, or draw other "
            "samples in its place."
        ),
    ] = "keep"
    policies: Annotated[
        tuple[str, ...], typer.Option(metavar="GLOB", help="Only these policies (repeatable).")
    ] = ()
    exclude_policies: Annotated[
        tuple[str, ...], typer.Option(metavar="GLOB", help="Not these policies (repeatable).")
    ] = ()
    require: Annotated[
        tuple[str, ...],
        typer.Option(metavar="GLOB", help="One of the two policies is such a one (repeatable)."),
    ] = ()


def pair(groups: Iterable[PromptGroup], pairing: Pairing) -> Iterator[dict[str, Any]]:
    """The triples of all groups, in their order. See `polarctl.policies.pairing`."""
    for group in groups:
        yield from pairing.triples(group)


def run(config: Config) -> None:
    """Read everything, then draw; what a resume has written already is drawn again, not written."""
    from polarctl import seeding
    from polarctl.config import shard_of
    from polarctl.policies.pairing import Groups, Pairing
    from polarctl.storage import read, windows
    from polarctl.storage.paths import check_paths
    from polarctl.storage.read import Reader
    from polarctl.storage.write import Output

    paths = windows.inputs_of("pair", config)
    if config.dry_run:
        windows.dry_run("pair", config, paths, "trajectory")
        return
    check_paths(config, paths)
    bad: list[tuple[str, str, Any]] = []
    groups = Groups(_chooser(config))
    # Not by shards: a prompt's trajectories lie apart, so prompts are dealt out, not rows.
    reader = Reader(
        paths,
        "trajectory",
        on_bad=(lambda *row: bad.append(row)) if config.rejects else None,
        limit=config.limit,
        verify=groups.add,
    )
    digest = [window.digest for window in reader.windows(READ_ROWS)][-1]
    _check_policies(config, groups.policies)
    pairing = Pairing(
        groups,
        per_prompt=config.triples_per_prompt,
        negatives=config.negatives,
        require=lambda name: _matches(name, config.require or ("*",)),
        equal_chosen=config.equal_chosen,
        seed=config.seed,
    )
    index, count = shard_of(config.shard) if config.shard else (0, 1)
    mine = [g for g in groups if seeding.derive(0, "shard", g.id) % count == index]
    with Output("pair", config, read.sizes(paths), {"trajectories": digest}) as out:
        if not out.complete:
            windows.set_aside(out, bad)
            _pair(mine, pairing, out)
            _report(pairing, out, config)


def _pair(groups: list[PromptGroup], pairing: Pairing, out: Output) -> None:
    from polarctl import console

    with console.progress("pair", len(groups), "prompts") as bar:
        for unit, start in enumerate(range(0, len(groups), WINDOW_PROMPTS), 1):
            window = groups[start : start + WINDOW_PROMPTS]
            for triple in pair(window, pairing):
                if unit > out.done:
                    out.write(triple)
            if unit > out.done:
                out.commit(unit)
            bar.update(start + len(window))


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _chooser(config: Config) -> Callable[[str], bool]:
    """Says which policies take part."""

    def keep(name: str) -> bool:
        return _matches(name, config.policies or ("*",)) and not _matches(
            name, config.exclude_policies
        )

    return keep


def _check_policies(config: Config, seen: set[str]) -> None:
    from polarctl.errors import UsageError

    names = ", ".join(f"`{name}`" for name in sorted(seen)[:8]) + (", ..." if len(seen) > 8 else "")
    for option in ("policies", "exclude_policies", "require"):
        for glob in getattr(config, option):
            if not any(fnmatchcase(name, glob) for name in seen):
                flag = option.replace("_", "-")
                raise UsageError(f"`--{flag} {glob}` fits no policy", hint=f"there are {names}")
    keep = _chooser(config)
    left = [name for name in sorted(seen) if keep(name)]
    if len(left) < 2:
        whose = f"by `{left[0]}`" if left else "left out" if seen else "bad"
        raise UsageError(
            f"every trajectory is {whose}: a triple needs two policies",
            hint="sample from a `--pool` of two policies or more, or widen --policies",
        )


def _report(pairing: Pairing, out: Output, config: Config) -> None:
    """Say what was paired, and what not and why.

    Raises:
        PolarctlError: Not a single triple.
    """
    from polarctl import console
    from polarctl.errors import PolarctlError

    counts = {name: pairing.counts[name] for name in sorted(pairing.counts)}
    out.counts.update(counts, policies=dict(sorted(pairing.roles.items())))
    prompts, triples = pairing.counts["prompts"], pairing.counts["triples"]
    without = [f"{n:,} {what}" for what, n in counts.items() if what.startswith("prompts ")]
    if not triples and not config.shard:
        raise PolarctlError(
            f"no triple could be made from {prompts:,} prompts: {'; '.join(without)}",
            hint="a prompt needs two samples of one policy and one of another",
        )
    console.note(
        f"pair: {triples:,} triples from {prompts:,} prompts"
        + (f"; none for {'; '.join(without)}" if without else "")
    )
    equal = pairing.counts["chosen equal to the reference"]
    if equal:
        done = {"keep": "kept", "drop": "dropped", "resample": "drawn again"}[config.equal_chosen]
        draws = pairing.counts["draws"]
        console.note(
            f"pair: in {equal:,} of {draws:,} draws ({equal / draws:.0%}) the chosen text is the "
            f"reference: {done} (--equal-chosen {config.equal_chosen})"
        )
    passed = pairing.counts["identical texts passed over"]
    if passed:
        console.note(f"pair: {passed:,} combinations passed over for identical texts")
    say = console.note if len(pairing.roles) <= SHOWN_POLICIES else console.detail
    for name, roles in sorted(pairing.roles.items()):
        say(f"  {name}: {roles['reference']:,} as reference, {roles['rejected']:,} as rejected")
    if pairing.roles and len(pairing.roles) > SHOWN_POLICIES:
        uses = sorted(sum(roles.values()) for roles in pairing.roles.values())
        console.note(
            f"pair: {len(uses)} policies, {uses[0]:,} to {uses[-1]:,} triples each "
            "(--verbose lists them)"
        )
