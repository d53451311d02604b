"""Training that verl or OpenRLHF do: `rft` writes what they need.

PPO on several machines is theirs. The settings are the paper's where `rft` does not name others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polarctl import console
from polarctl.errors import RecordError
from polarctl.model import devices
from polarctl.policies.pool import Policy, Sampling
from polarctl.policies.writer import Writer
from polarctl.records import Record
from polarctl.rl import for_openrlhf, for_verl
from polarctl.rl.handover import Handover, check_options, check_policy, plan
from polarctl.scoring.answers import floor_of
from polarctl.scoring.reward_function import normalise
from polarctl.storage import run_folder, windows
from polarctl.storage.rejects import read_all, rejects_of


def hand_over(stage: str, config: Any, verifier: Callable[..., Callable[[Record], None]]) -> None:
    """Write a folder with all that the engine needs.

    Args:
        stage: Name of the stage.
        config: Its options.
        verifier: From a `Writer` and a check of the rewards to the check of a prompt record.

    Raises:
        PolarctlError: Options or prompts that the engine cannot use.
    """
    check_options(stage, config)
    normalise([], config.normalize)
    floor_of(config.reward_floor, None)
    devices.quiet_libraries()
    policy = Policy(
        name=config.model,
        model=config.model,
        sampling=Sampling(max_new_tokens=config.max_new_tokens),
    )
    writer = Writer(policy, device="cpu", dtype=None, batch_size=1)
    check_policy(config, writer)
    verify = verifier(writer, _has_reference)
    paths = windows.inputs_of(stage, config)
    if config.dry_run:
        windows.dry_run(stage, config, paths, "prompt", verify=verify, writes=plan(config))
        return
    sources = ("model", "reward_model")
    with run_folder.opened(stage, config, paths, sources=sources, free=frozenset()) as run:
        if run is not None:
            with rejects_of(run, config) as rejects:
                run = read_all(run, config, "prompt", verify, rejects)
            run.finish(stage, config, _write(Handover(config, run.records, writer), run))


def _has_reference(record: Record) -> None:
    if "reference" not in record:
        raise RecordError(
            "missing field `reference`", hint="the POLAR reward compares with a reference"
        )


def _write(job: Handover, run: run_folder.Run) -> dict[str, Any]:
    """Write the folder's files, and give the numbers for the manifest.

    Raises:
        UsageError: Too few prompts.
        MissingError: pyarrow is not installed.
        PolarctlError: verl is installed and does not read its data.
    """
    if len(job.records) < job.prompts_per_step:
        console.warn(
            f"{len(job.records):,} prompts are fewer than the {job.prompts_per_step:,} of one step "
            "(--batch-size)"
        )
    target = run.part()
    return (for_verl if job.config.engine == "verl" else for_openrlhf).write(job, target)
