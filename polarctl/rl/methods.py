"""The methods of `polarctl rft` as trainers of TRL: our options in TRL's words.

    grpo      the advantage of a rollout is its distance to its group's mean, in the group's spread
    rloo      ... its distance to the mean of the others of its group
    distill   the best rollout of each group is learned from, as if it were a reference
    sft       the references themselves are learned from

All of them go through the same prompts in the same order: a step of `sft` and of `distill` learns
from one text for each prompt that a step of the others samples a group for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import huggingface_hub.constants
import torch
import transformers
import trl
from trl.trainer.utils import disable_dropout_in_model

from polarctl import seeding
from polarctl.parallel import rank
from polarctl.rl.callback import PolicyRun, Recorder
from polarctl.training import lora, zero

huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL sends a ping otherwise
datasets.disable_progress_bars()


class BestOfN(trl.GRPOTrainer):
    """Learns from the best rollout of each prompt: the mean negative log-likelihood of its tokens.

    The policy samples anew at every step (RAFT, arXiv 2304.06767). Of equal rollouts the first is
    taken. A group in which every rollout got the reward floor teaches nothing.
    """

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        taken = best_of(
            list(self._logs["extra"]["used"]),
            list(self._logs["extra"]["floored"]),
            self.num_generations,
        )
        # What the records show: 1 for a rollout that is learned from, else 0.
        self._logs["advantages"].extend(map(float, taken))
        first = self.accelerator.process_index * len(inputs)
        mine = torch.tensor(taken[first : first + len(inputs)], device=self.accelerator.device)
        batch["completion_mask"] = batch["completion_mask"] * mine[:, None]
        tokens = batch["completion_mask"].sum()
        batch["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        learned = inputs["completion_mask"].any(dim=1)
        learned[0] |= ~learned.any()  # every process takes part in every exchange
        part = {
            name: inputs[name][learned]
            for name in ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")
        }
        mask = part["completion_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1),
            torch.cat([part["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
        )
        sums = torch.stack([(entropies * mask).sum(), mask.sum().float()])
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train"]["entropy"].append(total / max(tokens, 1.0))
        # The gradients of the processes are averaged.
        share = self.accelerator.num_processes / inputs["num_items_in_batch"].clamp(min=1)
        return -(logps * mask).sum() * share


class Supervised(trl.SFTTrainer):
    """Learns from given texts; its count of tokens survives a resume, as the other trainers' do."""

    def log(self, logs: dict[str, float], *given: Any) -> None:
        """Count the tokens of all steps, not of those that this process has done."""
        done = self.state.global_step * self.args.gradient_accumulation_steps
        rows = done * self.args.per_device_train_batch_size * self.accelerator.num_processes
        self._metrics["train"]["num_tokens"] = [self._tokens_of(rows)]
        super().log(logs, *given)

    def _tokens_of(self, rows: int) -> int:
        if not hasattr(self, "_sums"):
            self._sums = [0, *itertools.accumulate(map(len, self.train_dataset["input_ids"]))]
        return int(self._sums[rows])


def best_of(rewards: Sequence[float], floored: Sequence[str], group: int) -> list[int]:
    """1 for the best of each group, 0 for the others and for all of a group without an answer.

    Args:
        rewards: Of the rollouts, group after group.
        floored: Why a rollout has no answer; empty: it has one.
        group: Rollouts of a group.
    """
    taken = [0] * len(rewards)
    for first in range(0, len(rewards), group):
        rows = [row for row in range(first, first + group) if not floored[row]]
        if rows:
            taken[max(rows, key=rewards.__getitem__)] = 1
    return taken


@dataclass(frozen=True)
class Parts:
    """What every trainer is made of.

    Attributes:
        job: The run.
        place: Torch device name.
        dtype: Torch dtype to compute in.
        policy: The model, in float32.
        tokenizer: Its tokenizer; the trainer may change it.
        recorder: Watches the trainer.
    """

    job: PolicyRun
    place: str
    dtype: Any
    policy: Any
    tokenizer: Any
    recorder: Recorder

    def trainer(self, kind: Any, rows: list[dict[str, Any]], **more: Any) -> Any:
        """A trainer that goes through the rows in the run's order."""
        config, adapters = self.job.config, None
        if config.lora_rank is not None:
            adapters = lora.adapters("CAUSAL_LM", rank=config.lora_rank, alpha=config.lora_alpha)
        trainer = kind(
            model=self.policy,
            args=_arguments(self.job, self.place, self.dtype),
            train_dataset=datasets.Dataset.from_list(rows).select(self.job.order()),
            processing_class=self.tokenizer,
            callbacks=[self.recorder],
            peft_config=adapters,
            **more,
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        return trainer


def sampling(made: Parts, reward: Callable[..., Any]) -> Any:
    """A trainer that learns from rollouts.

    Args:
        made: What it is made of.
        reward: A reward function as TRL calls it; it is given the number of each prompt as `row`.
    """
    kinds = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer, "distill": BestOfN}
    rows = [{"prompt": row["prompt"], "row": n} for n, row in enumerate(made.job.rows)]
    trainer = made.trainer(kinds[made.job.config.method], rows, reward_funcs=reward)
    if made.job.config.rollouts == "vllm" and made.place == "cpu":
        _reload_on_cpu(trainer.vllm_generation)
    return trainer


def _reload_on_cpu(generation: Any) -> None:
    """Have vLLM take the policy's weights on a CPU.

    TRL copies them into vLLM's layers, which there have given up their weights for packed ones. So
    vLLM is asked to load them as it does at its start.
    """

    def sync_weights() -> None:
        runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=generation._iter_named_params())
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights


def supervised(made: Parts, rows: list[dict[str, Any]]) -> Any:
    """A trainer that learns from texts.

    Args:
        made: What it is made of.
        rows: `input_ids` and `labels` of each prompt with its reference.
    """
    disable_dropout_in_model(made.policy)  # as the trainers that sample do
    return made.trainer(Supervised, rows)


def _arguments(job: PolicyRun, place: str, dtype: Any) -> Any:
    """The options in TRL's words."""
    config, on_cpu = job.config, place == "cpu"
    processes = rank.count()
    micro = config.micro_batch_size or job.texts_per_step // processes
    common: dict[str, Any] = {
        "output_dir": str(job.run.checkpoints),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job.texts_per_step // (micro * processes),
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "max_steps": job.steps,
        "seed": seeding.derive(config.seed, "rft") % 2**32,
        "shuffle_dataset": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        # It would switch DeepSpeed off, which is told otherwise to stay on the CPU.
        "use_cpu": on_cpu and config.deepspeed is None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": not on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    if config.deepspeed is not None:
        common["deepspeed"] = _deepspeed(config, dtype)
        common["accelerator_config"] = {"use_configured_state": True}
    if config.method == "sft":
        arguments = trl.SFTConfig(**common, max_length=None)
    else:
        common |= {
            "num_generations": config.num_generations,
            "max_completion_length": config.max_new_tokens,
            "top_p": config.top_p,
            "disable_dropout": True,
            **_vllm(config),
        }
        heated = {"temperature": config.temperature}
        if config.method == "grpo":
            arguments = trl.GRPOConfig(
                **common, **heated, beta=config.kl_coef, loss_type=config.loss_type
            )
        elif config.method == "rloo":
            arguments = trl.RLOOConfig(**common, **heated, beta=config.kl_coef)
        else:  # the likelihood of the best is the policy's own, however it was sampled
            arguments = trl.GRPOConfig(**common, temperature=1.0, generation_kwargs=heated)
            arguments.vllm_importance_sampling_correction = False
    if processes == 1 and not on_cpu:
        # The trainer would copy the model to every GPU that CUDA knew before one was chosen.
        arguments._n_gpu = 1
    return arguments


def _deepspeed(config: Any, dtype: Any) -> dict[str, Any]:
    """DeepSpeed's config; the trainer says itself what a step is."""
    name = str(dtype).removeprefix("torch.")
    made = zero.config_of(config.deepspeed, dtype=name, clip=1.0)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        made[key] = "auto"
    if made["zero_optimization"]["stage"] == 3:  # else a policy would be written without weights
        made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return made | {"gradient_clipping": "auto"}


def _vllm(config: Any) -> dict[str, Any]:
    """Who writes the rollouts."""
    if config.rollouts == "transformers":
        return {}
    if config.rollouts == "vllm":
        return {"use_vllm": True, "vllm_mode": "colocate"}
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": config.vllm_server}
