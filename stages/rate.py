r"""Rate policies by what they wrote: accuracy, pass@k, best of n, win rates, with intervals.

Reads answers: trajectories of `sample`, rollouts, or groups whose candidates are named by their
policy; with the rewards of `score`, where there are any. What is right is said by --verifier
(those of `rft --reward`, such as `math` or `exact:accept`), else by a `label`, else by nothing;
what has the higher reward wins, whether a reward model or a judge gave it. Writes the records with
the `label` of every answer; the tables go to stderr.

\b
polarctl sample test.jsonl --pool two.jsonl --samples 16 | polarctl rate - --verifier math
polarctl rate scored.jsonl --verifier gsm8k -o labelled.jsonl --report runs/policies
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from polarctl.config import Common

WINDOW_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl rate`."""

    ABSENT = frozenset({"resume"})  # figures need every answer: an interrupted one begins again

    verifier: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What says that an answer is right: exact[:FIELD], regex:..., gsm8k[:FIELD], "
            "math[:FIELD], json-schema:..., command:CMD. Default: the `label` of the answers.",
        ),
    ] = None
    report: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write report.html, .json and plots here.")
    ] = None


def labelled(records: Iterable[Any], verifier: Any) -> Iterator[Any]:
    """The records with the `label` that the verifier gives to every answer; none where it has none.

    Args:
        records: Trajectories or groups.
        verifier: A `polarctl.verifiers.named.Verifier`; None: the labels stay as they are.
    """
    from polarctl.model.template import content_text
    from polarctl.records import Record

    kept = list(records)
    if verifier is None:
        yield from kept
        return
    outputs = [[content_text(answer["output"]) for answer in _answers(r)] for r in kept]
    flat = [r for r, mine in zip(kept, outputs, strict=True) for _ in mine]
    values = iter(verifier.values(flat, [text for mine in outputs for text in mine]))
    for record in kept:
        answers = [{**answer, "label": next(values)} for answer in _answers(record)]
        if "candidates" in record:
            yield Record({**record, "candidates": answers}, record.where)
        else:
            yield Record({**record, "label": answers[0]["label"]}, record.where)


def _answers(record: Any) -> list[Any]:
    return record["candidates"] if "candidates" in record else [record]


def _check(record: Any) -> None:
    """Raise RecordError for what holds no answers of named policies."""
    from polarctl.errors import RecordError
    from polarctl.records import Score, Trajectory, check

    check({"reference": "", **record}, Score)
    if "candidates" in record:
        if any(not candidate.get("name") for candidate in record["candidates"]):
            raise RecordError("a candidate has no `name`: which policy wrote it")
        rewards = record.get("rewards")
        if rewards is not None and len(rewards) != len(record["candidates"]):
            raise RecordError("not as many `rewards` as candidates")
    else:
        check(record, Trajectory)
    for answer in _answers(record):
        label = answer.get("label")
        if label is not None and not 0 <= label <= 1:
            raise RecordError(f"`label` {label}: is not from 0 to 1")


def _count(record: Any, samples: Any) -> None:
    from polarctl.evaluation.discrimination import prompt_key
    from polarctl.records import prompt_id

    group = "candidates" in record
    rewards = record.get("rewards") if group else [record.get("reward")]
    answers = _answers(record)
    for answer, reward in zip(answers, rewards or [None] * len(answers), strict=True):
        label = answer.get("label")
        samples.add(
            answer["name" if group else "policy"],
            prompt_key(prompt_id(record)),
            None if label is None else float(label),
            None if reward is None else float(reward),
        )


def run(config: Config) -> None:
    """Label every answer, and report."""
    from polarctl import console
    from polarctl.errors import RecordError
    from polarctl.evaluation import heading, policy_report
    from polarctl.evaluation.page import terminal_table
    from polarctl.evaluation.policy_figures import Samples, summary
    from polarctl.storage import read, windows
    from polarctl.storage import replace as replacing
    from polarctl.storage.write import Output
    from polarctl.verifiers.named import open_verifier

    paths = windows.inputs_of("rate", config)
    verifier = open_verifier(config.verifier) if config.verifier is not None else None
    with closing(verifier) if verifier is not None else nullcontext():
        if config.dry_run:
            windows.dry_run("rate", config, paths, None, verify=_check)
            return
        if config.report:
            replacing.check_report(config.report, policy_report.FILES)
        samples = Samples()
        with Output("rate", replace(config, resume=False), read.sizes(paths)) as out:
            if out.complete:
                console.note(f"{config.output} is complete; --force makes it again")
                return
            reader = windows.reader_of(config, paths, None, on_bad=out.reject, verify=_check)
            for window in reader.windows(WINDOW_ROWS):
                for record in labelled(window.records, verifier):
                    _count(record, samples)
                    out.write(record)
                out.commit(out.units + 1, window.digest)
            if not samples.policies:
                raise RecordError("no answers to rate")
            truth = config.verifier or "their `label`"
            report = {"truth": truth, **summary(samples, config.seed)}
            unknown = sum(value != value for value in samples.values)
            out.counts.update({"answers": len(samples.values), "unknown": unknown})
            if config.report:
                source = ", ".join(paths) if paths != ["-"] else "standard input"
                head = heading.facts(paths, out.counts["records"])
                policy_report.write(config.report, report, source, head)
                console.note(f"report: {config.report}/report.html")
    for part in policy_report.tables(report):
        console.show(terminal_table(part))
    for sentence in policy_report.sentences(report):
        console.note(sentence)
    if unknown == len(samples.values):
        console.warn("nothing says which answers are right: --verifier, or a `label`")
    elif unknown:
        console.warn(f"{unknown:,} answers are in no accuracy: {truth} says nothing of them")
