"""Units of work of `sample` that other processes do: those of `--gpus N`, or those of `--ray`.

A unit is one policy with one window of prompts. Each process has one policy loaded at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from polarctl import console
from polarctl.model import devices
from polarctl.parallel import pool, ray_pool
from polarctl.policies.pool import Policy
from polarctl.records import Record

_TASK, _HINT = "writes for `sample`", "the same command goes on where this one stopped"
Job = tuple[Policy, Sequence[Record]]


class UnitWork:
    """Does units of work, and can be pickled before the first.

    Args:
        open_writer: From a policy to its writer; importable on all machines.
        unit_of: From a window of prompts and a writer to what the policy wrote.
    """

    def __init__(
        self,
        open_writer: Callable[[Policy], Any],
        unit_of: Callable[[Sequence[Record], Any], Any],
    ):
        self.open_writer, self.unit_of = open_writer, unit_of
        self._policy: Policy | None = None
        self._writer: Any = None
        self._voice = console.snapshot()

    def __call__(self, job: Job) -> tuple[Any, dict[str, dict[str, str]]]:
        """What the policy wrote for the window, and what the process chose automatically so far.

        Raises:
            PolarctlError: The policy's model cannot be loaded, or fails.
        """
        policy, prompts = job
        self.open(policy)
        return self.unit_of(prompts, self._writer), console.choices()

    def open(self, policy: Policy) -> None:
        """Open a policy's writer, if it is not the one that is open."""
        if policy != self._policy:
            if self._policy is None and pool.NUMBER in os.environ:  # one of several processes
                console.speak_as(self._voice)
            self.close()  # before the next one needs the memory
            self._writer, self._policy = self.open_writer(policy), policy

    def close(self) -> None:
        """Give back the policy that is loaded."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._policy = None


def units(config: Any, jobs: Iterable[Job], work: UnitWork) -> Generator[Any, None, None]:
    """What `work` gives for each job, in order: done here, in other processes, or on a cluster.

    Args:
        config: With the options `gpus`, `device`, `ray` and `ray_resource`.
        jobs: Policy by policy. On a cluster, policies that stand together and take as many GPUs
            have the same workers; where the number changes, the workers are replaced.
        work: Does them.

    Raises:
        MissingError: Fewer GPUs than processes, or no cluster.
        UsageError: One device for several processes, or unusable resources.
    """
    if config.ray is not None:
        made = _on_ray(config, jobs, work)
    elif environments := devices.processes(config):
        made = pool.in_order(
            iter(jobs),
            work,
            environments=environments,
            ahead=2 * len(environments),
            task=_TASK,
            hint=_HINT,
        )
    else:
        made = _here(jobs, work)
    with contextlib.closing(work), contextlib.closing(made):
        for unit, choices in made:
            console.keep(choices)
            yield unit


def _here(jobs: Iterable[Job], work: UnitWork) -> Generator[Any, None, None]:
    for policy, group in itertools.groupby(jobs, lambda job: job[0]):
        work.open(policy)  # before several threads ask for it
        if policy.backend == "openai":  # it has work while a window waits for its last reply
            yield from pool.in_threads(group, work, threads=2)
        else:
            yield from map(work, group)


def _on_ray(config: Any, jobs: Iterable[Job], work: UnitWork) -> Generator[Any, None, None]:
    for gpus, group in itertools.groupby(jobs, lambda job: _gpus_of(job[0])):
        placement = ray_pool.placement_of(config, gpus=gpus)
        assert placement is not None
        yield from ray_pool.in_order(group, work, placement=placement, task=_TASK, hint=_HINT)


def _gpus_of(policy: Policy) -> int:
    """GPUs that the policy's engine takes."""
    return ray_pool.gpus_of(policy.engine, "tensor", "pipeline", "data")
