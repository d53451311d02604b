"""A trainer of TRL, made to keep our promises about output folders, resume and silence.

The order of the prompts over all epochs is laid out beforehand, so that the trainer walks one
fixed list and a resume only has to know the step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonlines
import orjson
import torch

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, UsageError, need
from polarctl.model import devices, reward_model
from polarctl.parallel import rank, stopping
from polarctl.policies.writer import load_causal_lm
from polarctl.rl import references, registry, rollouts
from polarctl.rl.callback import PolicyRun, Recorder
from polarctl.rl.reward_batch import Batch
from polarctl.scoring.answers import REWARD_FLOOR, floor_of
from polarctl.scoring.scorer import Floored
from polarctl.storage import atomic, checkpoint, run_folder
from polarctl.training import lora, zero


def require(config: Any = None) -> None:
    """Raise MissingError when a package that this needs is not installed.

    Args:
        config: The options of `polarctl rft`; None: what every run needs.
    """
    wanted = {"trl": "rft", "datasets": "rft"}
    if config is not None:
        wanted |= {"peft": "lora"} if config.lora_rank is not None else {}
        wanted |= {"deepspeed": "deepspeed"} if config.deepspeed is not None else {}
        wanted |= {"vllm": "vllm"} if config.rollouts != "transformers" else {}
    for name, extra in wanted.items():
        if importlib.util.find_spec(name) is None:
            raise need(name, extra)


def train(job: PolicyRun) -> dict[str, Any] | None:
    """Train, write the policy and its records, and give the numbers for the manifest.

    Returns:
        Counts, or None in a process that does not write.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
        PolarctlError: The loss is not finite, the memory is full, or the scorer failed.
    """
    devices.quiet_libraries()
    place = _device(job.config.device)
    dtype = devices.dtype_of(job.config.dtype, place)
    if job.config.rollouts == "vllm-server" and place == "cpu":
        raise MissingError(
            "a vLLM server gets the policy's weights by NCCL, which needs a GPU",
            hint="--rollouts vllm or transformers",
        )
    if job.config.deepspeed is not None:
        # A bad config is said before DeepSpeed has started.
        zero.config_of(job.config.deepspeed, dtype=str(dtype).removeprefix("torch."), clip=1.0)
        zero.ready_for_a_trainer(cpu=place == "cpu")
    with ExitStack() as held:
        reward = None
        if job.samples:
            reward = registry.open_rewards(
                job.config,
                device=place,
                dtype=str(dtype).removeprefix("torch."),
                thinking_opened=job.thinking_opened,
            )
            held.callback(reward.close)
            known = job.run.identity | reward.served()
            job = replace(job, run=replace(job.run, identity=known))
        if job.check is not None:
            held.callback(job.check.verifier.close)
        trainer = _trained(job, place, dtype, reward)
    if job.check is not None:
        job.check.restore(trainer)
    return _finish(job, trainer)


def _trained(job: PolicyRun, place: str, dtype: Any, reward: registry.Rewards | None) -> Any:
    """The trainer after its last step."""
    recorder = Recorder(job)
    trainer = _trainer(job, place, dtype, reward, recorder)
    recorder.trainer = trainer
    trainer.accelerator.wait_for_everyone()
    resume = _resume(job.run)
    size = sum(p.numel() for p in trainer.model.parameters())
    group = f"{job.config.num_generations} rollouts" if job.samples else "its reference"
    console.note(
        f"rft: {len(job.rows):,} prompts, {job.steps:,} steps of {job.prompts_per_step} prompts x "
        f"{group}, {size:,} parameters"
    )
    done = int(resume.name.rpartition("-")[2]) if resume else 0
    # Most of the time goes into decoding, where there is any.
    under = devices.SMALL_TO_DECODE if job.samples else devices.SMALL_TO_COMPUTE
    threads = devices.threads_for(trainer.model, *(reward.modules if reward else ()), under=under)
    # The trainer reads as data whatever it knows of; this holds for what a launcher adds to it.
    safely = checkpoint.data_only(resume) if resume else nullcontext()
    with recorder.open(done), _plain_errors(job), threads, safely:
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except PolarctlError:
            recorder.keep_if_failed()
            raise
    if trainer.state.global_step < job.steps and not recorder.early:
        raise stopping.stopped(recorder.stopped_by, trainer.state.global_step, job.steps)
    return trainer


def _device(name: str) -> str:
    """The device of this process, which `launch.show_one_gpu` has shown no other GPU."""
    # The one that is shown is the first of those that there are.
    place = devices.device_of("cuda" if name.startswith("cuda:") else name)
    own = rank.local()
    return f"cuda:{own}" if place.startswith("cuda") and own is not None else place


def _resume(run: run_folder.Run) -> Path | None:
    found = checkpoint.newest(run.checkpoints)
    if found is None:
        return None
    target, mark = found
    run.same(mark["identity"])
    console.note(f"{run.target}: going on after step {mark['step']}")
    return target


def _trainer(
    job: PolicyRun, place: str, dtype: Any, reward: registry.Rewards | None, recorder: Recorder
) -> Any:
    from polarctl.rl import methods  # TRL is known to be there by now

    # Weights and optimiser stay in float32: steps of 1e-6 vanish in bfloat16.
    policy = load_causal_lm(job.policy, "cpu", torch.float32)
    tokenizer = reward_model.load_tokenizer(job.policy.model)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UsageError(
            f"{job.policy.model}: its tokenizer names neither a token that ends a text nor padding",
            hint='set "eos_token" in its tokenizer_config.json',
        )
    made = methods.Parts(job, place, dtype, policy, tokenizer, recorder)
    if reward is None:
        rows = references.encode(
            job.rows, tokenizer, policy.generation_config.eos_token_id, job.thinking_opened
        )
        return methods.supervised(made, rows)

    def polar(*, prompts: Any, completions: Any, completion_ids: Any, row: Any, **more: Any) -> Any:
        batch = Batch(
            records=[job.run.records[number] for number in row],
            rows=[job.rows[number] for number in row],
            prompts=prompts,
            completions=completions,
            tokens=list(map(len, completion_ids)),
            ended=[ids[-1] in trainer.eos_token_ids for ids in completion_ids],
            numbers=row,
        )
        found = reward(batch)
        extra = {"row": row, "tokens": batch.tokens, "ended": batch.ended, **vars(found)}
        for name, column in extra.items():
            more["log_extra"](name, column)
        return found.used

    try:
        trainer = methods.sampling(made, recorder.guarded(polar))
    except ConnectionError as error:
        raise MissingError(
            f"{job.config.vllm_server}: no vLLM server there: {reward_model.first_line(error)}",
            hint=f"vllm serve {job.policy.model} --weight-transfer-config "
            """'{"backend": "nccl"}'""",
        ) from None
    return trainer


@contextmanager
def _plain_errors(job: PolicyRun) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        rows = job.config.micro_batch_size or job.config.batch_size
        raise PolarctlError(
            "the GPU's memory is full",
            hint=f"--micro-batch-size {max(1, rows // 2)}, or fewer --max-new-tokens",
        ) from None
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise PolarctlError(
            "the policy's probabilities are not finite, stopped", hint="a lower --lr"
        ) from None


def _finish(job: PolicyRun, trainer: Any) -> dict[str, Any] | None:
    """Write the policy in the precision that it came in, its tokenizer and the plots."""
    target = job.run.part()
    before = reward_model.load_config(job.policy.model)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.config.use_cache = getattr(before, "use_cache", True)  # the trainer turns it off
    if job.config.lora_rank is not None:
        with zero.whole(policy):
            if rank.is_first():
                lora.save(policy, target / "adapter")
                plain = lora.merged(policy)
                plain.to(before.dtype or plain.dtype).save_pretrained(target)
    else:
        if before.dtype is not None and not trainer.is_deepspeed_enabled:
            policy.to(before.dtype)
        trainer.save_model(str(target))
    if not rank.is_first():
        return None
    (target / "training_args.bin").unlink(missing_ok=True)
    job.tokenizer.save_pretrained(target)
    atomic.open_to_umask(target)
    with jsonlines.open(job.run.folder / run_folder.METRICS, loads=orjson.loads) as lines:
        entries: Sequence[Any] = list(lines)
    if job.check is not None:
        atomic.write(target / "held_out.jsonl", job.check.held_out())
    for name, image in rollouts.curves(entries).items():
        atomic.write(target / name, image)
    last = {f"last_{key}": v for key, v in entries[-1].items() if key not in ("step", "alarms")}
    last |= job.check.counts() if job.check is not None else {}
    if not job.samples:
        return {"steps": len(entries), **last}
    floored, floor = Floored(), floor_of(job.config.reward_floor, REWARD_FLOOR)
    with jsonlines.open(job.run.folder / run_folder.ROLLOUTS, loads=orjson.loads) as lines:
        for count, row in enumerate(lines, 1):  # noqa: B007
            by_polar = row["components"].get("polar")
            if by_polar is not None:
                floored.count(by_polar, row.get("floored"), floor)
    floored.say(floor)
    return {"steps": len(entries), "rollouts": count, "floored": dict(floored), **last}
