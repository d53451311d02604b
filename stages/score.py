r"""Score candidates with a reward model: how close is each to its reference.

Reads candidates (`prompt, reference, output`, or a group `candidates: [...]`) or triples. Writes
the same records with `reward`, or `rewards` in the order of the candidates. What the candidates of
a record share is computed once.

\b
polarctl score candidates.jsonl -m runs/rm | polarctl eval - --report runs/report
polarctl score candidates.jsonl -m internlm/POLAR-7B --backend vllm -o scores.jsonl
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from polarctl.score_config import MODEL, ScoreConfig

WINDOW_ROWS = 512
BACKENDS = ("hf", "vllm")


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    """Options of `polarctl score`."""

    model: Annotated[str, MODEL] = field()  # required here
    backend: Annotated[str, typer.Option(help="Engine: hf (transformers) or vllm.")] = "hf"
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask a server that holds the model; --model is then its tokenizer and template.",
        ),
    ] = None
    server_type: Annotated[
        str, typer.Option(help="What it is: auto, vllm, sglang or lmdeploy.")
    ] = "auto"
    server_model: Annotated[
        str | None, typer.Option(help="Name of the model there; default: the first it lists.")
    ] = None
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests to the server under way at most.")
    ] = 16
    server_deadline: Annotated[
        float, typer.Option(min=0, help="Seconds without a good reply before giving up.")
    ] = 300.0
    engine_option: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="KEY=VALUE", help="Argument of vLLM's engine, JSON or text; may be repeated."
        ),
    ] = ()
    strip_thinking: Annotated[
        bool, typer.Option("--strip-thinking", help="Score without <think>...</think>.")
    ] = False
    normalize: Annotated[
        str,
        typer.Option(
            help="Add `normalized`, rewards on another scale: polar-1.8b, polar-7b (as the paper "
            "trains), zscore or rank (within a record)."
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
    from polarctl import io, manifest, pipeline, rewards
    from polarctl.output import Output
    from polarctl.scoring import Cuts, kind_of_scorable, score_records

    options = _engine_options(config)
    if config.normalize not in rewards.WITHIN_GROUP:
        rewards.normalise([], config.normalize)
    paths = pipeline.inputs_of("score", config)
    verify = _verifier(config)
    if config.dry_run:
        pipeline.dry_run("score", config, paths, kind_of_scorable, verify=verify)
        return
    identity = {
        "model_identity": manifest.folder_identity(config.model),
        "engine": "server" if config.server else config.backend,
    }
    with Output("score", config, io.sizes(paths), identity) as out:
        if out.complete:
            return
        scorer = _scorer(config, options)
        reader = pipeline.reader_of(config, paths, kind_of_scorable, sink=out, verify=verify)
        counts = out.counts
        counts.setdefault("tokens", 0)
        counts["cuts"] = cuts = Cuts(counts.get("cuts", {}))
        prepare = _without_thinking if config.strip_thinking else (lambda output: output)

        def work(window: list[Any]) -> Any:
            scored = score_records(
                window,
                scorer,
                no_reference=config.no_reference,
                best=config.best_of_n,
                prepare=prepare,
            )
            for record, details in scored:
                counts["tokens"] += sum(d.tokens for d in details)
                cuts.add(details)
                yield _completed(record, details, config)

        try:
            pipeline.map_windows(out, reader, work, size=WINDOW_ROWS, title="score")
        finally:
            scorer.close()
        cuts.say()


def _verifier(config: Config) -> Callable[[Any], None]:
    """A check that a record has what the options need."""
    from polarctl.errors import RecordError
    from polarctl.rewards import WITHIN_GROUP
    from polarctl.scoring import outputs_of, require_reference

    def verify(record: Any) -> None:
        if not config.no_reference:
            require_reference(record)
        if config.normalize in WITHIN_GROUP and len(outputs_of(record)) < 2:
            raise RecordError(
                f"`--normalize {config.normalize}` compares the candidates of a record",
                hint="a group of `candidates`, or another --normalize",
            )

    return verify


def _scorer(config: Config, options: dict[str, Any]) -> Any:
    """The engine that was asked for."""
    if config.server is not None:
        from polarctl import launch, model
        from polarctl.backends.server import ServerScorer

        launch.quiet_libraries()
        return ServerScorer(
            config.server,
            model.load_encoder(config.model),
            kind=config.server_type,
            name=config.server_model,
            concurrency=config.concurrency,
            deadline_s=config.server_deadline,
        )
    if config.backend == "vllm":
        from polarctl.backends.vllm import VllmScorer

        return VllmScorer(config.model, dtype=config.dtype, engine_options=options)
    from polarctl.scoring import load_scorer

    return load_scorer(
        config.model,
        device=config.device,
        dtype=config.dtype,
        batch_tokens=config.batch_tokens,
        no_reference=config.no_reference,
    )


def _engine_options(config: Config) -> dict[str, Any]:
    """`--engine-option` as keyword arguments."""
    import json

    from polarctl.errors import UsageError

    if config.backend not in BACKENDS:
        raise UsageError(f"no backend `{config.backend}`", hint=f"one of {', '.join(BACKENDS)}")
    if config.engine_option and config.backend == "hf":
        raise UsageError("`--engine-option` is for --backend vllm")
    options: dict[str, Any] = {}
    for text in config.engine_option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"`--engine-option {text}`: not of the form KEY=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _without_thinking(output: Any) -> str:
    from polarctl.encoding import content_text
    from polarctl.rewards import strip_thinking

    return strip_thinking(content_text(output))


def _completed(record: dict[str, Any], details: list[Any], config: Config) -> dict[str, Any]:
    """The record with what `--normalize` and `--details` add: lists where it has `rewards`."""
    from polarctl.rewards import normalise_group

    def put(name: str, values: list[Any]) -> None:
        record[name] = values if "rewards" in record else values[0]

    if config.normalize != "none":
        put("normalized", normalise_group([d.reward for d in details], config.normalize))
    if config.details:
        put("tokens", [d.tokens for d in details])
        put("truncated", [list(d.truncated) for d in details])
    return record
