"""Policies that write text: causal language models of transformers, one loaded at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.model import chat_template, devices
from polarctl.model import reward_model as models
from polarctl.model.template import content_text
from polarctl.policies.continuation import Continuation, Unfit, messages_of
from polarctl.policies.decoding import Reading, generate, reading_of
from polarctl.policies.pool import Policy


@lru_cache(maxsize=16)
def tokenizer_of(model: str, revision: str | None = None) -> Any:
    """A tokenizer, kept for the next use.

    Raises:
        MissingError: There is none.
    """
    return models.load_tokenizer(model, revision)


class Writer:
    """A policy that writes text. Its weights are loaded when it first writes.

    Args:
        policy: Whose model and sampling.
        device: Torch device name.
        dtype: Torch dtype of the weights.
        batch_size: Sequences computed together.

    Attributes:
        wrapper: `sft` for a chat policy, `pretrain` for a base policy.
        context: Tokens that prompt and answer may have together, or None for no limit.

    Raises:
        MissingError: Config or tokenizer is not there.
        UsageError: A chat policy without a chat template.
    """

    def __init__(self, policy: Policy, *, device: str, dtype: Any, batch_size: int):
        self.policy, self.device, self.dtype = policy, device, dtype
        self.batch_size = batch_size
        try:
            self.config = models.load_config(policy.model, revision=policy.revision)
            self.tokenizer = tokenizer_of(policy.model, policy.revision)
        except MissingError as error:
            raise MissingError(f"{policy.where}: {error}", hint=error.hint) from None
        template = getattr(self.tokenizer, "chat_template", None)
        self.chat = policy.kind == "chat" or (policy.kind is None and bool(template))
        if self.chat and not template:
            raise UsageError(
                f"{policy.where}: policy `{policy.name}` is of kind `chat`, but its tokenizer has "
                "no chat template",
                hint="use kind `base`, or save a chat_template.jinja beside the tokenizer",
            )
        self.wrapper = "sft" if self.chat else "pretrain"
        self.context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self._model: Any = None
        self._reading: Reading | None = None

    def encode(self, prompts: Sequence[Any]) -> list[list[int] | Unfit]:
        """Token ids of each prompt, or why the policy cannot take it."""
        if self.chat:
            texts = [self._templated(prompt) for prompt in prompts]
        else:
            texts = [content_text(prompt) for prompt in prompts]
        good = [text for text in texts if isinstance(text, str)]
        rows = iter(
            self.tokenizer(good, add_special_tokens=not self.chat)["input_ids"] if good else []
        )
        return [self._fitting(next(rows)) if isinstance(text, str) else text for text in texts]

    def _templated(self, prompt: Any) -> str | Unfit:
        try:
            return chat_template.render(
                self.tokenizer, messages_of(prompt), add_generation_prompt=True
            )
        except UsageError as error:
            raise UsageError(f"{self.policy.where}: {self.policy.model}: {error}") from None
        except Exception as error:  # templates raise what they like
            return Unfit(f"the chat template of `{self.policy.name}` refuses the prompt: {error}")

    def _fitting(self, ids: list[int]) -> list[int] | Unfit:
        if not self.chat and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text; this one is to go on
        if not ids:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            if start is None:
                return Unfit("the prompt is empty and the tokenizer has no token to start from")
            ids = [start]
        if self.context is not None and len(ids) >= self.context:
            return Unfit(
                f"the prompt has {len(ids):,} tokens and policy `{self.policy.name}` has a context "
                f"of {self.context:,}"
            )
        return ids

    def limit(self, ids: Sequence[int]) -> int:
        """Tokens that may be written after a prompt."""
        asked = self.policy.sampling.max_new_tokens
        return asked if self.context is None else min(asked, self.context - len(ids))

    def write(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[Continuation]:
        """Continue prompts given as token ids, each with its own seed.

        Raises:
            MissingError: The weights cannot be loaded, or the model does not continue a text.
            PolarctlError: Out of memory, or logits that are not finite.
        """
        if not prompts:
            return []
        results = self._written(prompts, seeds, on_done)
        texts = self._texts(prompts, [tokens for tokens, _ in results])
        return [
            Continuation(text, "stop" if ended else "length", len(tokens))
            for text, (tokens, ended) in zip(texts, results, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it: the policy, and the commit that the Hub gave."""
        commit = getattr(self.config, "_commit_hash", None)
        return {**self.policy.facts(), **({"commit": commit} if commit else {})}

    def close(self) -> None:
        """Give its weights back."""
        self._model = None

    def _written(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], on_done: Callable[[int], None]
    ) -> list[tuple[list[int], bool]]:
        """Token ids of each continuation, without the one that ended it, and whether one did."""
        model = self._load()
        try:
            with devices.threads_for(model, under=devices.SMALL_TO_DECODE):
                return generate(
                    model,
                    prompts,
                    seeds,
                    [self.limit(ids) for ids in prompts],
                    sampling=self.policy.sampling,
                    stop=self._stop_tokens(model.generation_config),
                    batch_size=self.batch_size,
                    on_done=on_done,
                    reading=self._reading,
                )
        except torch.OutOfMemoryError:
            raise PolarctlError(
                f"policy `{self.policy.name}`: the GPU's memory is full",
                hint=f"--batch-size {max(1, self.batch_size // 2)}",
            ) from None
        except PolarctlError as error:
            raise PolarctlError(f"policy `{self.policy.name}`: {error}", hint=error.hint) from None

    def use(self, model: Any) -> None:
        """Write with a model that is in memory, such as one in training, in place of loading it."""
        self._model = model

    def _load(self) -> Any:
        if self._model is None:
            self._model = load_causal_lm(self.policy, self.device, self.dtype)
        if self._reading is None:
            self._reading = self._how_to_read(self._model)
        return self._model

    def _how_to_read(self, model: Any) -> Reading:
        try:
            reading = reading_of(model)
        except Exception as error:  # a model may want images, or raises what it likes
            raise MissingError(
                f"{self.policy.where}: {self.policy.model}: the model does not continue a text "
                f"({type(error).__name__}: {models.first_line(error)})",
                hint="a policy is a causal language model that reads text alone",
            ) from None
        name = self.policy.name
        if reading.cache is None:
            console.choice("decoding", "whole texts", f"`{name}` has no cache that can be used")
        elif not reading.padded:
            console.choice("batches", "of one length", f"`{name}` has recurrent layers")
        return reading

    def _stop_tokens(self, generation_config: Any) -> list[int]:
        named = getattr(generation_config, "eos_token_id", None)
        tokens = set(named if isinstance(named, list) else [named])
        return sorted((tokens | {self.tokenizer.eos_token_id}) - {None})

    def _texts(self, prompts: Sequence[list[int]], written: Sequence[list[int]]) -> list[str]:
        def decode(rows: list[list[int]]) -> list[str]:
            texts: list[str] = self.tokenizer.batch_decode(
                rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return texts

        alone = decode(list(written))
        if self.chat:
            return alone
        # SentencePiece tokenizers drop the space at the start of what they decode, so what was
        # written is told from the prompt's last tokens by taking away what those say alone.
        heads = [prompt[-4:] for prompt in prompts]
        before = dict(zip(map(tuple, heads), decode(heads), strict=True))
        both = decode([head + tokens for head, tokens in zip(heads, written, strict=True)])
        return [
            whole.removeprefix(before[tuple(head)])
            if whole.startswith(before[tuple(head)])
            else text
            for head, whole, text in zip(heads, both, alone, strict=True)
        ]


def load_causal_lm(policy: Policy, device: str, dtype: Any) -> Any:
    """A policy's model, ready to write.

    Raises:
        MissingError: No weights, weights missing, or a model that needs code from its folder.
    """
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            policy.model,
            revision=policy.revision or "main",
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for this
        why = models.first_line(error)
        raise MissingError(
            f"{policy.where}: {policy.model}: the model cannot be loaded ({why})",
            hint="a folder with config.json and model.safetensors, or a Hub id",
        ) from None
    if info["missing_keys"]:
        raise MissingError(
            f"{policy.where}: {policy.model}: weights are missing: "
            + ", ".join(sorted(info["missing_keys"])[:3]),
            hint="a policy is a causal language model with all its weights",
        )
    models.refuse_unread(policy.model, model.config, info["unexpected_keys"])
    return model.to(device).eval()
