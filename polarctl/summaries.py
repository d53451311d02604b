"""Records about a whole run: the report that `eval` writes and the manifest of every output."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType


class Estimate(Struct):
    """A figure with its 95 % interval."""

    value: Annotated[float, Meta(description="The figure.")]
    low: Annotated[float, Meta(description="Lower end of the interval.")]
    high: Annotated[float, Meta(description="Upper end of the interval.")]
    n: Annotated[int, Meta(description="Cases behind the figure.")]
    clusters: Annotated[
        int | UnsetType, Meta(description="Distinct prompts: what the bootstrap resamples.")
    ] = UNSET


class Report(Struct):
    """The summary that `eval` writes as report.json."""

    metric: Annotated[str, Meta(description="What is measured: preference accuracy, ...")]
    overall: Annotated[
        dict[str, Estimate], Meta(description="Scorer (the model or a baseline) to figure.")
    ]
    categories: Annotated[
        dict[str, dict[str, Estimate]], Meta(description="The same for every category.")
    ]
    margins: Annotated[
        dict[str, float], Meta(description="Quantiles of the margins: min, p25, p50, p75, max.")
    ]
    best_of_n: Annotated[
        dict[str, Estimate] | UnsetType,
        Meta(description="Mean label of the candidate that each scorer ranks first (groups)."),
    ] = UNSET
    ranking: Annotated[
        dict[str, dict[str, Estimate]] | UnsetType,
        Meta(
            description="`kendall_tau_b` and `ndcg` of each scorer's order, over groups of three "
            "candidates or more."
        ),
    ] = UNSET
    skipped: Annotated[
        dict[str, int], Meta(description="Reason to number of records without a comparison.")
    ] = {}


class OutputFile(Struct):
    """A file named by a manifest."""

    sha256: Annotated[str, Meta(description="Hash of the file's bytes.")]
    bytes: Annotated[int, Meta(description="Size in bytes.")]
    path: Annotated[str | None | UnsetType, Meta(description="Path; null for a pipe.")] = UNSET
    records: Annotated[int | UnsetType, Meta(description="Lines, for JSONL.")] = UNSET


class InputFile(Struct):
    """An input named by a manifest."""

    path: Annotated[str, Meta(description="Path, or `-` for standard input.")]
    bytes: Annotated[int | None, Meta(description="Size in bytes; null for a pipe.")]
    sha256: Annotated[
        str | UnsetType, Meta(description="Hash of the file's bytes, where it was taken.")
    ] = UNSET


class Manifest(Struct):
    """Provenance, beside every output. It is written last: its presence means complete."""

    schema_version: Annotated[int, Meta(description="Version of these record schemas.")]
    stage: Annotated[str, Meta(description="The subcommand that made the output.")]
    version: Annotated[str, Meta(description="Version of polarctl.")]
    config: Annotated[dict[str, Any], Meta(description="Every option, as resolved.")]
    inputs: Annotated[list[InputFile], Meta(description="What was read.")]
    outputs: Annotated[dict[str, OutputFile], Meta(description="File name to what was written.")]
    counts: Annotated[dict[str, Any], Meta(description="What was counted: records, rejects, ...")]
    choices: Annotated[
        dict[str, dict[str, str]], Meta(description="Automatic choices: `{value, reason}`.")
    ]
    environment: Annotated[dict[str, str], Meta(description="Versions, platform, host, times.")]
    fingerprint: Annotated[
        dict[str, Any] | UnsetType, Meta(description="What a resume must find unchanged.")
    ] = UNSET
