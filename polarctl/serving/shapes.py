"""Requests in the shapes of vLLM, SGLang, lmdeploy and OpenRLHF: to token ids, and rewards back.

    /classify  {"model", "input": text, ids or lists of them}   {"data": [{"index", "probs": [r]}]}
    /classify  {"model", "text": text or a list}                [{"embedding": [r]}]
    /pooling   {"model", "input"}                               {"data": [{"index", "data": [r]}]}
    /pooling   {"model", "messages"}                            the same, of models that read chats
    /tokenize  {"model", "prompt" or "messages"}                {"count", "max_model_len", "tokens"}
    /get_reward {"query", "prompts", "labels"}                  {"rewards", "scores", "extra_logs"}

What a client sends beside is passed over, `use_activation` too: rewards are raw, always.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from polarctl.model.packing import common_prefix
from polarctl.model.template import Encoder, content_text
from polarctl.scoring.reward_function import continued
from polarctl.scoring.scorer import Item
from polarctl.serving.limits import Refused


def inputs_of(body: dict[str, Any]) -> list[Any]:
    """The texts and token ids of a `/classify` or `/pooling` request.

    Raises:
        Refused: None there, or something else.
    """
    name = "text" if "text" in body and "input" not in body else "input"
    given = body.get(name)
    if isinstance(given, str) or (isinstance(given, list) and given and _is_ids(given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise Refused(400, f"`{name}` must be a text, token ids, or a list of either")
    for index, one in enumerate(given):
        if not isinstance(one, str) and not (isinstance(one, list) and one and _is_ids(one)):
            raise Refused(400, f"`{name}[{index}]` is no text and no list of token ids")
    return given


def conversation_of(body: dict[str, Any]) -> Item:
    """The conversation of a request; its last message is the output.

    Raises:
        Refused: No list of messages that ends in an answer.
    """
    turns = body.get("messages")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns
    ):
        raise Refused(400, "`messages` must be a list of {role, content}")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise Refused(400, "`messages` must end in the answer, a message of the role `assistant`")
    try:
        for turn in turns:
            content_text([turn])
    except ValueError as error:
        raise Refused(400, f"`messages`: {error}") from None
    return Item(turns[:-1], "", [turns[-1]])


def _is_ids(value: list[Any]) -> bool:
    return all(type(one) is int for one in value)


def ids_of(given: Any, encoder: Encoder, vocabulary: int, longest: int) -> list[int]:
    """The token ids of one input.

    Args:
        given: A glued text (`Encoder.text`), or ids.
        encoder: The model's template.
        vocabulary: Ids that the model knows.
        longest: Tokens of an input at most.

    Raises:
        Refused: Too long, or no input of this model.
    """
    if isinstance(given, str):
        try:
            ids = encoder.glued_ids(given)
        except ValueError as error:
            raise Refused(400, str(error)) from None
    else:
        ids = given
    if len(ids) > longest:
        raise Refused(400, f"an input of {len(ids):,} tokens; the model takes {longest:,}")
    if ids[-1] != encoder.reward_token_id:
        raise Refused(400, f"an input must end in `{encoder.reward_token}`, where the reward is")
    if not all(0 <= one < vocabulary for one in ids):
        raise Refused(400, f"a token id that is not in 0 to {vocabulary - 1:,}")
    return ids


def grouped(inputs: Sequence[list[int]]) -> list[list[Sequence[int]]]:
    """Neighbours that begin alike, as the candidates of one prompt do, so that it is read once."""
    groups: list[list[Sequence[int]]] = []
    for ids in inputs:
        if groups and 2 * common_prefix([groups[-1][0], ids]) >= min(len(groups[-1][0]), len(ids)):
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return groups


def classified(rewards: Sequence[float], tokens: int, model: str) -> dict[str, Any]:
    """The reply of vLLM to `/classify`."""
    rows = [
        {"index": i, "label": "LABEL_0", "probs": [reward], "num_classes": 1}
        for i, reward in enumerate(rewards)
    ]
    return _listed("classify", rows, tokens, model)


# What the published POLAR client reads in its vllm mode, `data[-1][0]`, and in its lmdeploy mode.
POOLING: dict[str, Callable[[float], Any]] = {
    "list": lambda reward: [reward],
    "nested": lambda reward: [[reward]],
    "number": lambda reward: reward,
}


def pooled(rewards: Sequence[float], tokens: int, model: str, data: str = "list") -> dict[str, Any]:
    """The reply of vLLM and lmdeploy to `/pooling`.

    Args:
        rewards: Of the inputs, in their order.
        tokens: Of all inputs.
        model: Its name in the reply.
        data: How a reward stands in `data`, of `POOLING`.
    """
    put = POOLING[data]
    rows = [{"index": i, "object": "pooling", "data": put(r)} for i, r in enumerate(rewards)]
    return _listed("pool", rows, tokens, model)


def _listed(kind: str, rows: list[dict[str, Any]], tokens: int, model: str) -> dict[str, Any]:
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": rows,
        "usage": usage,
    }


def embedded(rewards: Sequence[float], counts: Sequence[int]) -> list[dict[str, Any]]:
    """The reply of SGLang to `/classify`."""
    return [
        {"embedding": [reward], "meta_info": {"prompt_tokens": count}}
        for reward, count in zip(rewards, counts, strict=True)
    ]


def rollouts_of(
    body: dict[str, Any], ends: Sequence[str] = (), *, no_reference: bool = False
) -> tuple[list[Item], list[bool]]:
    """What OpenRLHF asks for, see `polarctl.scoring.reward_function.continued`.

    Args:
        body: The request.
        ends: What a policy may end its text with; one of them is taken off a response.
        no_reference: The model compares with none.

    Raises:
        Refused: Lists that do not fit together.
        RecordError: A rollout that does not go on from its prompt, or has no reference.
    """
    lists = [body.get(name) for name in ("query", "prompts", "labels")]
    for name, values in zip(("query", "prompts", "labels"), lists, strict=True):
        label = name == "labels"
        if not isinstance(values, list) or not all(
            isinstance(one, str) or (label and isinstance(one, dict)) for one in values
        ):
            kind = "texts or objects" if label else "texts"
            raise Refused(400, f"`{name}` must be a list of {kind}")
    queries, prompts, labels = (values or [] for values in lists)
    if not queries or len({len(queries), len(prompts), len(labels)}) != 1:
        raise Refused(400, "`query`, `prompts` and `labels` must be of one length, 1 at least")
    return continued(queries, prompts, labels, ends, no_reference=no_reference)
