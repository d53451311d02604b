"""Scoring by vLLM's engine in this program: paged, batched as it goes, prefixes cached.

The candidates of a group are asked for one after the other, so that each finds the prefix of the
one before it in the cache. The engine reads a plain sequence classifier whose config says
"regression", so what it gives are raw rewards; a published InternLM2 checkpoint is converted once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, UsageError, need
from polarctl.model import devices, reward_model
from polarctl.model.internlm2 import config as internlm2
from polarctl.model.internlm2 import convert
from polarctl.scoring.scorer import Item, Scored, check_finite, score_ids
from polarctl.storage import manifest

_OURS = ("model", "runner", "dtype", "max_model_len")


class VllmScorer:
    """Scores with vLLM's offline engine; see `polarctl.scoring.scorer.Scorer`.

    Args:
        path: Folder or Hub id of a reward model.
        dtype: `auto` (chosen and said as for transformers), `float32`, `bfloat16` or `float16`.
        engine_options: Further arguments of `vllm.LLM`.

    Raises:
        MissingError: vLLM is not installed, or the model is not there.
        UsageError: An option that is not the user's to set, or that vLLM refuses.
    """

    def __init__(self, path: str, *, dtype: str, engine_options: Mapping[str, Any] | None = None):
        options = dict(engine_options or {})
        for name in _OURS:
            if name in options:
                raise UsageError(f"`--engine-option {name}`: is set by the stage itself")
        self.encoder = reward_model.load_encoder(path)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
        except ImportError:
            raise need("vllm", "vllm") from None
        from vllm.platforms import current_platform

        where = "cpu" if current_platform.is_cpu() else "cuda"
        precision = str(devices.dtype_of(dtype, where)).removeprefix("torch.")
        folder = _plain(path)
        # The default of vLLM for pooling models, unless the checkpoint's config says otherwise.
        overrides = {"head_dtype": "float32"}
        if isinstance(options.get("hf_overrides"), Mapping):
            options["hf_overrides"] = {**overrides, **options["hf_overrides"]}
        try:
            self.engine = vllm.LLM(
                folder,
                runner="pooling",
                dtype=precision,
                max_model_len=_longest(folder, self.encoder.max_length),
                **{
                    "enable_prefix_caching": True,
                    "disable_log_stats": False,
                    "hf_overrides": overrides,
                    **options,
                },
            )
        except (ValueError, TypeError, RuntimeError) as error:
            text = reward_model.first_line(error)
            raise PolarctlError(f"vLLM does not start: {text}", hint="--backend hf") from error

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items.

        Raises:
            PolarctlError: A reward is not a finite number.
        """
        return score_ids(items, self.encoder, self.rewards_of)

    def rewards_of(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Rewards of the candidates of every group, from their token ids."""
        from vllm.inputs import TokensPrompt

        flat = [TokensPrompt(prompt_token_ids=list(ids)) for group in groups for ids in group]
        done = iter(self.engine.classify(flat, use_tqdm=False))
        found = [[_reward(next(done).outputs.probs) for _ in group] for group in groups]
        check_finite(found)
        return found

    def stats(self) -> dict[str, int]:
        """Tokens that were looked up in the prefix cache so far, and those that it had."""
        wanted = {"vllm:prefix_cache_queries": "queries", "vllm:prefix_cache_hits": "hits"}
        values = {wanted[m.name]: m.value for m in self.engine.get_metrics() if m.name in wanted}
        return {name: int(values.get(name, 0)) for name in wanted.values()}

    def close(self) -> None:
        """Say how much the prefix cache has saved; the engine ends with the program."""
        found = self.stats()
        share = found["hits"] / found["queries"] if found["queries"] else 0.0
        console.note(f"vLLM: {share:.0%} of {found['queries']:,} tokens came from the prefix cache")


def _reward(values: Sequence[float]) -> float:
    if len(values) != 1:
        raise PolarctlError(
            f"the model gives {len(values)} numbers for an input and no reward",
            hint="a reward model has one: `num_labels: 1` in its config.json",
        )
    return float(values[0])


def _longest(folder: str, template: int) -> int:
    """Tokens of the longest input: other merges can make it a few longer than the template."""
    limit = getattr(reward_model.load_config(folder), "max_position_embeddings", None)
    return min(template + 64, limit) if limit else template + 64


def _plain(path: str) -> str:
    """A folder that vLLM reads without remote code; made once, in the user's cache."""
    if internlm2.read(path) is None:
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polarctl"
    name = manifest.folder_identity(path).replace("/", "--")
    target = cache / "converted" / name
    if not (target / "config.json").exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MissingError(
                f"{target.parent}: cannot be made: {error.strerror}",
                hint="polarctl convert checkpoint SRC -o DIR, and --model DIR",
            ) from None
        convert.to_llama(path, target)
    console.choice("model", str(target), "vLLM reads the published checkpoint in this form")
    return str(target)
