"""Rows brought together by key on a Ray cluster, and what is made of each group, in order.

Ray Data reads the parts, brings the rows of a key to one machine (a hash shuffle) and sorts what is
made of them, all in tasks on every machine. What does not fit into the machines' object stores lies
on their disks. Ray's driver and this process hold a block of results at a time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import pickle
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, need
from polarctl.parallel.ray_driver import Driver, Link, first_line, named

_PARTITION_BYTES = 64 << 20  # of input, at least; a task has one in memory, some times over
_MOST_PARTITIONS = 1000  # each of which gets an object of every task that reads
_BLOCK_BYTES = 16 << 20
_HINT = "the same command goes on where this one stopped"


class Keyed(NamedTuple):
    """What travels.

    Attributes:
        key: Rows of one key meet; 64 bits with sign.
        order: Where it belongs: ascending, 64 bits with sign.
        body: What it holds. Of a row that is read None: it is as it is, and meets no others.
        note: For `Grouped.notes`, or None.
    """

    key: int
    order: int
    body: bytes | None
    note: bytes | None


class Grouped:
    """Rows by key, on the machines of a cluster. Use as a context manager.

    All functions can be pickled and are importable on all machines.

    Args:
        address: See `polarctl.parallel.ray_driver.Driver`.
        parts: What there is to read; a task reads one.
        size: Bytes of all parts, about: decides into how many partitions they are cut.
        read: The rows of a part.
        group: From the rows of a key, by `order`, to the rows that are kept of them.

    Raises:
        MissingError: No such cluster, no room in it, or it is lost.
        PolarctlError: What a function raises on the cluster.
    """

    def __init__(
        self,
        address: str,
        parts: Sequence[Any],
        size: int,
        read: Callable[[Any], Iterable[Keyed]],
        group: Callable[[list[Keyed]], Iterable[Keyed]],
    ):
        for package in ("ray", "pyarrow", "pandas"):
            if importlib.util.find_spec(package) is None:
                raise need(package, "ray")
        packed = [pickle.dumps(part) for part in parts]
        self._driver = Driver(address, partial(_serve, address, packed, size, read, group), _HINT)
        cpus, machines, partitions = self._driver.ready
        console.choice("ray data", f"{partitions} partitions", f"machines: {machines}, CPU {cpus}")

    def __enter__(self) -> Grouped:
        return self

    def __exit__(self, failed: object = None, *more: object) -> None:
        self._driver.__exit__(True)  # nothing is left that would have to end in peace

    def notes(self, merge: Callable[[Iterable[bytes]], bytes]) -> Iterator[bytes]:
        """The notes of all rows, merged on the machines as far as they lie together."""
        return self._ask("notes", merge)

    def ordered(self, make: Callable[[bytes], bytes | None]) -> Iterator[bytes]:
        """What `make` gives for the body of each row, by `order`; None is left out."""
        return self._ask("ordered", make)

    def _ask(self, what: str, function: Callable[..., Any]) -> Iterator[bytes]:
        self._driver.send(pickle.dumps((what, function)))
        while (found := self._driver.receive()) is not None:
            yield from found


# -- in Ray's driver ------------------------------------------------------------------------------


def _serve(
    address: str,
    parts: list[bytes],
    size: int,
    read: Callable[[Any], Iterable[Keyed]],
    group: Callable[[list[Keyed]], Iterable[Keyed]],
    link: Link,
) -> None:
    """Group, then answer what is asked."""
    import ray
    import ray.data
    from ray.exceptions import RayError

    asked: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(link, asked), daemon=True).start()
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if not cpus:
        raise MissingError(f"{named(address)} has no CPU for Ray Data", hint="`ray status`")
    partitions = max(cpus, min(math.ceil(size / _PARTITION_BYTES), _MOST_PARTITIONS))
    machines = sum(node["Alive"] for node in ray.nodes())
    link.tell("ready", (cpus, machines, partitions))
    _check_machines(address)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        rows = ray.data.from_items(
            [{"part": part} for part in parts], override_num_blocks=len(parts)
        ).map_batches(partial(_read, read), batch_size=1, batch_format="pyarrow")
        grouped = (
            rows.groupby("key", num_partitions=partitions)
            .map_groups(partial(_group, group), batch_format="pyarrow")
            .materialize()
        )
        _check_machines(address)  # some may have come later
        while True:
            what, function = pickle.loads(asked.get())
            work = _merged if what == "notes" else _made
            columns = ["note"] if what == "notes" else ["order", "body"]
            found = grouped.select_columns(columns).map_batches(
                partial(work, function), batch_size=None, batch_format="pyarrow"
            )
            if what == "ordered":
                found = found.sort("order")
            for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
                if table.num_rows:
                    link.tell("done", table["body"].to_pylist())
            link.tell("done", None)
    except RayError as error:  # a task's too, whatever it has raised
        why = first_line(getattr(error, "cause", None) or error)
        raise PolarctlError(f"the work on {named(address)} failed: {why}", hint=_HINT) from None


def _check_machines(address: str) -> None:
    """Refuse machines that would not bring the same rows together.

    Ray Data hashes a key with polars where there is polars, else with pandas: rows of one key would
    go to two places, and nobody would see it.

    Raises:
        MissingError: Their packages differ.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = ray.get(
        [
            ray.remote(_versions)
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote()
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        ]
    )
    for package in found[0]:
        there = sorted({versions[package] for versions in found})
        if len(there) > 1:
            raise MissingError(
                f"machines of {named(address)} differ in {package}: {', '.join(there)}",
                hint="every machine needs the same packages",
            )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("polarctl", "ray", "pyarrow", "pandas", "polars"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _listen(link: Link, asked: queue.Queue[bytes]) -> None:
    """Take in what is asked; ends this process when the parent has gone."""
    try:
        while True:
            asked.put(link.connection.recv_bytes())
    except (EOFError, OSError):
        link.end()


# -- on the machines ------------------------------------------------------------------------------


def _tables(rows: Iterable[Keyed]) -> Iterator[Any]:
    """Rows as tables of about 16 MiB."""
    held: list[Keyed] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row.body or b"") + len(row.note or b"")
        if size > _BLOCK_BYTES:
            yield _table(held)
            held, size = [], 0
    yield _table(held)


def _table(rows: list[Keyed]) -> Any:
    import pyarrow as pa

    kinds = pa.int64(), pa.int64(), pa.large_binary(), pa.large_binary()
    names = Keyed._fields
    return pa.table(
        {
            name: pa.array([row[place] for row in rows], kinds[place])
            for place, name in enumerate(names)
        }
    )


def _read(read: Callable[[Any], Iterable[Keyed]], table: Any) -> Iterator[Any]:
    for part in table["part"].to_pylist():
        yield from _tables(read(pickle.loads(part)))


def _group(group: Callable[[list[Keyed]], Iterable[Keyed]], table: Any) -> Iterator[Any]:
    columns = (table[name].to_pylist() for name in Keyed._fields)
    rows = sorted(map(Keyed._make, zip(*columns, strict=True)), key=itemgetter(1))
    ready = [row for row in rows if row.body is None]
    rest = [row for row in rows if row.body is not None]
    yield from _tables([*ready, *(group(rest) if rest else ())])


def _merged(merge: Callable[[Iterable[bytes]], bytes], table: Any) -> Any:
    import pyarrow as pa

    notes = [note for note in table["note"].to_pylist() if note is not None]
    return pa.table({"body": pa.array([merge(notes)] if notes else [], pa.large_binary())})


def _made(make: Callable[[bytes], bytes | None], table: Any) -> Iterator[Any]:
    found = (
        Keyed(0, order, made, None)
        for order, body in zip(table["order"].to_pylist(), table["body"], strict=True)
        if body.is_valid and (made := make(body.as_py())) is not None
    )
    for made in _tables(found):
        yield made.select(["order", "body"])
