r"""Fine-tune a policy by reinforcement: GRPO with the POLAR reward against references.

Reads prompts with a `reference`. Writes a folder: the policy, `rollouts.jsonl` (trajectories with
their rewards), `metrics.jsonl` (a line a step) and `curves.png`. Prints the folder's path.

--method rloo is another estimate of the advantage. Two baselines go through the same prompts in the
same steps, with one text a prompt: distill learns from the best of the policy's own rollouts, sft
from the references; sft needs no reward model and writes no rollouts.

A policy with a chat template gets a text prompt as a user's message; one without continues the
text. --kl-coef 0, the default, loads no reference model, and then no KL is measured.

--engine verl and --engine openrlhf train nothing: the folder gets what these trainers need for PPO
on several machines (data, launch.sh, a README.md of what to start where), with the paper's settings
where none are given.

\b
polarctl rft prompts.jsonl -m models/policy --reward-model runs/rm -o runs/better
polarctl rft prompts.jsonl -m models/policy --reward-model runs/rm -o ppo --engine verl --server URL
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polarctl.config import DeepSpeed, Device, Dtype, Gpus, LoraAlpha, Needs, Nnodes, SaveMinutes
from polarctl.rl.options import RewardConfig

if TYPE_CHECKING:
    from polarctl.policies.writer import Writer
    from polarctl.records import Record
    from polarctl.rl.registry import Checker
    from polarctl.storage.run_folder import Run

_FREE = frozenset({"save_steps", "save_minutes", "micro_batch_size", "device", "gpus", "nnodes"})
_SOURCES = ("model", "reward_model")


@dataclass(frozen=True, kw_only=True)
class Config(RewardConfig):
    """Options of `polarctl rft`."""

    ABSENT = frozenset({"manifest"})  # it marks the folder as complete
    NEEDS = [
        Needs("epochs", lambda c: c.max_steps is None, "a run without --max-steps"),
        Needs("loss_type", lambda c: c.method == "grpo", "--method grpo"),
        Needs("kl_coef", lambda c: c.method in ("grpo", "rloo"), "--method grpo and rloo"),
        Needs(
            "reward reward_model server overlong_buffer normalize reward_floor batch_tokens "
            "rollouts",
            lambda c: c.method != "sft",
            "methods with rollouts: --method sft writes and scores none",
        ),
        Needs(
            "strip_thinking temperature top_p max_new_tokens",
            lambda c: c.method != "sft" or c.check is not None,
            "methods with rollouts, or --check: --method sft writes nothing else",
        ),
        Needs("lora_alpha", lambda c: c.lora_rank or c.preset == "laptop", "a run with LoRA"),
        Needs("vllm_server", lambda c: c.rollouts == "vllm-server", "--rollouts vllm-server"),
    ]

    model: Annotated[str, typer.Option("--model", "-m", help="Policy: a folder or a Hub id.")]
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
    save_minutes: SaveMinutes = 30.0
    # -- how it is trained --
    method: Annotated[
        Literal["grpo", "rloo", "sft", "distill"],
        typer.Option(help="How the policy learns."),
    ] = "grpo"
    preset: Annotated[
        Literal["polar-paper", "laptop"] | None,
        typer.Option(help="Defaults by name: those of the paper, or of a small machine."),
    ] = None
    rollouts: Annotated[
        Literal["transformers", "vllm", "vllm-server"],
        typer.Option(help="What writes them: vllm shares the GPU with the training."),
    ] = "transformers"
    vllm_server: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of `vllm serve`.")
    ] = None
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Train low-rank adapters alone.")] = (
        None
    )
    lora_alpha: LoraAlpha = None
    deepspeed: DeepSpeed = None
    gpus: Gpus = 1
    nnodes: Nnodes = 1
    device: Device = "auto"
    dtype: Dtype = "auto"
    # -- who trains --
    engine: Annotated[
        Literal["trl", "verl", "openrlhf"],
        typer.Option(help="Train here, or write what verl or OpenRLHF need to train elsewhere."),
    ] = "trl"


def run(config: Config) -> None:
    """Train the policy on the input's prompts, or write what another trainer needs for it."""
    if config.engine != "trl":
        from polarctl.rl import other_trainers

        other_trainers.hand_over("rft", config, verifier)
        return
    from polarctl.model import devices
    from polarctl.parallel import launcher
    from polarctl.scoring.answers import floor_of

    if not config.dry_run and launcher.launch(
        "rft", gpus=config.gpus, nnodes=config.nnodes, device=config.device, inputs=config.input
    ):
        return
    devices.show_one_gpu(config.device)  # before torch is imported by any of the others
    from polarctl.policies.pool import Policy, Sampling
    from polarctl.policies.writer import Writer
    from polarctl.rl import presets, registry, trainer
    from polarctl.rl.callback import check_shape
    from polarctl.scoring.reward_function import normalise
    from polarctl.storage import run_folder, windows

    config = presets.applied(config)
    check_method(config)
    trainer.require(config)
    normalise([], config.normalize)
    floor_of(config.reward_floor, None)
    check_shape(config)
    registry.check_names(config)
    devices.quiet_libraries()
    name = Path(config.model).resolve().name if Path(config.model).is_dir() else config.model
    policy = Policy(
        name=name, model=config.model, sampling=Sampling(max_new_tokens=config.max_new_tokens)
    )
    # Nothing is written by it here: it knows what the policy can read.
    writer = Writer(policy, device="cpu", dtype=None, batch_size=1)
    paths, files = windows.inputs_of("rft", config), registry.sources_of(config)
    with contextlib.closing(registry.Checker(config)) as checker:
        verify = verifier(writer, checker, config.method)
        if config.dry_run:
            windows.dry_run("rft", config, paths, "prompt", verify=verify)
            return
        with run_folder.opened(
            "rft", config, paths, sources=_SOURCES, free=_FREE, files=files
        ) as run:
            if run is not None:
                _train(config, run, writer, checker, verify)


def check_method(config: Config) -> None:
    """Raise UsageError for a method without what it needs, or with what it cannot use."""
    from polarctl.errors import UsageError

    if config.rollouts == "vllm-server" and config.vllm_server is None:
        raise UsageError(
            "`--rollouts vllm-server` needs `--vllm-server URL`",
            hint="--vllm-server http://127.0.0.1:8000",
        )
    if config.deepspeed is not None and config.dtype == "float16":
        raise UsageError("`float16` does not train with ZeRO", hint="--dtype bfloat16 or float32")


def verifier(
    writer: Writer, rewards: Callable[[Record], None], method: str = "grpo"
) -> Callable[[Record], None]:
    """A check that a record can be rewarded and that the policy can read and answer its prompt.

    Args:
        writer: Knows what the policy can read.
        rewards: Raises RecordError for a record that cannot be rewarded.
        method: For `sft` the reference is the answer.
    """
    from polarctl.errors import RecordError
    from polarctl.model.template import content_text

    def verify(record: Record) -> None:
        rewards(record)
        (ids,) = writer.encode([record["prompt"]])
        if not isinstance(ids, list):
            raise RecordError(ids.reason)
        asked, hint = writer.policy.sampling.max_new_tokens, "a smaller --max-new-tokens, or "
        if method == "sft":
            text = content_text(record["reference"])
            asked, hint = len(writer.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1, ""
        if writer.context is not None and len(ids) + asked > writer.context:
            raise RecordError(
                f"the prompt's {len(ids):,} tokens and {asked:,} new ones are more than the "
                f"policy's context of {writer.context:,}",
                hint=f"{hint}--rejects FILE sets such prompts aside",
            )

    return verify


def row_of(record: Record, chat: bool) -> dict[str, Any]:
    """A prompt as the trainer takes it: `prompt` (messages or text), `reference`, `wrapper`.

    Args:
        record: A prompt; POLAR needs its reference.
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
        "reference": record.get("reference"),
        "wrapper": record.get("wrapper", "sft" if chat else "pretrain"),
    }


def _train(
    config: Config,
    run: Run,
    writer: Writer,
    checker: Checker,
    verify: Callable[[Record], None],
) -> None:
    from polarctl.storage.rejects import read_all, rejects_of

    with rejects_of(run, config) as rejects:
        run = read_all(run, config, "prompt", verify, rejects)
        checker.finish()
        _improve(config, run, writer)


def _improve(config: Config, run: Run, writer: Writer) -> None:
    from polarctl import console
    from polarctl.rl import check, trainer
    from polarctl.rl.callback import PolicyRun

    chat = writer.chat
    console.choice(
        "prompts",
        "chat" if chat else "text",
        f"the policy's tokenizer has {'a' if chat else 'no'} chat template",
    )
    opened = chat and _opens_thinking(writer, run.records[0]["prompt"])
    run, watch = check.prepared(config, run, writer, lambda own: verifier(writer, own), opened)
    rows = [row_of(record, chat) for record in run.records]
    job = PolicyRun(
        config=config,
        run=run,
        rows=rows,
        policy=writer.policy,
        tokenizer=writer.tokenizer,
        thinking_opened=opened,
        check=watch,
    )
    counts = trainer.train(job)
    if counts is not None:
        run.finish("rft", config, {"prompts": len(rows), **counts})


def _opens_thinking(writer: Writer, prompt: Any) -> bool:
    """The chat template ends a prompt in `<think>`, so answers begin inside that part."""
    (ids,) = writer.encode([prompt])
    return bool(writer.tokenizer.decode(ids).rstrip().endswith("<think>"))
