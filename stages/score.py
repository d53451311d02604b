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
from typing import Any

from polarctl.scoring.options import WINDOW_ROWS, ScoreOptions

JUDGED_ROWS = 64  # a judge writes thousands of tokens for a record


@dataclass(frozen=True, kw_only=True)
class Config(ScoreOptions):
    """Options of `polarctl score`."""


def run(config: Config) -> None:
    """Score every record of the input."""
    from contextlib import closing

    from polarctl import console
    from polarctl.storage import windows

    paths = windows.inputs_of("score", config)  # before torch is loaded

    from polarctl.model import devices
    from polarctl.parallel import served
    from polarctl.scoring import engines
    from polarctl.scoring.scorer import Cuts, Floored
    from polarctl.scoring.window import ScoreWork, Summary
    from polarctl.storage import manifest, read
    from polarctl.storage.write import Output, check_paths

    engines.check(config)
    work = ScoreWork(config, chat=engines.reads_chat(config))
    if config.dry_run:
        windows.dry_run("score", config, paths, None, verify=work.verify)
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
        environments, placement = devices.processes(config), engines.placement(config)
        reader = windows.reader_of(config, paths, None, on_bad=out.reject, verify=work.verify)
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
            placement=placement,
            threads=threads,
            counted=True,
        )
        cuts.say(config.model)
        floored.say(work.answers.floor)
        summary.say()
