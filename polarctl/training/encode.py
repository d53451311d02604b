"""Tokenizing triples, ahead of the model in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from polarctl import console
from polarctl.errors import RecordError
from polarctl.model.template import Encoder
from polarctl.parallel.pool import in_order
from polarctl.records import Record

PIECES = ("prompt", "reference", "output")
_CHUNK = 8  # records a message to a worker
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """An encoded triple.

    Attributes:
        ids: Token ids: chosen, then the rejected ones.
        margin: The record's own margin.
        cut: Pieces that were longer than the template.
    """

    ids: tuple[list[int], ...]
    margin: float = 0.0
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class TripleEncoder:
    """From a triple to its token ids.

    Attributes:
        encoder: The reward model's template.
        negatives: Rejected trajectories that are used at most.
    """

    encoder: Encoder
    negatives: int = 1

    def __call__(self, record: Record) -> Group:
        """The triple's group, with one prompt budget for all of its candidates.

        Raises:
            RecordError: A text that cannot be encoded.
        """
        rejected = [record["rejected"], *record.get("negatives", ())][: self.negatives]
        try:
            found = self.encoder.report_group(
                record["prompt"],
                record["reference"],
                [record["chosen"], *rejected],
                record.get("wrapper", "sft"),
            )
        except ValueError as error:
            raise RecordError(str(error), where=record.where) from None
        cut = {piece for e in found for piece in PIECES if getattr(e, f"truncated_{piece}")}
        return Group(tuple(e.ids for e in found), record.get("margin", 0.0), tuple(sorted(cut)))


def default_count(device_type: str, processes: int) -> int:
    """Workers of a process, said with the reason.

    Args:
        device_type: Where the model computes: `cpu` or `cuda`.
        processes: Processes of this machine that train.
    """
    cores = os.cpu_count() or 1
    if device_type == "cpu":
        console.choice("workers", "0", "the model computes on the same cores")
        return 0
    count = min(8, max(0, cores // processes - 1))
    console.choice("workers", str(count), f"{cores} cores for {processes} training processes")
    return count


def encoded(
    records: Iterator[Record], encode: Callable[[Record], T], *, workers: int, ahead: int
) -> Iterator[T]:
    """What `encode` gives for each record, in order; see `polarctl.parallel.pool.in_order`.

    Args:
        records: What to encode; read `ahead` records before their turn.
        encode: A function that can be pickled; importable, not of the main program.
        workers: Processes; 0: none beside this one.
        ahead: Records that are under way.
    """
    return in_order(
        records,
        encode,
        environments=[{"OMP_NUM_THREADS": "1"}] * workers,
        ahead=ahead,
        message=_CHUNK,
        task="tokenizes",
        hint="fewer --workers need less memory; the same command goes on from the checkpoint",
    )
