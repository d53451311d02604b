"""Work done ahead by actors of a Ray cluster, its results in order.

The shape is that of `polarctl.parallel.pool.in_order`. Ray places the actors where their resources
are free, starts them again when a process or a machine is lost, and adds those for which a machine
comes later. What was under way on a lost one is given to another: not by Ray's own
`max_task_retries`, which would wait for the same actor even where nothing has room for it any more.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.parallel.pool import NUMBER, InWorker, answer_of, in_threads
from polarctl.parallel.ray_driver import END_S, Driver, Link, first_line, named

_PLACE_S = 60.0  # without any worker before the user is told
_MOST_LOSSES = 4  # workers that the same item may take with it
_HEAD = re.compile(r"[^/@]+:\d+")
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Placement:
    """Where workers are placed, and on what.

    Attributes:
        address: See `polarctl.parallel.ray_driver.Driver`.
        workers: How many; None: as many as the cluster has room for at the start.
        resources: What Ray reserves for each, by Ray's names: `CPU`, `GPU`, `memory` (bytes), or
            a resource that the cluster's owner has named.
    """

    address: str
    workers: int | None = None
    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1})

    def options(self) -> dict[str, Any]:
        """The resources as options of an actor."""
        names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        own = {name: n for name, n in self.resources.items() if name not in names}
        known = {names[name]: n for name, n in self.resources.items() if name in names}
        return {"num_cpus": 1, **known, "resources": own}

    def fitting(self, have: Mapping[str, float]) -> int:
        """Workers that a cluster with these resources has room for."""
        asked = {"CPU": 1, **self.resources}
        return int(min(have.get(name, 0) // n for name, n in asked.items() if n > 0))


def placement_of(config: Any, *, gpus: float = 1) -> Placement | None:
    """What the options `ray`, `ray_resource`, `gpus` and `device` of a stage ask for, if any.

    A worker takes `gpus` GPUs if they do not say it.

    Raises:
        UsageError: No such form of address, a resource that is not of the form KEY=AMOUNT, or one
            device for all workers.
    """
    if config.ray is None:
        return None
    check_address(config.ray)
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"`--device {config.device}` is one GPU of this machine, and --ray gives each worker "
            "its own"
        )
    resources: dict[str, float] = {}
    for text in config.ray_resource:
        name, _, amount = text.rpartition("=")
        try:
            resources[name] = float(amount)
        except ValueError:
            name = ""
        if not name or not 0 <= resources[name] < math.inf:
            raise UsageError(
                f"`--ray-resource {text}`: not of the form KEY=AMOUNT", hint="--ray-resource GPU=2"
            )
    if not resources.keys() & {"GPU"} and config.device != "cpu":
        resources["GPU"] = gpus
    workers = config.gpus if config.gpus > 1 or "gpus" in config.given else None
    return Placement(config.ray, workers, resources or {"CPU": 1})


def gpus_of(engine: Mapping[str, Any], *kinds: str) -> int:
    """GPUs that one vLLM engine takes: the product of its `KIND_parallel_size` options."""
    sizes = (engine.get(f"{kind}_parallel_size") for kind in kinds)
    return math.prod(size for size in sizes if isinstance(size, int))


def check_address(address: str) -> None:
    """Refuse what cannot name a cluster.

    Raises:
        UsageError: No such form.
    """
    if address not in ("auto", "local") and not _HEAD.fullmatch(address):
        raise UsageError(
            f"`--ray {address}`: not auto, local or HOST:PORT",
            hint="run on a machine of the cluster with --ray auto, or by `ray job submit`",
        )


def in_order(
    items: Iterator[A],
    work: Callable[[A], B],
    *,
    placement: Placement,
    task: str = "works",
    hint: str | None = None,
) -> Generator[B, None, None]:
    """What `work` gives for each item, in order, whatever the machines.

    Twice as many items as workers are under way. The actors end when the iterator is closed or this
    process ends, however it ends.

    Args:
        items: Read in the caller's thread, before their turn.
        work: A function that can be pickled; importable on all machines.
        placement: Where, and on what.
        task: What a worker does, for the message when several are lost on the same item.
        hint: What helps then.

    Raises:
        MissingError: No such cluster, no room in it, or it is lost.
        PolarctlError: Several workers are lost on the same item.
        Exception: What `items` or `work` raise, once everything before it was handed out.
    """
    items = iter(items)
    failure: Exception | None = None
    more, under_way = True, 0
    said: set[str] = set()
    # The work stays packed in the driver: what it imports is the workers' to have.
    job = partial(_deal, placement, pickle.dumps(work), task, hint)
    with Driver(placement.address, job, hint) as driver:
        workers, machines, room = driver.ready
        what = ", ".join(f"{name} {amount:g}" for name, amount in placement.resources.items())
        console.choice("ray workers", str(workers), f"{what} each; machines: {machines}, {room}")
        while True:
            while more and under_way < 2 * workers:
                try:
                    driver.send(pickle.dumps(next(items)))
                    under_way += 1
                except StopIteration:
                    more = False
                except Exception as error:  # its turn is after what is under way
                    failure, more = error, False
                if not more:
                    driver.send(b"")
            if not under_way:
                break
            found, wrong, trace = pickle.loads(_heard(driver, said))
            under_way -= 1
            yield from found
            if wrong is not None:
                raise wrong from InWorker(trace)
    if failure is not None:
        raise failure


def _heard(driver: Driver, said: set[str]) -> Any:
    """The next item's results, the error that ended them and its traceback; says what is new."""
    told, answer = pickle.loads(driver.receive())
    for line in told.splitlines():
        if line not in said:  # every worker makes the same choices
            said.add(line)
            sys.stderr.write(line + "\n")
    return answer


# -- in Ray's driver ------------------------------------------------------------------------------


def _deal(placement: Placement, work: bytes, task: str, hint: str | None, link: Link) -> None:
    """Give the items that come to actors, and tell what they answer."""
    crew = _Crew(link, placement, work, task, hint)
    link.tell("ready", crew.summary)
    items = iter(link.connection.recv_bytes, b"")
    for answer in in_threads(items, crew, threads=2 * len(crew.actors)):
        link.tell("done", answer)
    crew.close()


class _Crew:
    """The actors; called with an item it gives the answer of one of them.

    Raises:
        MissingError: The cluster has no room for one.
    """

    def __init__(self, link: Link, placement: Placement, work: bytes, task: str, hint: str | None):
        import ray

        self.link, self.task, self.hint = link, task, hint
        have = ray.cluster_resources()
        count = placement.workers or placement.fitting(have)
        asked = ", ".join(f"{name} {n:g}" for name, n in placement.resources.items())
        if not count:
            raise MissingError(
                f"{named(placement.address)} has no room for a worker: {asked}",
                hint="--device cpu" if "GPU" in placement.resources else "`ray status`",
            )
        machines = sum(node["Alive"] for node in ray.nodes())
        room = ", ".join(f"{name} {have.get(name, 0):g}" for name in placement.resources)
        self.summary = count, machines, f"{room} in all"
        kind = ray.remote(_Actor).options(max_restarts=-1, **placement.options())
        self.actors = [kind.remote(work) for _ in range(count)]
        self.change = threading.Condition()
        self.free: list[Any] = []
        self.placed = 0
        for actor in self.actors:
            self._expect(actor)

    def _expect(self, actor: Any) -> None:
        """Have it among the free ones as soon as Ray has found a place for it."""
        ref = actor.ready.options(max_task_retries=-1).remote()

        def ready(found: Any) -> None:
            if found.exception() is not None:  # it cannot be started at all
                self.link.fail(self._unable(found.exception()))
            with self.change:
                self.placed += 1
            self._give(actor)

        ref.future().add_done_callback(ready)

    def _unable(self, error: BaseException) -> MissingError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if "Error" in line.partition(":")[0]] or lines[:1]
        return MissingError(
            f"a worker on the cluster cannot start: {console.plain(told[-1]) if told else error!r}",
            hint="every machine needs the same Python, Ray and polarctl",
        )

    def _give(self, actor: Any) -> None:
        with self.change:
            self.free.append(actor)
            self.change.notify()

    def _take(self) -> Any:
        with self.change:
            while not self.free:
                if not self.change.wait(_PLACE_S) and not self.placed:
                    self.link.tell("warn", "no worker has found a place on the cluster yet")
            return self.free.pop(0)

    def __call__(self, item: bytes) -> bytes:
        import ray
        from ray.exceptions import RayError, RayTaskError

        for _ in range(_MOST_LOSSES):
            actor = self._take()
            try:
                answer: bytes = ray.get(actor.run.remote(item))
                self._give(actor)
                return answer
            except RayTaskError as error:
                why = first_line(error.cause or error)
                raise PolarctlError(f"a worker failed: {why}") from None
            except RayError as error:  # process, machine or answer lost
                with self.change:
                    self.placed -= 1
                why = f"a worker is lost ({type(error).__name__}); another one takes its records"
                self.link.tell("warn", why)
                self._expect(actor)
        raise PolarctlError(
            f"{_MOST_LOSSES} processes that {self.task} were lost on the same records",
            hint=self.hint,
        )

    def close(self) -> None:
        """Give back what the workers hold that are there."""
        import ray

        ray.wait(
            [actor.close.remote() for actor in self.free],
            num_returns=len(self.free),
            timeout=END_S,
        )


class _Actor:
    """A worker on some machine."""

    def __init__(self, work: bytes):
        os.environ[NUMBER] = "0"  # it speaks; the parent says what it has not said yet
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.packed = work
        self.work: Any = None

    def ready(self) -> None:
        """Answer, as soon as there is somebody who can."""

    def run(self, item: bytes) -> bytes:
        """What was said, and the answer as `polarctl.parallel.pool.answer_of` gives it."""
        found: list[Any] = []
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                self.work = self.work or pickle.loads(self.packed)
                found.append(self.work(pickle.loads(item)))
                answer = answer_of(found)
            except Exception as error:  # of any kind: the parent raises it in the item's turn
                answer = answer_of([], error)
        return pickle.dumps((said.getvalue(), answer))

    def close(self) -> None:
        """Close the work."""
        if hasattr(self.work, "close"):
            self.work.close()
