r"""Let the policies of a pool write trajectories for every prompt.

Reads prompts (`prompt`, or corpus text with `--prefix-tokens`). Writes trajectories: `prompt,
output, policy, sample, wrapper, ...`, policy by policy, with the prompt's other fields. A base
policy continues the text as it is (wrapper `pretrain`), a chat policy answers through its chat
template (wrapper `sft`); a prompt that has a `wrapper` goes only to policies of that kind.

\b
polarctl sample prompts.jsonl --pool pool.jsonl | polarctl pair - -o triples.jsonl
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from polarctl.config import Common, Device, Dtype, Needs, Ray, RayResource, ServerDeadline

if TYPE_CHECKING:
    from polarctl.policies.backends import Running
    from polarctl.policies.continuation import PolicyWriter
    from polarctl.policies.filters import Filters
    from polarctl.policies.pool import Policy
    from polarctl.policies.prompts import Prompts
    from polarctl.policies.status import Status
    from polarctl.records import Record
    from polarctl.storage.write import Output

_PER_S = 1000  # tokens a second, at which a plan says how long: its reader knows the machine's
# Prompts of a unit of work: what a crash can cost, and the most that one batch is made from.
WINDOW_ROWS = 256
SHOWN_POLICIES = 24


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl sample`."""

    NEUTRAL: ClassVar[frozenset[str]] = frozenset(
        {"concurrency", "server_deadline", "gpus", "ray", "ray_resource"}
    )
    NEEDS = [
        Needs("concurrency server_deadline", lambda c: c.pool is not None, "servers of a --pool"),
        Needs("ray_resource", lambda c: c.ray is not None, "--ray"),
        Needs("policy", lambda c: c.pool is None, "--model; a pool names its own policies"),
        Needs("tokenizer", lambda c: c.prefix_tokens is not None, "--prefix-tokens"),
    ]

    pool: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Policies, JSONL or YAML (`polarctl schema pool`)."),
    ] = None
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A single policy: a folder or a Hub id.")
    ] = None
    policy: Annotated[
        str | None, typer.Option(help="Name of the single policy. Default: the folder's name.")
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="Samples per prompt and policy.")] = 2
    temperature: Annotated[float, typer.Option(min=1e-6, help="Sampling temperature.")] = 1.0
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Share of the probability that is kept.")
    ] = 0.9
    top_k: Annotated[
        int, typer.Option(min=0, help="Most likely tokens that are kept; 0 for all.")
    ] = 50
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit in tokens; the context may end it earlier.")
    ] = 4096
    prefix_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut each text to its first n tokens, n random from 1 to this (paper: 1024).",
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer that counts `--prefix-tokens`. Default: the first policy's."),
    ] = None
    text_field: Annotated[str, typer.Option(help="Field that holds the prompt.")] = "prompt"
    clean: Annotated[
        bool, typer.Option(help="Cut repetition loops and endings cut by the length limit.")
    ] = True
    drop_shorter: Annotated[
        int, typer.Option(min=0, help="Leave out texts that have fewer tokens when cleaned.")
    ] = 0
    drop_longer: Annotated[
        int | None, typer.Option(min=1, help="Leave out texts that have more tokens when cleaned.")
    ] = None
    language: Annotated[
        tuple[str, ...],
        typer.Option(
            "--language", metavar="CODE", help="Leave out texts in others (`en`); repeatable."
        ),
    ] = ()
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences computed together; 256 prompts' at most.")
    ] = 64
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests to a policy's server under way at most.")
    ] = 16
    server_deadline: ServerDeadline = 300.0
    device: Device = "auto"
    dtype: Dtype = "auto"
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes, one for each GPU, each with a policy loaded. With --ray: workers, by "
            "default as many as the cluster has room for.",
        ),
    ] = 1
    ray: Ray = None
    ray_resource: RayResource = ()


def filters_of(config: Config) -> Filters:
    """Which texts are left out."""
    from polarctl.policies import filters

    return filters.Filters(config.drop_shorter, config.drop_longer, config.language)


def policies_of(config: Config) -> list[Policy]:
    """The policies that `--pool`, or `--model` and `--policy`, name.

    Raises:
        UsageError: Neither or both; a pool that does not hold.
        MissingError: A model's folder is not there.
    """
    from polarctl.errors import UsageError
    from polarctl.policies.pool import Policy, Sampling, find_model, read_pool

    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
    )
    default = Policy(name="", model="", sampling=sampling, samples=config.samples)
    if (config.pool is None) == (config.model is None):
        raise UsageError("pass either `--pool FILE` or `--model DIR`")
    if config.pool is not None:
        policies = read_pool(config.pool, default, given=config.given)
        _check_needed(config, {policy.backend for policy in policies})
        return policies
    assert config.model is not None
    model = find_model(config.model, "--model")
    name = config.policy or os.path.basename(os.path.abspath(model))
    return [replace(default, name=name, model=model)]


def _check_needed(config: Config, backends: set[str]) -> None:
    """Raise UsageError for an option that no policy of the pool uses."""
    from polarctl.errors import UsageError

    users = {
        **dict.fromkeys(("concurrency", "server_deadline"), {"openai"}),
        **dict.fromkeys(("device", "dtype"), {"transformers", "vllm"}),
        "batch_size": {"transformers"},
    }
    for name, users_of in users.items():
        if name in config.given and not users_of & backends:
            raise UsageError(
                f"`--{name.replace('_', '-')}` has no effect here: no policy of {config.pool} has "
                f"the backend {' or '.join(sorted(users_of))}",
                hint="leave it out",
            )


def run(config: Config) -> None:
    """Sample every prompt from every policy, one policy loaded at a time."""
    from polarctl.parallel import ray_pool
    from polarctl.policies.prompts import Prompts, prompt_in
    from polarctl.storage import manifest, read, replace, windows
    from polarctl.storage.paths import check_paths
    from polarctl.storage.write import Output

    paths = windows.inputs_of("sample", config)
    ray_pool.placement_of(config)  # refused before anything is read
    filters_of(config).check()
    policies = policies_of(config)
    verify = prompt_in(config.text_field)
    if config.dry_run:
        _plan(config, paths, policies, verify)
        return
    bad: list[tuple[str, str, Any]] = []
    reader = windows.reader_of(
        config, paths, None, on_bad=lambda *row: bad.append(row), verify=verify
    )
    check_paths(config, [*paths, *([config.pool] if config.pool else [])])
    here = [policy for policy in policies if policy.backend != "openai"]
    replace.check_unused(config.output, {}, [policy.model for policy in here])
    prompts = Prompts()
    prompts.read(reader, WINDOW_ROWS)
    identity = {
        # These may differ at a resume: contents count, not paths, and batches change no text.
        **dict.fromkeys(("pool", "model", "batch_size", "device")),
        "prompts": prompts.digest,
        "policies": [policy.identity() for policy in policies],
        "tokenizer": config.tokenizer and manifest.folder_identity(config.tokenizer),
    }
    with Output("sample", config, read.sizes(paths), identity) as out:
        if not out.complete:
            windows.set_aside(out, bad)
            _sample(config, policies, prompts, out)


def _plan(
    config: Config, paths: list[str], policies: list[Policy], verify: Callable[[Record], None]
) -> None:
    """Check input and policies without reading weights, and say how much there is to do."""
    from polarctl import console
    from polarctl.policies import backends, shares
    from polarctl.storage import windows

    how = _running(config, policies)
    asked: Counter[str] = Counter()
    seen: list[backends.Seen] = []

    def count(record: Record) -> None:
        verify(record)
        asked[record.get("wrapper", "any")] += 1

    def look() -> None:
        seen.extend(backends.look_at(policy, how) for policy in policies)

    windows.dry_run("sample", config, paths, None, verify=count, check=look, policies=len(policies))
    samples = tokens = 0
    for policy, found in zip(policies, seen, strict=True):
        prompts = round((asked["any"] + asked[found.wrapper]) * policy.weight)
        most = policy.sampling.max_new_tokens
        mine = prompts * policy.samples
        samples += mine
        tokens += mine * (most if found.context is None else min(most, found.context))
        some = "" if policy.weight == 1 else f"weight {policy.weight:g}, about "
        console.note(f"  {policy.name}: {found.text}; {some}{prompts:,} prompts x {policy.samples}")
    wrappers = {policy.name: found.wrapper for policy, found in zip(policies, seen, strict=True)}
    for line in shares.in_words(shares.by_kind(policies, lambda policy: wrappers[policy.name])):
        console.note(f"  {line}")
    passes = len(policies)
    console.note(
        f"sample: {passes:,} passes, {samples:,} samples, {tokens:,} new tokens at most: "
        f"{console.duration(tokens / _PER_S)} at {_PER_S:,} tokens/s",
        passes=passes,
        samples=samples,
        tokens=tokens,
    )


def _running(config: Config, policies: list[Policy]) -> Running:
    """Device and precision, chosen and said where a policy runs on this machine."""
    from polarctl.policies.backends import Running

    how = Running(
        batch_size=config.batch_size,
        concurrency=config.concurrency,
        deadline_s=config.server_deadline,
    )
    if all(policy.backend == "openai" for policy in policies):
        return how
    from polarctl.model import devices

    devices.quiet_libraries()
    device = devices.device_of(config.device)
    dtype = str(devices.dtype_of(config.dtype, device)).removeprefix("torch.")
    return replace(how, device=device, dtype=dtype)


def _cut(config: Config, policies: list[Policy], prompts: Prompts) -> None:
    """`--prefix-tokens`."""
    from functools import partial

    from polarctl.errors import UsageError

    first = next((policy for policy in policies if policy.backend != "openai"), None)
    if config.tokenizer is None and first is None:
        raise UsageError(
            "`--prefix-tokens`: a server's policy has no tokenizer here", hint="pass --tokenizer"
        )
    from polarctl.policies.prompts import cut_to_prefixes
    from polarctl.policies.writer import tokenizer_of

    named = (config.tokenizer,) if config.tokenizer or not first else (first.model, first.revision)
    tokenizer = tokenizer_of(*named)
    if not tokenizer.is_fast:
        raise UsageError(
            "`--prefix-tokens`: the first policy's tokenizer does not tell where tokens end",
            hint="pass --tokenizer with a fast tokenizer (tokenizer.json)",
        )
    prompts.change(
        partial(
            cut_to_prefixes,
            tokenizer=tokenizer,
            max_tokens=config.prefix_tokens or 0,
            seed=config.seed,
        )
    )


def _sample(config: Config, policies: list[Policy], prompts: Prompts, out: Output) -> None:
    """The loop: a unit of work is one policy with one window of prompts."""
    from contextlib import closing
    from functools import partial
    from itertools import pairwise

    from polarctl import console
    from polarctl.evaluation.page import Table, terminal_table
    from polarctl.policies import backends, status, trajectories, workers
    from polarctl.policies.read_ahead import ReadAhead
    from polarctl.policies.shares import Shares

    if config.prefix_tokens is not None:
        _cut(config, policies, prompts)
    prompts.identify()
    out.counts["repeated"] = prompts.repeated
    tallies: dict[str, dict[str, int]] = out.counts.setdefault("policies", {})
    facts: dict[str, dict[str, Any]] = out.counts.setdefault("writers", {})
    shares = Shares(prompts, policies, backends.wrapper_of, rows=WINDOW_ROWS, seed=config.seed)
    course = status.Status([(policy, shares.total(policy)) for policy in policies], tallies)
    todo: list[tuple[Policy, range]] = []
    done = out.done
    for policy in policies:
        units = shares.units(policy)
        begun = min(done, units)
        done -= begun
        course.skip(policy, shares.asked(policy, begun))
        if begun < units:
            todo.append((policy, range(begun, units)))
    left = [policy for policy, _ in todo]
    backends.check_writers(left, shares.of, strict=not config.rejects)

    def jobs() -> Iterator[tuple[Policy, list[Record]]]:
        for policy, units in todo:
            for number in units:
                asked = shares.unit(policy, number)
                course.begin(policy, len(asked))
                yield policy, asked

    work = workers.UnitWork(
        partial(_open, config=config),
        partial(
            trajectories.unit_of,
            seed=config.seed,
            clean=config.clean,
            filters=filters_of(config),
        ),
    )
    owners = (policy for policy, units in todo for _ in units)
    following = {} if config.ray else {p.name: after for p, after in pairwise(left)}
    made = workers.units(config, jobs(), work)
    with (
        closing(made),
        ReadAhead() as ahead,
        console.progress(
            "sample",
            course.total,
            "samples",
            above=lambda: (rows := course.running()) and terminal_table(Table(status.HEAD, rows)),
        ) as bar,
    ):
        for policy, unit in zip(owners, made, strict=True):
            if policy.name in following:  # it is loaded: the disk is free for the next one
                ahead.begin(following.pop(policy.name))
            _same(facts.get(policy.name), unit.facts, policy)
            facts[policy.name] = unit.facts
            tally = tallies.setdefault(policy.name, dict.fromkeys(trajectories.OUTCOMES, 0))
            trajectories.take(unit, out, tally, rejects=config.rejects is not None)
            out.commit(out.units + 1)
            course.end(policy, unit.prompts, sum(record["num_tokens"] for record in unit.records))
            bar.update(course.done, course.line())
    _report(config, out.counts, course)


def _open(policy: Policy, config: Config) -> PolicyWriter:
    """A policy's writer, in the process that is going to write."""
    from polarctl.policies import backends

    return backends.open_writer(policy, _running(config, [policy]))


def _same(before: dict[str, Any] | None, now: dict[str, Any], policy: Policy) -> None:
    """Raise UsageError when a server serves another model than before an interruption."""
    from polarctl.errors import UsageError
    from polarctl.parallel import served

    name = before and served.unlike(before, now)
    if before and name:
        raise UsageError(
            f"cannot resume: the server of policy `{policy.name}` serves another model: `{name}` "
            f"was {before.get(name)!r} and is now {now.get(name)!r}",
            hint="serve the first one, or pass --force to start again",
        )


def _report(config: Config, counts: dict[str, Any], course: Status) -> None:
    """Say what was written, what was left out and what was cleaned."""
    from polarctl import console
    from polarctl.evaluation.page import Table, terminal_table
    from polarctl.policies import filters, trajectories

    if counts["repeated"]:
        console.warn(f"{counts['repeated']:,} repeated prompts were sampled once")
    tallies = counts["policies"]
    counts["empty"] = sum(tally["empty"] for tally in tallies.values())
    if counts["empty"]:
        console.warn(f"{counts['empty']:,} samples without text were left out")
    for name, tally in tallies.items():
        if not tally["records"]:
            outcomes = [w for w in (*trajectories.OUTCOMES, *filters.REASONS) if tally.get(w)]
            why = ", ".join(f"{what}: {tally[what]:,}" for what in outcomes)
            console.warn(f"policy `{name}` wrote no text at all ({why or 'no prompts'})")
    if idle := course.idle():
        more = f" and {len(idle) - 4} more" if len(idle) > 4 else ""
        console.warn(f"no prompt of the input was for {', '.join(idle[:4])}{more}")
    texts, tokens = (
        sum(tally.get(what, 0) for tally in tallies.values()) for what in ("records", "tokens")
    )
    console.note(
        f"sample: {texts:,} texts by {len(tallies):,} policies, {tokens:,} tokens",
        policies=tallies,
    )
    rows = course.rows()
    if len(rows) <= SHOWN_POLICIES or config.verbose:
        console.show(terminal_table(Table(course.head(), rows)))
