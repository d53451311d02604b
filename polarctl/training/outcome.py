"""What came of a run: its figures, from all of its steps and not from the last batch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from polarctl.storage import run_folder

_SHARE, _MOST = 10, 50  # the mean is over the last tenth of the steps, and over 50 at most
_NEXT = {
    "pretrain": "polarctl finetune RANKED.jsonl -m {model} -o {tuned}",
    "finetune": "polarctl eval RANKED.jsonl -m {model} --report {report}",
}


def figures(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a run, for its manifest.

    `loss` and `accuracy` are means over the last tenth of its steps, `averaged_steps` says of how
    many. `held_out_...` are those of the last validation, and `best_...` those of the one with the
    lowest loss, where there was any.

    Args:
        entries: The lines of `metrics.jsonl`, all of them, in order.
    """
    count = max(1, min(_MOST, len(entries) // _SHARE))
    found: dict[str, Any] = {
        "loss": fmean(entry["loss"] for entry in entries[-count:]),
        "accuracy": fmean(entry["accuracy"] for entry in entries[-count:]),
        "averaged_steps": count,
    }
    validated = [entry for entry in entries if "val_loss" in entry]
    if validated:
        last, best = validated[-1], min(validated, key=lambda entry: entry["val_loss"])
        for name, entry in (("held_out", last), ("best", best)):
            found[f"{name}_loss"] = entry["val_loss"]
            found[f"{name}_accuracy"] = entry["val_accuracy"]
            found[f"{name}_step"] = entry["step"]
    return found


def read(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [orjson.loads(line) for line in metrics.read_bytes().splitlines()]


def lines(
    stage: str,
    folder: Path,
    found: Mapping[str, Any],
    drawn: Sequence[str],
    trackers: Sequence[str],
) -> list[str]:
    """What is said at the end of a run.

    Args:
        stage: `pretrain` or `finetune`.
        folder: Its output folder.
        found: What `figures` gave.
        drawn: Names of the pictures and pages in the folder.
        trackers: Who else got the figures (`--report-to`).
    """
    count = found["averaged_steps"]
    over = "the last step" if count == 1 else f"mean of the last {count} steps"
    said = [f"training: loss {found['loss']:.4f}, accuracy {found['accuracy']:.3f} ({over})"]
    if "held_out_loss" in found:
        best = folder / run_folder.BEST
        said += [
            f"held out: loss {found['held_out_loss']:.4f}, accuracy "
            f"{found['held_out_accuracy']:.3f} at the end; best after step "
            f"{found['best_step']:,}: loss {found['best_loss']:.4f}, accuracy "
            f"{found['best_accuracy']:.3f}, in {best}"
        ]
    if drawn:
        said.append(f"curves: {', '.join(str(folder / name) for name in drawn)}")
    if "tensorboard" in trackers:
        said.append(f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder / 'runs'))}")
    names = {"model": "", "tuned": "-tuned", "report": "-report"}
    paths = {name: shlex.quote(f"{folder}{end}") for name, end in names.items()}
    return [*said, f"next: {_NEXT[stage].format(**paths)}"]
