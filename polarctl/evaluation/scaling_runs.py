"""The folders of training runs, read as points of the scaling laws."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from polarctl.errors import RecordError, UsageError
from polarctl.evaluation.scaling import TrainedRun
from polarctl.storage import run_folder
from polarctl.storage.manifest import MANIFEST

LEAST_RUNS = 3
# The input embedding, by the names that families of models have for it.
_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "embed_in.weight")
_MOST_HEADER = 100 << 20


def read_runs(folders: Sequence[str]) -> list[TrainedRun]:
    """All runs, in the order given.

    Raises:
        UsageError: Fewer than three, one given twice, no run, one that is not finished or has no
            held-out loss.
        RecordError: A line of `metrics.jsonl` that is not one.
    """
    if len(folders) < LEAST_RUNS:
        raise UsageError(
            f"a law needs {LEAST_RUNS} runs or more, of different sizes or data; these are "
            f"{len(folders)}",
            hint="polarctl eval scaling RUN RUN RUN ... -o DIR",
        )
    seen: set[str] = set()
    for folder in folders:
        real = os.path.realpath(folder)
        if real in seen:
            raise UsageError(f"{folder}: is given twice")
        seen.add(real)
    return [read_run(folder) for folder in folders]


def read_run(folder: str) -> TrainedRun:
    """One run; see `read_runs`."""
    path = Path(folder)
    metrics = path / run_folder.METRICS
    if not metrics.is_file():
        raise UsageError(f"{folder}: is no folder of a training run: no {run_folder.METRICS}")
    record = _manifest(path)
    tokens = triples = 0.0
    loss: float | None = None
    for where, line in _lines(metrics):
        tokens += _number(line, "tokens", where)
        triples += _number(line, "pairs", where)
        if "val_loss" in line:
            loss = _number(line, "val_loss", where)
            used, pairs = tokens, triples
    if loss is None:
        raise UsageError(
            f"{folder}: has no held-out loss; the loss of its batches is no measure, since the "
            "model has learned from them",
            hint="train with --val-fraction 0.05, or leave this run out",
        )
    facts = {**record.get("config", {}), **record.get("fingerprint", {})}
    held_out = [facts.get(name) for name in ("input_digest", "val_fraction", "seed", "limit")]
    return TrainedRun(
        name=folder,
        parameters=_parameters(path, record),
        tokens=used,
        triples=pairs,
        loss=loss,
        held_out=orjson.dumps(held_out).decode(),
    )


def _manifest(path: Path) -> dict[str, Any]:
    mark = path / MANIFEST
    try:
        record = orjson.loads(mark.read_bytes())
        record["counts"].keys()
    except FileNotFoundError:
        raise UsageError(
            f"{path}: is not finished: there is no {MANIFEST}",
            hint="its own command goes on from where it stopped; or leave it out",
        ) from None
    except OSError as error:
        raise UsageError(f"{mark}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{mark}: is no manifest of a training run") from None
    found: dict[str, Any] = record
    return found


def _lines(metrics: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, figures) of every step."""
    with open(metrics, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{metrics}:{number}"
            try:
                line = orjson.loads(raw)
            except ValueError as error:
                raise RecordError(f"no JSON: {error}", where=where) from None
            if not isinstance(line, dict):
                raise RecordError("no JSON object", where=where)
            yield where, line


def _number(line: dict[str, Any], name: str, where: str) -> float:
    """A figure of a step, finite and above 0; a run that stopped at NaN has a text there."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        told = f"`{name}` is missing" if value is None else f"`{name}` is {value!r}, no number"
        raise RecordError(told, where=where, hint="leave this run out")
    if not (math.isfinite(value) and value > 0):
        raise RecordError(f"`{name}` is {value}, not above 0", where=where)
    return float(value)


def _parameters(path: Path, record: dict[str, Any]) -> float:
    """N by the manifest, or by the weights where an earlier version has made the run."""
    said = record["counts"].get("scaling_parameters")
    if isinstance(said, int) and said > 0:
        return float(said)
    files = sorted(path.glob("model*.safetensors"))
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    count = sum(
        math.prod(shape) for name, shape in shapes.items() if not name.endswith(_EMBEDDINGS)
    )
    if not count:
        raise UsageError(
            f"{path}: does not say how many weights its model has",
            hint="its manifest.json of this version, or model.safetensors",
        )
    return float(count)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Name to shape of the tensors of a safetensors file, by its header alone."""
    try:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = orjson.loads(stream.read(min(size, _MOST_HEADER)))
        return {name: facts["shape"] for name, facts in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file}: is no safetensors file") from None
