r"""Pair trajectories into triples: two samples of one policy, one of another.

Reads trajectories. Writes triples (`prompt, reference, chosen, rejected, wrapper, policy,
rejected_policy`): the first policy's samples are `reference` and `chosen`, the other's is
`rejected`. Policies meet only within a prompt and a wrapper. With the same seed a prompt gets the
same triples whatever the order of the input.

With --from-rollouts it reads the `rollouts.jsonl` of `rft` and makes labels for `finetune` out of
what the policy did right and wrong. --label-by names what decides: a number of the rollouts (a
field such as `check`, or one of their `components`) or a verifier of `rft` such as `exact:accept`.
`--rule threshold`: a rollout is right from --threshold on; chosen is a right rollout in other words
than the reference, else another text of the prompt's `accept`, else the reference. `--rule rank`:
the highest rollout of a prompt and step over the lowest.

\b
polarctl pair trajectories.jsonl -o train.jsonl --exclude-policies 'held-*'
polarctl pair trajectories.jsonl -o unseen.jsonl --require 'held-*'
polarctl pair trajectories.jsonl -o val.jsonl --split test --test-share 0.02
polarctl pair 'trajectories-*.jsonl.zst' -o train.jsonl.zst --ray auto
polarctl pair runs/better/rollouts.jsonl --from-rollouts --label-by check -o labels.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from polarctl.config import Common, Needs, Ray, TestShare

if TYPE_CHECKING:
    from polarctl.policies.by_prompt import Groups
    from polarctl.policies.labelling import Labelling, Rollouts
    from polarctl.policies.nearness import Distance
    from polarctl.policies.pairing import Pairing
    from polarctl.records import Record
    from polarctl.storage.write import Output

# Prompts of a unit of work.
WINDOW_PROMPTS = 4096
SHOWN_POLICIES = 24


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl pair`."""

    NEUTRAL: ClassVar[frozenset[str]] = frozenset({"ray"})
    NEEDS = [
        Needs(
            "policies exclude_policies require max_similarity hard_by ray",
            lambda c: not c.from_rollouts,
            "samples of several policies, not for --from-rollouts",
        ),
        Needs("test_share", lambda c: c.split is not None, "--split"),
        Needs("label_by rule", lambda c: c.from_rollouts, "--from-rollouts"),
        Needs(
            "threshold",
            lambda c: c.from_rollouts and c.rule == "threshold",
            "--from-rollouts with `--rule threshold`",
        ),
        Needs(
            "min_gap",
            lambda c: c.from_rollouts and c.rule == "rank",
            "--from-rollouts with `--rule rank`",
        ),
        Needs(
            "equal_chosen",
            lambda c: not c.from_rollouts or c.rule == "threshold",
            "samples, and for `--rule threshold`",
        ),
    ]

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
    split: Annotated[
        Literal["train", "test"] | None,
        typer.Option(help="Keep this part of the prompts, the same as of `convert --split`."),
    ] = None
    test_share: TestShare = 0.2
    max_similarity: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Pass over a rejected text that shares more of its pairs of words with the "
            "reference or the chosen text; 1: only an equal one.",
        ),
    ] = 1.0
    hard_by: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prefer rejected policies near the reference's: by the rewards of these scored "
            "triples, or by `names` that begin alike.",
        ),
    ] = None
    from_rollouts: Annotated[
        bool, typer.Option("--from-rollouts", help="Read rollouts of `rft`, and label them.")
    ] = False
    label_by: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What decides: a number of a rollout (a field, or one of its `components`), or a "
            "verifier of `rft --reward`. Default: check; with `--rule rank`, reward.",
        ),
    ] = None
    rule: Annotated[
        Literal["threshold", "rank"],
        typer.Option(help="Right over wrong, or the highest over the lowest of a group."),
    ] = "threshold"
    threshold: Annotated[float, typer.Option(help="The number from which a rollout is right.")] = (
        0.5
    )
    min_gap: Annotated[
        float, typer.Option(min=0, help="By how much the numbers of a ranked pair differ at least.")
    ] = 0.0
    ray: Ray = None


def pair(groups: Iterable[Any], pairing: Pairing | Labelling) -> Iterator[dict[str, Any]]:
    """The triples of all groups, in their order.

    Args:
        groups: Of `policies.by_prompt.Groups`, or of `policies.labelling.Rollouts`.
        pairing: What draws from such a group.
    """
    for group in groups:
        yield from pairing.triples(group)


def run(config: Config) -> None:
    """Read everything, then draw; what a resume has written already is drawn again, not written."""
    from polarctl.policies.nearness import Margins, distance_of
    from polarctl.storage import read, windows
    from polarctl.storage.paths import check_paths
    from polarctl.storage.write import Output

    with ExitStack() as held:
        groups = held.enter_context(_groups(config))
        paths = windows.inputs_of("pair", config)
        if config.dry_run:
            windows.dry_run(
                "pair",
                config,
                paths,
                "trajectory",
                verify=groups.add,
                check=lambda: _check(config, groups, distance_of(config.hard_by)[0]),
            )
            return
        distance, scores = distance_of(config.hard_by)
        check_paths(config, [*paths, *scores])
        bad: list[tuple[str, str, Any]] = []
        on_bad = (lambda *row: bad.append(row)) if config.rejects else None
        # Not by shards: a prompt's trajectories lie apart, so prompts are dealt out, not rows.
        digest = groups.read(paths, limit=config.limit, on_bad=on_bad)
        pairing = _drawer(config, groups, distance)
        identity: dict[str, Any] = {"trajectories": digest}
        if distance is not None:
            identity |= {"hard_by": distance.table() if isinstance(distance, Margins) else "names"}
        with Output("pair", config, read.sizes([*paths, *scores]), identity) as out:
            if not out.complete:
                windows.set_aside(out, bad)
                is_mine = partial(_is_mine, config)
                triples = (
                    groups.triples(pairing, is_mine)
                    if config.ray
                    else (pair([group], pairing) for group in groups if is_mine(group))
                )
                _write(triples, None if config.shard or config.split else len(groups), out)
                if config.from_rollouts:
                    _report_labels(pairing, out, config)
                else:
                    _report(pairing, out, config)


@contextmanager
def _groups(config: Config) -> Iterator[Any]:
    """What brings the trajectories of a prompt together."""
    from polarctl.parallel.ray_pool import check_address
    from polarctl.policies.by_prompt import Groups
    from polarctl.policies.labelling import Rollouts
    from polarctl.verifiers.named import is_verifier

    takes_part = partial(_takes_part, config)
    if config.ray:
        check_address(config.ray)
    if config.from_rollouts:
        if config.equal_chosen == "resample":
            raise _no_resample()
        name = _label_name(config)
        with _judging(name) if is_verifier(name) else nullcontext() as judge:
            yield Rollouts(name, judge=judge, by_step=config.rule == "rank")
    elif config.ray and not config.dry_run:
        from polarctl.policies.on_ray import RemoteGroups

        with RemoteGroups(config.ray, takes_part) as remote:
            yield remote
    else:
        yield Groups(takes_part)


def _check(config: Config, groups: Any, distance: Distance | None) -> None:
    """Whether there would be a triple; says what `--rejects` would take beside bad rows."""
    from polarctl import console
    from polarctl.storage.windows import BadRows

    bad = BadRows(console.warn)
    groups.finish(bad if config.rejects else None)
    bad.finish()
    if not config.shard:
        _drawer(config, groups, distance)


def _is_mine(config: Config, group: Any) -> bool:
    """Whether a prompt is in the parts that `--shard` and `--split` name."""
    from polarctl import seeding
    from polarctl.config import shard_of
    from polarctl.formats.groups import part_of

    index, count = shard_of(config.shard) if config.shard else (0, 1)
    if seeding.derive(0, "shard", group.id) % count != index:
        return False
    if config.split is None:
        return True
    return part_of({"prompt": group.prompt}, config.test_share, config.seed) == config.split


def _drawer(config: Config, groups: Any, distance: Distance | None) -> Any:
    """What draws triples.

    Raises:
        UsageError: The input has no triple for these options.
    """
    return (
        _labelling(config, groups) if config.from_rollouts else _pairing(config, groups, distance)
    )


def _pairing(config: Config, groups: Groups, distance: Distance | None) -> Pairing:
    from polarctl.errors import UsageError
    from polarctl.policies.nearness import Margins
    from polarctl.policies.pairing import Pairing

    _check_policies(config, groups.policies)
    if isinstance(distance, Margins):
        known = {name for pair, _ in distance.table() for name in pair}
        if not known & groups.policies:
            raise UsageError(
                f"`--hard-by {config.hard_by}` knows none of the policies of the trajectories",
                hint="score triples of the same policies, or pass `--hard-by names`",
            )
    return Pairing(
        groups,
        per_prompt=config.triples_per_prompt,
        negatives=config.negatives,
        require=partial(_matches, globs=config.require or ("*",)),
        equal_chosen=config.equal_chosen,
        max_similarity=config.max_similarity,
        distance=distance,
        seed=config.seed,
    )


def _labelling(config: Config, rollouts: Rollouts) -> Labelling:
    from polarctl.errors import UsageError
    from polarctl.policies.labelling import Labelling

    name = _label_name(config)
    if not rollouts.names[name] and rollouts.judge is None:
        there = ", ".join(f"`{one}`" for one in sorted(+rollouts.names))
        raise UsageError(
            f"no rollout has a number `{name}` (--label-by)",
            hint=f"there are {there}" if there else "`rft` writes numbers to its rollouts",
        )
    return Labelling(
        rule=config.rule,
        threshold=config.threshold,
        gap=config.min_gap,
        per_prompt=config.triples_per_prompt,
        negatives=config.negatives,
        keep_copies=config.equal_chosen == "keep",
        seed=config.seed,
    )


@contextmanager
def _judging(name: str) -> Iterator[Callable[[Record], float | None]]:
    """A verifier, as a function of a rollout."""
    from polarctl.model.template import content_text
    from polarctl.verifiers.named import open_verifier

    verifier = open_verifier(name)
    try:
        yield lambda record: verifier.values([record], [content_text(record["output"])])[0]
    finally:
        verifier.close()


def _label_name(config: Config) -> str:
    return config.label_by or {"threshold": "check", "rank": "reward"}[config.rule]


def _no_resample() -> Exception:
    from polarctl.errors import UsageError

    return UsageError(
        "`--equal-chosen resample` is for samples of policies",
        hint="keep or drop: of rollouts the reference is chosen only where there is nothing else",
    )


def _write(prompts: Iterable[Iterable[dict[str, Any]]], total: int | None, out: Output) -> None:
    """Write the triples of each prompt; those of units that a resume passes over are there."""
    from polarctl import console

    unit, seen = 1, 0
    with console.progress("pair", total, "prompts") as bar:
        for seen, triples in enumerate(prompts, 1):
            for triple in triples:
                if unit > out.done:
                    out.write(triple)
            if seen % WINDOW_PROMPTS == 0:
                if unit > out.done:
                    out.commit(unit)
                bar.update(seen)
                unit += 1
        if seen % WINDOW_PROMPTS and unit > out.done:
            out.commit(unit)
        bar.update(seen)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _takes_part(config: Config, name: str) -> bool:
    return _matches(name, config.policies or ("*",)) and not _matches(name, config.exclude_policies)


def _check_policies(config: Config, seen: set[str]) -> None:
    from polarctl.errors import UsageError

    names = ", ".join(f"`{name}`" for name in sorted(seen)[:8]) + (", ..." if len(seen) > 8 else "")
    for option in ("policies", "exclude_policies", "require"):
        for glob in getattr(config, option):
            if not any(fnmatchcase(name, glob) for name in seen):
                flag = option.replace("_", "-")
                raise UsageError(f"`--{flag} {glob}` fits no policy", hint=f"there are {names}")
    left = [name for name in sorted(seen) if _takes_part(config, name)]
    if len(left) < 2:
        whose = f"by `{left[0]}`" if left else "left out" if seen else "bad"
        raise UsageError(
            f"every trajectory is {whose}: a triple needs two policies",
            hint="sample from a `--pool` of two policies or more, or widen --policies",
        )


def _no_triple(config: Config, counts: Mapping[str, int], hint: str) -> str:
    """For how many prompts there is no triple, by reason.

    Raises:
        PolarctlError: There is none at all.
    """
    from polarctl.errors import PolarctlError

    without = [f"{n:,} {what}" for what, n in counts.items() if what.startswith("prompts ")]
    if config.split and not counts.get("prompts") and not config.shard:
        raise PolarctlError(
            f"no prompt is in the {config.split} part (--split)", hint="another --test-share"
        )
    if not counts.get("triples") and not config.shard:
        raise PolarctlError(
            f"no triple could be made from {counts.get('prompts', 0):,} prompts: "
            f"{'; '.join(without)}",
            hint=hint,
        )
    return f"; none for {'; '.join(without)}" if without else ""


def _report_labels(labelling: Labelling, out: Output, config: Config) -> None:
    """Say what was labelled, by what, and what the chosen texts are."""
    from polarctl import console

    counts = {name: n for name, n in sorted(labelling.counts.items()) if n}
    out.counts.update(counts)
    name = _label_name(config)
    wants = (
        f"a rollout with `{name}` below {config.threshold:g} (--threshold)"
        if config.rule == "threshold"
        else f"two rollouts of one step with different `{name}`"
    )
    without = _no_triple(config, counts, f"a prompt needs {wants}")
    console.note(
        f"pair: {labelling.counts['triples']:,} triples from {labelling.counts['rollouts']:,} "
        f"rollouts of {labelling.counts['prompts']:,} prompts, by `{name}`{without}"
    )
    for what, n in counts.items():
        if what.startswith(("chosen ", "rollouts without", "texts ")):
            console.note(f"  {n:,}: {what}" if "chosen" in what else f"  left out: {n:,} {what}")


def _report(pairing: Pairing, out: Output, config: Config) -> None:
    """Say what was paired, and what not and why.

    Raises:
        PolarctlError: Not a single triple.
    """
    from polarctl import console

    counts = {name: pairing.counts[name] for name in sorted(pairing.counts)}
    out.counts.update(counts, policies=dict(sorted(pairing.roles.items())))
    prompts, triples = pairing.counts["prompts"], pairing.counts["triples"]
    hint = "a prompt needs two samples of one policy and one of another"
    without = _no_triple(config, counts, hint)
    console.note(f"pair: {triples:,} triples from {prompts:,} prompts{without}")
    equal = pairing.counts["chosen equal to the reference"]
    if equal:
        done = {"keep": "kept", "drop": "dropped", "resample": "drawn again"}[config.equal_chosen]
        draws = pairing.counts["draws"]
        console.note(
            f"pair: in {equal:,} of {draws:,} draws ({equal / draws:.0%}) the chosen text is the "
            f"reference: {done} (--equal-chosen {config.equal_chosen})"
        )
    for why in ("identical", "similar"):
        passed = pairing.counts[f"{why} texts passed over"]
        if passed:
            console.note(f"pair: {passed:,} combinations passed over for {why} texts")
    say = console.note if len(pairing.roles) <= SHOWN_POLICIES else console.detail
    for name, roles in sorted(pairing.roles.items()):
        say(f"  {name}: {roles['reference']:,} as reference, {roles['rejected']:,} as rejected")
    if pairing.roles and len(pairing.roles) > SHOWN_POLICIES:
        uses = sorted(sum(roles.values()) for roles in pairing.roles.values())
        console.note(
            f"pair: {len(uses)} policies, {uses[0]:,} to {uses[-1]:,} triples each "
            "(--verbose lists them)"
        )
