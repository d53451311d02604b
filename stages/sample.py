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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from polarctl.config import Common, Device, Dtype, Needs

if TYPE_CHECKING:
    from polarctl.policies.pool import Policy
    from polarctl.policies.prompts import Prompts
    from polarctl.policies.writer import Continuation, Unfit, Writer
    from polarctl.records import Record
    from polarctl.storage.write import Output

# Prompts of a unit of work: what a crash can cost, and the most that one batch is made from.
WINDOW_ROWS = 256
SHOWN_POLICIES = 24
# What becomes of a sample; counted for every policy. `unfit` and `other wrapper` count prompts.
OUTCOMES = ("records", "empty", "unfit", "other wrapper")


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl sample`."""

    NEEDS = [
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
    from polarctl.policies.prompts import Prompts, prompt_in
    from polarctl.storage import manifest, read, replace, windows
    from polarctl.storage.paths import check_paths
    from polarctl.storage.write import Output

    paths = windows.inputs_of("sample", config)
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
    from polarctl import console
    from polarctl.errors import UsageError
    from polarctl.model import devices
    from polarctl.policies.prompts import cut_to_prefixes
    from polarctl.policies.writer import Writer, check_writers, tokenizer_of

    devices.quiet_libraries()
    device = devices.device_of(config.device)
    dtype = devices.dtype_of(config.dtype, device)
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

    def writer_of(policy: Policy) -> Writer:
        return Writer(policy, device=device, dtype=dtype, batch_size=config.batch_size)

    units = len(prompts.windows)
    finished = out.done // units if units else len(policies)
    check_writers(map(writer_of, policies[finished:]), prompts, strict=not config.rejects)
    done = len(prompts) * sum(policy.samples for policy in policies[:finished])
    total = len(prompts) * sum(policy.samples for policy in policies)
    with console.progress("sample", total, "samples") as bar:
        for number, policy in enumerate(policies[finished:], finished):
            writer = writer_of(policy)
            tally = tallies.setdefault(policy.name, dict.fromkeys(OUTCOMES, 0))

            def leave_out(
                outcome: str, prompt: Record, reason: str, tally: dict[str, int] = tally
            ) -> None:
                if outcome == "unfit" or config.rejects:
                    out.reject(prompt.where or prompt["id"], reason, prompt)
                tally[outcome] += 1

            for unit, window in enumerate(prompts.windows, number * units + 1):
                done += len(window) * policy.samples
                if unit <= out.done:
                    continue
                fitting = [p for p in window if p.get("wrapper", writer.wrapper) == writer.wrapper]
                tally["other wrapper"] += len(window) - len(fitting)
                for record in trajectories(
                    fitting, writer, seed=config.seed, clean=config.clean, leave_out=leave_out
                ):
                    out.write(record)
                    tally["records"] += 1
                    for mark in record["cleaned"]:
                        tally[mark] = tally.get(mark, 0) + 1
                out.commit(unit)
                bar.update(done, policy.name)


def _report(counts: dict[str, Any]) -> None:
    """Say what was left out and what was cleaned."""
    from polarctl import console
    from polarctl.policies import cleaning

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
    say = console.note if len(tallies) <= SHOWN_POLICIES else console.detail
    for line in cleaning.report(tallies):
        say(f"  {line}")
