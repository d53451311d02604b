"""The record of a pool file: a policy, and how it is sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

_Above0 = Annotated[float, Meta(gt=0)]
_Share = Annotated[float, Meta(gt=0, le=1)]
_From1 = Annotated[int, Meta(ge=1)]
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _says(text: str) -> Meta:
    return Meta(description=text)


class PoolPolicy(Struct, forbid_unknown_fields=True):
    """One policy of a pool file. Read by `sample --pool`; its sampling overrides the options."""

    policy: Annotated[str, _says("Unique name of the policy, written to trajectories.")]
    model: Annotated[
        str,
        _says(
            "Folder or Hub id of a causal language model, or its name on a server. A pattern "
            "(`run/step-*`) makes a policy of each folder, named `policy`-`folder`."
        ),
    ]
    kind: Annotated[
        Literal["base", "chat"] | UnsetType,
        _says(
            "`base` continues the text (wrapper `pretrain`); `chat` answers through the chat "
            "template (wrapper `sft`). Default: `chat` if the tokenizer has one, else `base`."
        ),
    ] = UNSET
    backend: Annotated[
        Literal["transformers", "vllm", "openai"] | UnsetType,
        _says("What runs it: transformers (default), vLLM, or the server at `url`."),
    ] = UNSET
    url: Annotated[str | UnsetType, _says("Address of an OpenAI-compatible server.")] = UNSET
    engine: Annotated[
        dict[str, Any] | UnsetType,
        _says("Arguments of vLLM's engine, or further fields of each request to a server."),
    ] = UNSET
    revision: Annotated[str | UnsetType, _says("Commit, tag or branch of a Hub id.")] = UNSET
    dtype: Annotated[_Dtype | UnsetType, _says("Precision of computing.")] = UNSET
    group: Annotated[str | UnsetType, _says("Any name; `policy_group` of trajectories.")] = UNSET
    temperature: Annotated[_Above0 | UnsetType, _says("Sampling temperature.")] = UNSET
    top_p: Annotated[_Share | UnsetType, _says("Nucleus share.")] = UNSET
    top_k: Annotated[Annotated[int, Meta(ge=0)] | UnsetType, _says("Tokens kept; 0: all.")] = UNSET
    max_new_tokens: Annotated[_From1 | UnsetType, _says("Length limit in tokens.")] = UNSET
    samples: Annotated[_From1 | UnsetType, _says("Samples per prompt.")] = UNSET
    weight: Annotated[
        _Share | UnsetType,
        _says(
            "Share of the prompts that it answers; default 1, all of them. Of the policies of a "
            "kind that have one, a prompt gets as many as their weights add up to."
        ),
    ] = UNSET
