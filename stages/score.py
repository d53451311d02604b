r"""Score candidates with a reward model: how close is each to its reference.

Reads candidates (`prompt, reference, output`, or a group `candidates: [...]`) or triples. Writes
the same records with `reward`, or `rewards` in the order of the candidates. What the candidates of
a record share is computed once.

\b
polarctl score candidates.jsonl -m runs/rm | polarctl eval - --report runs/report
polarctl score candidates.jsonl -m internlm/POLAR-7B --backend vllm -o scores.jsonl
polarctl score candidates.jsonl -m runs/rm --server http://gpu-1:8000 -o scores.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from polarctl.scoring.options import EngineConfig

WINDOW_ROWS = 512
JUDGED_ROWS = 64  # a judge writes thousands of tokens for a record


@dataclass(frozen=True, kw_only=True)
class Config(EngineConfig):
    """Options of `polarctl score`."""

    condition_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field whose value picks a system prompt."),
    ] = None
    conditions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="YAML: values of that field to system prompts, for scoring only."
        ),
    ] = None
    reference_pooling: Annotated[
        Literal["mean", "max"],
        typer.Option(help="A candidate's reward among several `references`."),
    ] = "mean"
    strip_thinking: Annotated[
        bool, typer.Option("--strip-thinking", help="Score without <think>...</think>.")
    ] = False
    reward_floor: Annotated[
        str,
        typer.Option(
            metavar="VALUE",
            help="Raw reward of an output without an answer: empty, in an unfinished thought, or "
            "`finish_reason: length`. A number, none, or auto: -20 with --strip-thinking, else "
            "none. Such a record says so in `floored`.",
        ),
    ] = "auto"
    normalize: Annotated[
        Literal["none", "polar-1.8b", "polar-7b", "zscore", "rank"],
        typer.Option(
            help="Add `normalized`, rewards on another scale: as the paper trains its two models, "
            "or within a record."
        ),
    ] = "none"
    details: Annotated[
        bool, typer.Option("--details", help="Add `tokens` and `truncated` for each reward.")
    ] = False
    best_of_n: Annotated[
        bool, typer.Option("--best-of-n", help="Add `best`: index of a group's highest reward.")
    ] = False


def run(config: Config) -> None:
    """Score every record of the input."""
    from contextlib import closing

    from polarctl import console
    from polarctl.parallel import served
    from polarctl.records import kind_of_scorable
    from polarctl.scoring import engines
    from polarctl.scoring.answers import REWARD_FLOOR, Answers, floor_of
    from polarctl.scoring.scorer import Cuts, Floored
    from polarctl.scoring.summary import Summary
    from polarctl.scoring.window import ScoreWork, Wishes
    from polarctl.storage import manifest, read, windows
    from polarctl.storage.write import Output, check_paths

    engines.check(config)
    paths = windows.inputs_of("score", config)
    default = REWARD_FLOOR if config.strip_thinking else None
    answers = Answers(
        strip_thinking=config.strip_thinking, floor=floor_of(config.reward_floor, default)
    )
    wishes = Wishes(
        answers=answers,
        pooling=config.reference_pooling,
        normalize=config.normalize,
        details=config.details,
        best_of_n=config.best_of_n,
        condition_field=config.condition_field,
        conditions=config.conditions,
    )
    work = ScoreWork(config, wishes, chat=engines.reads_chat(config))
    if config.dry_run:
        windows.dry_run("score", config, paths, kind_of_scorable, verify=work.verify)
        return
    identity = engines.identity(config)
    if config.conditions:
        identity["conditions_identity"] = manifest.file_identity(config.conditions)
    if config.server is not None:
        check_paths(config, paths)  # before a server is waited for
        identity |= served.identity(config, work.served)
    with closing(work), Output("score", config, read.sizes(paths), identity) as out:
        if out.complete:
            return
        environments = engines.processes(config)
        reader = windows.reader_of(
            config, paths, kind_of_scorable, on_bad=out.reject, verify=work.verify
        )
        counts = out.counts
        counts.setdefault("tokens", 0)
        counts["cuts"] = cuts = Cuts(counts.get("cuts", {}))
        counts["floored"] = floored = Floored(counts.get("floored", {}))
        summary = Summary()

        def take(done: Any) -> Any:
            console.keep(done.choices)
            for row in done.rejected:
                out.reject(*row)
            counts["tokens"] += done.tokens
            cuts.update(done.cuts)
            floored.update(done.floored)
            summary.add(len(done.records), done.rewards, done.tokens)
            yield from done.records

        threads = engines.windows_at_once(config)
        if threads > 1:
            work.open()
        windows.map_windows(
            out,
            reader,
            work,
            take,
            size=JUDGED_ROWS if config.backend == "principle" else WINDOW_ROWS,
            title="score",
            environments=environments,
            threads=threads,
        )
        cuts.say()
        floored.say(answers.floor)
        summary.say()
