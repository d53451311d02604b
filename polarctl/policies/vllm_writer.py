"""A policy run by vLLM's engine, in a process of its own: its memory is free when that ends.

Prompts are tokenized and texts decoded here, as for transformers; the engine sees token ids alone.
The samples of a prompt are requests of their own, each with its seed, that find the prompt in the
prefix cache.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from polarctl import console
from polarctl.errors import PolarctlError, UsageError, need
from polarctl.parallel.pool import OneWorker
from polarctl.policies.pool import Policy, Sampling
from polarctl.policies.served_policy import MOST_SEED
from polarctl.policies.writer import Writer

_OURS = ("model", "revision", "tokenizer", "dtype", "runner", "seed", "trust_remote_code")
# Prompts with their seeds and limits; token ids without the one that ended them, and whether one.
_Job = tuple[list[list[int]], list[int], list[int]]
_Written = list[tuple[list[int], bool]]


class VllmWriter(Writer):
    """A policy that vLLM runs. The engine is started when the policy first writes.

    Args:
        policy: Whose model and sampling; `engine` are arguments of `vllm.LLM`.
        device: Torch device name.
        dtype: Name of the precision.

    Raises:
        MissingError: vLLM, config or tokenizer is not there.
        UsageError: A chat policy without a chat template, or an argument that the stage sets.
    """

    def __init__(self, policy: Policy, *, device: str, dtype: str):
        for name in _OURS:
            if name in policy.engine:
                raise UsageError(f"{policy.where}: `engine`: `{name}` is set by the stage itself")
        if importlib.util.find_spec("vllm") is None:
            raise need("vllm", "vllm")
        super().__init__(policy, device=device, dtype=dtype, batch_size=0)
        asked = policy.engine.get("max_model_len")
        if isinstance(asked, int):
            self.context = min(asked, self.context or asked)
        self._engine: OneWorker[_Job, _Written] | None = None

    def close(self) -> None:
        """End the process, and so free its memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _written(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], on_done: Callable[[int], None]
    ) -> _Written:
        if self._engine is None:
            self._engine = self._start()
        limits = [self.limit(ids) for ids in prompts]
        small = [seed % MOST_SEED for seed in seeds]
        found = self._engine((list(prompts), small, limits))
        on_done(len(found))
        return found

    def _start(self) -> OneWorker[_Job, _Written]:
        policy = self.policy
        console.note(f"vLLM starts for policy `{policy.name}`")
        engine = VllmEngine(
            name=policy.name,
            where=policy.where,
            model=policy.model,
            revision=policy.revision,
            dtype=self.dtype,
            sampling=policy.sampling,
            stop=self._stop_tokens(self._generation_config()),
            options={"max_model_len": self.context, **policy.engine},
        )
        kind, _, index = self.device.partition(":")
        return OneWorker(
            engine,
            environment={"CUDA_VISIBLE_DEVICES": index} if kind == "cuda" and index else {},
            task=f"runs policy `{policy.name}` in vLLM",
            hint="mostly for want of memory: `gpu_memory_utilization` or `max_model_len` in "
            "`engine`; the same command goes on from here",
        )

    def _generation_config(self) -> Any:
        kind = transformers.GenerationConfig
        try:
            return kind.from_pretrained(self.policy.model, revision=self.policy.revision or "main")
        except (OSError, ValueError):  # a model without this file
            return kind.from_model_config(self.config)


@dataclass
class VllmEngine:
    """What the process does: start vLLM with the first job, then write.

    Attributes:
        name: Of the policy, for messages.
        where: Its place in the pool.
        model: Folder or Hub id.
        revision: Of a Hub id, or None.
        dtype: Name of the precision.
        sampling: How tokens are drawn.
        stop: Token ids that end a text.
        options: Further arguments of `vllm.LLM`; those that are None are left to it.
    """

    name: str
    where: str
    model: str
    revision: str | None
    dtype: str
    sampling: Sampling
    stop: list[int]
    options: Mapping[str, Any]
    _llm: Any = None

    def __call__(self, job: _Job) -> _Written:
        """Continue the prompts of a job.

        Raises:
            PolarctlError: vLLM does not start, or gives up a request.
        """
        self._llm = self._llm or self._started()
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        how = self.sampling
        greedy = how.top_k == 1
        params = [
            SamplingParams(
                temperature=0.0 if greedy else how.temperature,
                top_p=1.0 if greedy else how.top_p,
                top_k=0 if greedy else how.top_k,
                max_tokens=limit,
                seed=seed,
                stop_token_ids=self.stop,
                detokenize=False,
            )
            for seed, limit in zip(*job[1:], strict=True)
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job[0]]
        done = self._llm.generate(prompts, params, use_tqdm=False)
        return [self._one(each.outputs[0]) for each in done]

    def close(self) -> None:
        """End vLLM's own processes; called when the process of this one is closed."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()

    def _one(self, output: Any) -> tuple[list[int], bool]:
        ids = list(output.token_ids)
        if output.finish_reason == "length":
            return ids, False
        if output.finish_reason != "stop":
            raise PolarctlError(
                f"policy `{self.name}`: vLLM ends a text with `{output.finish_reason}`"
            )
        return (ids[:-1] if ids and ids[-1] in self.stop else ids), True

    def _started(self) -> Any:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        options = {name: value for name, value in self.options.items() if value is not None}
        try:
            return vllm.LLM(
                self.model,
                revision=self.revision,
                dtype=self.dtype,
                **{
                    "skip_tokenizer_init": True,
                    "enable_prefix_caching": True,
                    "generation_config": "vllm",  # not the model's: the pool says how to sample
                    "use_tqdm_on_load": False,
                    **options,
                },
            )
        except Exception as error:  # what an engine raises for a model, a GPU, an option ...
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            raise PolarctlError(
                f"{self.where}: vLLM does not start for policy `{self.name}`: {why}",
                hint='arguments of its engine go into `engine`, such as "max_model_len"',
            ) from error
