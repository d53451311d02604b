r"""Fine-tune a policy by reinforcement: GRPO with the POLAR reward against references.

Reads prompts with a `reference`. Writes a folder: the policy, `rollouts.jsonl` (trajectories with
their rewards), `metrics.jsonl` (a line a step) and `curves.png`. Prints the folder's path.

A policy with a chat template gets a text prompt as a user's message; one without continues the
text. --kl-coef 0, the default, loads no reference model, and then no KL is measured.

--engine verl and --engine openrlhf train nothing: the folder gets what these trainers need for PPO
on several machines (data, launch.sh, a README.md of what to start where), with the paper's settings
where none are given.

\b
polarctl rft prompts.jsonl -m models/policy --reward-model runs/rm -o runs/better
polarctl rft prompts.jsonl -m models/policy --reward-model runs/rm -o runs/ppo \
  --engine verl --server http://scorer:8000
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polarctl.config import Common, Device, Dtype, Needs

if TYPE_CHECKING:
    from polarctl.policies.writer import Writer
    from polarctl.records import Record
    from polarctl.storage.run_folder import Run

_FREE = frozenset({"save_steps", "micro_batch_size", "device"})
_SOURCES = ("model", "reward_model")


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl rft`."""

    ABSENT = frozenset({"manifest"})  # it marks the folder as complete
    NEEDS = [
        Needs("epochs", lambda c: c.max_steps is None, "a run without --max-steps"),
        Needs("server", lambda c: c.engine != "trl", "--engine verl and --engine openrlhf"),
    ]

    model: Annotated[str, typer.Option("--model", "-m", help="Policy: a folder or a Hub id.")]
    reward_model: Annotated[str, typer.Option(help="Reward model: a folder or a Hub id.")]
    num_generations: Annotated[
        int, typer.Option(min=2, help="Rollouts of one prompt, compared with each other.")
    ] = 8
    batch_size: Annotated[
        int,
        typer.Option(
            min=2, help="Rollouts of one optimiser step; a multiple of --num-generations."
        ),
    ] = 64
    micro_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rollouts of one forward pass on one device; default: all."),
    ] = None
    epochs: Annotated[float, typer.Option(min=1e-6, help="Passes over the prompts.")] = 1.0
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps, in place of --epochs.")
    ] = None
    lr: Annotated[float, typer.Option(min=0, help="Learning rate, constant.")] = 1e-6
    temperature: Annotated[float, typer.Option(min=1e-6, help="Sampling temperature.")] = 1.0
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Share of the probability that is kept.")
    ] = 1.0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one rollout.")] = 512
    kl_coef: Annotated[
        float, typer.Option(min=0, help="Weight of the KL to the policy at the start.")
    ] = 0.0
    loss_type: Annotated[
        Literal["dapo", "grpo", "dr_grpo", "bnpo"],
        typer.Option(help="How tokens are weighted."),
    ] = "dapo"
    normalize: Annotated[
        Literal["none", "polar-1.8b", "polar-7b"], typer.Option(help="Scale of the reward.")
    ] = "none"
    strip_thinking: Annotated[
        bool, typer.Option("--strip-thinking", help="Score rollouts without <think>...</think>.")
    ] = False
    reward_floor: Annotated[
        str,
        typer.Option(
            metavar="VALUE",
            help="Raw reward of a rollout without an answer: empty, in an unfinished thought, or "
            "cut off by --max-new-tokens. A number, or none; auto is -20.",
        ),
    ] = "auto"
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one pass of the reward model, with padding.")
    ] = 8192
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100
    device: Device = "auto"
    dtype: Dtype = "auto"
    # -- who trains --
    engine: Annotated[
        Literal["trl", "verl", "openrlhf"],
        typer.Option(help="Train here, or write what verl or OpenRLHF need to train elsewhere."),
    ] = "trl"
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where the reward model will be, for --engine."),
    ] = None


def run(config: Config) -> None:
    """Train the policy on the input's prompts."""
    from polarctl.model import devices
    from polarctl.scoring.answers import floor_of

    devices.show_one_gpu(config.device)  # before torch is imported by any of the others
    from polarctl.policies.pool import Policy, Sampling
    from polarctl.policies.writer import Writer
    from polarctl.rl import grpo, other_trainers
    from polarctl.rl.callback import check_shape
    from polarctl.scoring.reward_function import normalise
    from polarctl.storage import run_folder, windows

    normalise([], config.normalize)
    floor_of(config.reward_floor, None)
    if config.engine != "trl":
        other_trainers.check_options("rft", config)
    else:
        grpo.require()
        check_shape(config)
    devices.quiet_libraries()
    name = Path(config.model).resolve().name if Path(config.model).is_dir() else config.model
    policy = Policy(
        name=name, model=config.model, sampling=Sampling(max_new_tokens=config.max_new_tokens)
    )
    # Nothing is written by it here: it knows what the policy can read.
    writer = Writer(policy, device="cpu", dtype=None, batch_size=1)
    other_trainers.check_policy(config, writer)
    verify = verifier(writer)
    paths = windows.inputs_of("rft", config)
    if config.dry_run:
        facts: dict[str, Any] = {}
        if config.engine != "trl":
            facts["writes"] = other_trainers.plan(config)
        windows.dry_run("rft", config, paths, "prompt", verify=verify, **facts)
        return
    with run_folder.opened("rft", config, paths, sources=_SOURCES, free=_FREE) as run:
        if run is not None:
            _train(config, run, writer, verify)


def verifier(writer: Writer) -> Callable[[Record], None]:
    """A check that a record has a reference and that the policy can read and answer its prompt."""
    from polarctl.errors import RecordError

    def verify(record: Record) -> None:
        if "reference" not in record:
            raise RecordError(
                "missing field `reference`", hint="the POLAR reward compares with a reference"
            )
        (ids,) = writer.encode([record["prompt"]])
        if not isinstance(ids, list):
            raise RecordError(ids.reason)
        asked = writer.policy.sampling.max_new_tokens
        if writer.context is not None and len(ids) + asked > writer.context:
            raise RecordError(
                f"the prompt's {len(ids):,} tokens and {asked:,} new ones are more than the "
                f"policy's context of {writer.context:,}",
                hint="a smaller --max-new-tokens, or --rejects FILE sets such prompts aside",
            )

    return verify


def row_of(record: Record, chat: bool) -> dict[str, Any]:
    """A prompt as the trainer takes it: `prompt` (messages or text), `reference`, `wrapper`.

    Args:
        record: A prompt with a reference.
        chat: The policy has a chat template. Without, messages are reduced to their text.
    """
    from polarctl.model.template import content_text

    prompt: Any = record["prompt"]
    if not chat:
        prompt = content_text(prompt)
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    else:
        prompt = [{"role": m["role"], "content": content_text([m])} for m in prompt]
    return {
        "prompt": prompt,
        "reference": record["reference"],
        "wrapper": record.get("wrapper", "sft" if chat else "pretrain"),
    }


def _train(config: Config, run: Run, writer: Writer, verify: Callable[[Record], None]) -> None:
    from polarctl.rl import other_trainers
    from polarctl.storage.rejects import read_all, rejects_of

    with rejects_of(run, config) as rejects:
        run = read_all(run, config, "prompt", verify, rejects)
        if config.engine == "trl":
            _improve(config, run, writer)
        else:
            counts = other_trainers.write(other_trainers.Handover(config, run.records, writer), run)
            run.finish("rft", config, counts)


def _improve(config: Config, run: Run, writer: Writer) -> None:
    from polarctl import console
    from polarctl.rl import grpo
    from polarctl.rl.callback import PolicyRun

    chat = writer.chat
    console.choice(
        "prompts",
        "chat" if chat else "text",
        f"the policy's tokenizer has {'a' if chat else 'no'} chat template",
    )
    rows = [row_of(record, chat) for record in run.records]
    job = PolicyRun(
        config=config,
        run=run,
        rows=rows,
        policy=writer.policy,
        tokenizer=writer.tokenizer,
        thinking_opened=chat and _opens_thinking(writer, rows[0]["prompt"]),
    )
    counts = grpo.train(job)
    if counts is not None:
        run.finish("rft", config, {"prompts": len(rows), **counts})


def _opens_thinking(writer: Writer, prompt: Any) -> bool:
    """The chat template ends a prompt in `<think>`, so answers begin inside that part."""
    (ids,) = writer.encode([prompt])
    return bool(writer.tokenizer.decode(ids).rstrip().endswith("<think>"))
