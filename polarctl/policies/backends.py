"""Which backend runs a policy, and what is seen of it before a long run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from polarctl import console
from polarctl.errors import MissingError, RecordError
from polarctl.model.template import content_text
from polarctl.policies.continuation import PolicyWriter, Unfit
from polarctl.policies.pool import Policy
from polarctl.records import Record

_AT_ONCE = 1024  # long prompts that are tokenized together


@dataclass(frozen=True, kw_only=True)
class Running:
    """How policies are run; it can be pickled, and changes no text but in the last digit.

    Attributes:
        device: Torch device name, resolved.
        dtype: Name of the precision of policies that name none, resolved.
        batch_size: Sequences computed together (transformers).
        concurrency: Requests to a server under way at most.
        deadline_s: Seconds without a good reply of a server before it is given up.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 64
    concurrency: int = 16
    deadline_s: float = 300.0


def open_writer(policy: Policy, how: Running) -> PolicyWriter:
    """A policy's writer. Its weights are loaded, or its engine started, when it first writes.

    Raises:
        MissingError: A config, a tokenizer, a package or a server is not there.
        UsageError: The policy's fields do not hold.
    """
    if policy.backend == "openai":
        from polarctl.policies.served_policy import ServedWriter

        return ServedWriter(policy, concurrency=how.concurrency, deadline_s=how.deadline_s)
    dtype = policy.dtype or how.dtype
    if dtype == "auto":
        dtype = how.dtype
    if policy.backend == "vllm":
        from polarctl.policies.vllm_writer import VllmWriter

        return VllmWriter(policy, device=how.device, dtype=dtype)
    import torch

    from polarctl.policies.writer import Writer

    return Writer(policy, device=how.device, dtype=getattr(torch, dtype), batch_size=how.batch_size)


def wrapper_of(policy: Policy) -> str:
    """`sft` for a chat policy, `pretrain` for a base policy; no weights are read.

    Raises:
        MissingError: A config, a tokenizer, a package or a server is not there.
        UsageError: The policy's fields do not hold.
    """
    writer = open_writer(policy, Running())
    try:
        return writer.wrapper
    finally:
        writer.close()


def check_writers(
    policies: Iterable[Policy],
    prompts_of: Callable[[Policy], Iterable[Record]],
    *,
    strict: bool = True,
) -> None:
    """Meet what would stop a long run later: a model that is not there, a prompt that is too long.

    Args:
        policies: Those that are still to write.
        prompts_of: The prompts of a policy. Only those that may be too long are tokenized (no
            tokenizer makes more than a token or so of a byte); a server's are not.
        strict: A prompt that a policy cannot take is an error.

    Raises:
        MissingError: A config, a tokenizer, a package or a server is not there.
        UsageError: A chat policy has no template.
        RecordError: With `strict`: a prompt does not fit a policy's context.
    """
    short: list[str] = []
    for policy in policies:
        writer = open_writer(policy, Running())
        context = writer.context
        if context is not None:
            if policy.sampling.max_new_tokens >= context:
                short.append(f"{policy.name}: {context:,}")
            if strict and policy.backend != "openai":
                _check_lengths(writer, prompts_of(policy), context)
        writer.close()
    if short:
        names = ", ".join(short[:4]) + (f" and {len(short) - 4} more" if len(short) > 4 else "")
        console.choice("length limit", "context", f"less than --max-new-tokens: {names}")


def _check_lengths(writer: PolicyWriter, prompts: Iterable[Record], context: int) -> None:
    long = (
        prompt
        for prompt in prompts
        if prompt.get("wrapper", writer.wrapper) == writer.wrapper
        and len(content_text(prompt["prompt"]).encode("utf-8", "replace")) + 64 >= context
    )
    for some in _some(long, _AT_ONCE):
        encoded = writer.encode([prompt["prompt"] for prompt in some])
        for prompt, ids in zip(some, encoded, strict=True):
            if isinstance(ids, Unfit):
                raise RecordError(
                    ids.reason,
                    where=prompt.where,
                    hint="--rejects FILE sets such prompts aside and goes on",
                )


def _some(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    rest = iter(records)
    while some := list(itertools.islice(rest, size)):
        yield some


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a policy without its weights.

    Attributes:
        wrapper: `sft` or `pretrain`.
        context: Tokens that prompt and answer may have together, or None.
        text: In words, for the plan.
    """

    wrapper: str
    context: int | None
    text: str


def look_at(policy: Policy, how: Running) -> Seen:
    """Check a policy from its config alone, or its server's list; no weights are read.

    Raises:
        MissingError: Something of it is not there, or is no causal language model.
        UsageError: Its fields do not hold.
    """
    writer = open_writer(policy, how)
    try:
        if policy.backend == "openai":
            what = f"server {writer.facts()['url']}, model {policy.model}"
        else:
            what = _shape_of(policy, how)
        context = f"context {writer.context:,}" if writer.context else "no limit of context known"
        return Seen(
            wrapper=writer.wrapper,
            context=writer.context,
            text=f"{policy.backend}, {writer.wrapper}, {what}, {context}",
        )
    finally:
        writer.close()


def _shape_of(policy: Policy, how: Running) -> str:
    """Architecture and memory of the weights of a model, from its config."""
    import torch
    import transformers

    from polarctl.model import reward_model as models

    config = models.load_config(policy.model, weights=False, revision=policy.revision)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises ValueError, KeyError, ... for this
        raise MissingError(
            f"{policy.where}: {policy.model}: no causal language model "
            f"({models.first_line(error)})",
            hint="a policy is a causal language model that reads text alone",
        ) from None
    dtype = policy.dtype if policy.dtype not in (None, "auto") else how.dtype
    count = sum(weight.numel() for weight in model.parameters())
    size = count * getattr(torch, str(dtype)).itemsize / 2**30
    return f"{type(model).__name__}, {count:,} weights: {size:,.2g} GiB in {dtype}"
