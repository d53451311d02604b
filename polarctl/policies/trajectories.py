"""What policies write, as records: a unit of work, done anywhere, and its way into the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polarctl import seeding
from polarctl.policies import cleaning
from polarctl.policies.continuation import PolicyWriter, Unfit
from polarctl.policies.filters import Filters
from polarctl.records import Record
from polarctl.storage.write import Output

# What becomes of a sample; counted for every policy. `unfit` and `other wrapper` count prompts.
OUTCOMES = ("records", "empty", "unfit", "other wrapper")
NO_FILTERS = Filters()


def trajectories(
    prompts: Sequence[Record],
    writer: PolicyWriter,
    *,
    seed: int = 0,
    clean: bool = True,
    filters: Filters = NO_FILTERS,
    leave_out: Callable[[str, Record, str], None] = lambda outcome, prompt, reason: None,
    count: Callable[[Mapping[str, int]], None] = lambda usage: None,
) -> Iterator[dict[str, Any]]:
    """The trajectories of one policy: prompt by prompt, sample by sample.

    Args:
        prompts: Prompt records with their `id`.
        writer: The policy.
        seed: The run's seed; each sample's is made from it, policy, prompt id and sample index.
        clean: Apply `polarctl.policies.cleaning.clean`.
        filters: Which texts are left out after that.
        leave_out: Called with `unfit` for a prompt that the policy cannot take, with `empty` for
            a sample without text, with one of `filters.REASONS`; then with the prompt and the
            reason.
        count: Called with what a server counts for each sample.
    """
    name, samples = writer.policy.name, writer.policy.samples
    jobs: list[tuple[Record, int, Any]] = []
    for prompt, ids in zip(prompts, writer.encode([p["prompt"] for p in prompts]), strict=True):
        if isinstance(ids, Unfit):
            leave_out("unfit", prompt, ids.reason)
        else:
            jobs.extend((prompt, sample, ids) for sample in range(samples))
    seeds = [seeding.derive(seed, "sample", name, prompt["id"], s) for prompt, s, _ in jobs]
    refused: set[tuple[str, Unfit]] = set()
    written = writer.write([ids for *_, ids in jobs], seeds)
    for (prompt, sample, _), made in zip(jobs, written, strict=True):
        if isinstance(made, Unfit):
            if (prompt["id"], made) not in refused:
                leave_out("unfit", prompt, made.reason)
            refused.add((prompt["id"], made))
            continue
        count(made.usage)
        text, cleaned = cleaning.clean(made.text, made.finish_reason) if clean else (made.text, [])
        if not text.strip():
            leave_out("empty", prompt, f"policy `{name}` wrote no text (sample {sample})")
            continue
        # A server's policy has no tokenizer here, so what is left is told from its characters.
        tokens = round(made.num_tokens * len(text) / max(len(made.text), 1))
        why, language = filters.look(text, tokens)
        if why is not None:
            leave_out(why, prompt, "")
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
        if language is not None:
            record["language"] = language
        if writer.policy.group is not None:
            record["policy_group"] = writer.policy.group
        yield {**record, **{k: v for k, v in prompt.items() if k not in record}}


@dataclass
class Unit:
    """What one policy wrote for one window of prompts: a unit of work, done anywhere.

    Attributes:
        prompts: Prompts that were in the window.
        records: Trajectories.
        left_out: (outcome, place, reason, prompt) of each sample or prompt that gave none.
        usage: What a server counted.
        facts: What the manifest says of the policy; of a server, what it lists of its model.
    """

    prompts: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)
    usage: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)


def unit_of(
    prompts: Sequence[Record],
    writer: PolicyWriter,
    *,
    seed: int,
    clean: bool,
    filters: Filters = NO_FILTERS,
) -> Unit:
    """A unit of work: `trajectories` of a window, and what was left out of it.

    It depends on policy, prompts, seed and options alone. `policies.backends.open_writer` makes a
    writer of a policy, on any machine; policy, prompts and the result can be pickled.
    """
    unit = Unit(prompts=len(prompts), facts=writer.facts())

    def leave_out(outcome: str, prompt: Record, reason: str) -> None:
        unit.left_out.append((outcome, prompt.where or prompt["id"], reason, prompt))

    fitting = []
    for prompt in prompts:
        if prompt.get("wrapper", writer.wrapper) == writer.wrapper:
            fitting.append(prompt)
        else:
            leave_out("other wrapper", prompt, "")
    unit.records.extend(
        trajectories(
            fitting,
            writer,
            seed=seed,
            clean=clean,
            filters=filters,
            leave_out=leave_out,
            count=unit.usage.update,
        )
    )
    return unit


def take(unit: Unit, out: Output, tally: dict[str, int], *, rejects: bool) -> None:
    """Write and count what a unit of work has given.

    Args:
        unit: What a policy wrote for some prompts.
        out: Where it goes.
        tally: The policy's counts, changed in place.
        rejects: Samples without text are rejects.
    """
    for outcome, where, reason, prompt in unit.left_out:
        if outcome == "unfit" or (outcome == "empty" and rejects):
            out.reject(where, reason, prompt)
        tally[outcome] = tally.get(outcome, 0) + 1
    for record in unit.records:
        out.write(record)
        tally["tokens"] = tally.get("tokens", 0) + record["num_tokens"]
        for mark in record["cleaned"]:
            tally[mark] = tally.get(mark, 0) + 1
    tally["records"] += len(unit.records)
    for name, count in unit.usage.items():
        tally[name] = tally.get(name, 0) + count
