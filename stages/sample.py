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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import typer

from polarctl.config import Common, Device, Dtype, Needs, Ray, RayResource

if TYPE_CHECKING:
    from polarctl.policies.pool import Policy
    from polarctl.policies.prompts import Prompts
    from polarctl.policies.writer import Continuation, Unfit, Writer
    from polarctl.records import Record
    from polarctl.storage.write import Output

# Prompts of a unit of work: what a crash can cost, and the most that one batch is made from.
WINDOW_ROWS = 256
# What becomes of a sample; counted for every policy. `unfit` and `other wrapper` count prompts.
OUTCOMES = ("records", "empty", "unfit", "other wrapper")


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl sample`."""

    NEUTRAL: ClassVar[frozenset[str]] = frozenset({"gpus", "ray", "ray_resource"})
    NEEDS = [
        Needs("ray_resource", lambda c: c.ray is not None, "--ray"),
        Needs("policy", lambda c: c.pool is None, "--model; a pool names its own policies"),
        Needs("tokenizer", lambda c: c.prefix_tokens is not None, "--prefix-tokens"),
    ]

    pool: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSONL of policies (`polarctl schema pool`).")
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
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences computed together; 256 prompts' at most.")
    ] = 64
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


class PolicyWriter(Protocol):
    """What `trajectories` needs of a policy; see `polarctl.policies.writer.Writer`."""

    policy: Policy
    wrapper: str

    def encode(self, prompts: Sequence[Any]) -> list[list[int] | Unfit]:
        """Token ids, or why there are none."""

    def write(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Continuation]:
        """Continuations of the prompts."""


def trajectories(
    prompts: Sequence[Record],
    writer: PolicyWriter,
    *,
    seed: int = 0,
    clean: bool = True,
    leave_out: Callable[[str, Record, str], None] = lambda outcome, prompt, reason: None,
) -> Iterator[dict[str, Any]]:
    """The trajectories of one policy: prompt by prompt, sample by sample.

    Args:
        prompts: Prompt records with their `id`.
        writer: The policy.
        seed: The run's seed; each sample's is made from it, policy, prompt id and sample index.
        clean: Apply `polarctl.policies.cleaning.clean`.
        leave_out: Called with `unfit` for a prompt that the policy cannot take, with `empty` for
            a sample without text; then with the prompt and the reason.
    """
    from polarctl import seeding
    from polarctl.policies import cleaning

    name, samples = writer.policy.name, writer.policy.samples
    jobs: list[tuple[Record, int, list[int]]] = []
    for prompt, ids in zip(prompts, writer.encode([p["prompt"] for p in prompts]), strict=True):
        if isinstance(ids, list):
            jobs.extend((prompt, sample, ids) for sample in range(samples))
        else:
            leave_out("unfit", prompt, ids.reason)
    seeds = [seeding.derive(seed, "sample", name, prompt["id"], s) for prompt, s, _ in jobs]
    written = writer.write([ids for *_, ids in jobs], seeds)
    for (prompt, sample, _), made in zip(jobs, written, strict=True):
        text, cleaned = cleaning.clean(made.text, made.finish_reason) if clean else (made.text, [])
        if not text.strip():
            leave_out("empty", prompt, f"policy `{name}` wrote no text (sample {sample})")
            continue
        record = {
            "id": prompt["id"],
            "prompt": prompt["prompt"],
            "output": text,
            "policy": name,
            "sample": sample,
            "wrapper": writer.wrapper,
            "finish_reason": made.finish_reason,
            "cleaned": cleaned,
            "num_tokens": made.num_tokens,
        }
        yield {**record, **{k: v for k, v in prompt.items() if k not in record}}


@dataclass
class Unit:
    """What one policy wrote for one window of prompts: a unit of work, done anywhere.

    Attributes:
        prompts: Prompts that were in the window.
        records: Trajectories.
        left_out: (outcome, place, reason, prompt) of each sample or prompt that gave none.
    """

    prompts: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)


def unit_of(prompts: Sequence[Record], writer: PolicyWriter, *, seed: int, clean: bool) -> Unit:
    """A unit of work: `trajectories` of a window, and what was left out of it.

    It depends on policy, prompts, seed and options alone; policy, prompts and the result can be
    pickled.
    """
    unit = Unit(prompts=len(prompts))

    def leave_out(outcome: str, prompt: Record, reason: str) -> None:
        unit.left_out.append((outcome, prompt.where or prompt["id"], reason, prompt))

    fitting = []
    for prompt in prompts:
        if prompt.get("wrapper", writer.wrapper) == writer.wrapper:
            fitting.append(prompt)
        else:
            leave_out("other wrapper", prompt, "")
    unit.records.extend(trajectories(fitting, writer, seed=seed, clean=clean, leave_out=leave_out))
    return unit


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
        return read_pool(config.pool, default, given=config.given)
    assert config.model is not None
    model = find_model(config.model, "--model")
    name = config.policy or os.path.basename(os.path.abspath(model))
    return [replace(default, name=name, model=model)]


def run(config: Config) -> None:
    """Sample every prompt from every policy, one policy loaded at a time."""
    from polarctl.parallel import ray_pool
    from polarctl.policies.prompts import Prompts, prompt_in
    from polarctl.storage import manifest, read, replace, windows
    from polarctl.storage.paths import check_paths
    from polarctl.storage.write import Output

    paths = windows.inputs_of("sample", config)
    ray_pool.placement_of(config)  # refused before anything is read
    policies = policies_of(config)
    verify = prompt_in(config.text_field)
    if config.dry_run:
        windows.dry_run("sample", config, paths, None, verify=verify, policies=len(policies))
        return
    bad: list[tuple[str, str, Any]] = []
    reader = windows.reader_of(
        config, paths, None, on_bad=lambda *row: bad.append(row), verify=verify
    )
    check_paths(config, [*paths, *([config.pool] if config.pool else [])])
    replace.check_unused(config.output, {}, [policy.model for policy in policies])
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
            _report(out.counts)


def _sample(config: Config, policies: list[Policy], prompts: Prompts, out: Output) -> None:
    """The loop: a unit of work is one policy with one window of prompts."""
    from contextlib import closing
    from functools import partial

    from polarctl import console
    from polarctl.errors import UsageError
    from polarctl.policies import workers
    from polarctl.policies.prompts import cut_to_prefixes
    from polarctl.policies.writer import check_writers, tokenizer_of

    if config.prefix_tokens is not None:
        tokenizer = tokenizer_of(config.tokenizer or policies[0].model)
        if not tokenizer.is_fast:
            raise UsageError(
                "`--prefix-tokens`: the first policy's tokenizer does not tell where tokens end",
                hint="pass --tokenizer with a fast tokenizer (tokenizer.json)",
            )
        prompts.windows = [
            list(cut_to_prefixes(window, tokenizer, config.prefix_tokens, config.seed))
            for window in prompts.windows
        ]
    prompts.identify()
    out.counts["repeated"] = prompts.repeated
    tallies: dict[str, dict[str, int]] = out.counts.setdefault("policies", {})

    units = len(prompts.windows)
    finished = out.done // units if units else len(policies)
    left = policies[finished:]
    check_writers(map(_look_at, left), prompts, strict=not config.rejects)
    done = len(prompts) * sum(policy.samples for policy in policies[:finished])
    total = len(prompts) * sum(policy.samples for policy in policies)
    begun = out.done - finished * units

    def jobs() -> Iterator[tuple[Policy, list[Record]]]:
        for number, policy in enumerate(left):
            for window in prompts.windows[0 if number else begun :]:
                yield policy, window

    work = partial(unit_of, seed=config.seed, clean=config.clean)
    made = workers.units(config, jobs(), workers.UnitWork(partial(_open, config=config), work))
    with closing(made), console.progress("sample", total, "samples") as bar:
        done += sum(len(prompts.windows[n]) * left[0].samples for n in range(begun))
        start, tokens = time.monotonic(), 0
        for (policy, _), unit in zip(jobs(), made, strict=True):
            tally = tallies.setdefault(policy.name, dict.fromkeys(OUTCOMES, 0))
            _take(unit, out, tally, rejects=config.rejects is not None)
            out.commit(out.units + 1)
            done += unit.prompts * policy.samples
            tokens += sum(record["num_tokens"] for record in unit.records)
            rate = tokens / max(time.monotonic() - start, 1e-9)  # of this run, loading included
            bar.update(done, f"{policy.name}, {rate:,.0f} tokens/s")


def _look_at(policy: Policy) -> Writer:
    """A policy's writer that is not going to write."""
    from polarctl.policies.writer import Writer

    return Writer(policy, device="cpu", dtype=None, batch_size=1)


def _open(policy: Policy, config: Config) -> Writer:
    """A policy's writer, in the process that is going to write."""
    from polarctl.model import devices
    from polarctl.policies.writer import Writer

    devices.quiet_libraries()
    device = devices.device_of(config.device)
    dtype = devices.dtype_of(config.dtype, device)
    return Writer(policy, device=device, dtype=dtype, batch_size=config.batch_size)


def _take(unit: Unit, out: Output, tally: dict[str, int], *, rejects: bool) -> None:
    """Write and count what a unit of work has given."""
    for outcome, where, reason, prompt in unit.left_out:
        if outcome == "unfit" or (outcome == "empty" and rejects):
            out.reject(where, reason, prompt)
        tally[outcome] += 1
    for record in unit.records:
        out.write(record)
    tally["records"] += len(unit.records)


def _report(counts: dict[str, Any]) -> None:
    """Say what was left out."""
    from polarctl import console

    if counts["repeated"]:
        console.warn(f"{counts['repeated']:,} repeated prompts were sampled once")
    tallies = counts["policies"]
    counts["empty"] = sum(tally["empty"] for tally in tallies.values())
    if counts["empty"]:
        console.warn(f"{counts['empty']:,} samples without text were left out")
    for name, tally in tallies.items():
        if not tally["records"]:
            why = ", ".join(f"{what}: {count:,}" for what, count in tally.items() if count)
            console.warn(f"policy `{name}` wrote no text at all ({why or 'no prompts'})")
