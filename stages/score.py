r"""Score candidates with a reward model: how close is each to its reference.

Reads candidates (`prompt, reference, output`, or a group `candidates: [...]`) or triples. Writes
the same records with `reward`, or `rewards` in the order of the candidates.

\b
polarctl score candidates.jsonl -m runs/rm | polarctl eval - --report runs/report
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from polarctl.score_config import MODEL, ScoreConfig

WINDOW_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    """Options of `polarctl score`."""

    model: Annotated[str, MODEL] = field()  # required here
    best_of_n: Annotated[
        bool, typer.Option("--best-of-n", help="Add `best`: index of a group's highest reward.")
    ] = False


def run(config: Config) -> None:
    """Score every record of the input."""
    from polarctl import io, manifest, pipeline
    from polarctl.output import Output
    from polarctl.scoring import (
        Cuts,
        kind_of_scorable,
        load_scorer,
        require_reference,
        score_records,
    )

    paths = pipeline.inputs_of("score", config)
    verify = None if config.no_reference else require_reference
    if config.dry_run:
        pipeline.dry_run("score", config, paths, kind_of_scorable, verify=verify)
        return
    identity = {"model_identity": manifest.folder_identity(config.model)}
    with Output("score", config, io.sizes(paths), identity) as out:
        if out.complete:
            return
        scorer = load_scorer(
            config.model,
            device=config.device,
            dtype=config.dtype,
            batch_tokens=config.batch_tokens,
            no_reference=config.no_reference,
        )
        reader = pipeline.reader_of(config, paths, kind_of_scorable, sink=out, verify=verify)
        counts = out.counts
        counts.setdefault("tokens", 0)
        counts["cuts"] = cuts = Cuts(counts.get("cuts", {}))

        def work(window: list[Any]) -> Any:
            scored = score_records(
                window, scorer, no_reference=config.no_reference, best=config.best_of_n
            )
            for record, details in scored:
                counts["tokens"] += sum(d.tokens for d in details)
                cuts.add(details)
                yield record

        pipeline.map_windows(out, reader, work, size=WINDOW_ROWS, title="score")
        cuts.say()
