"""The POLAR reward for reinforcement fine-tuning: how close is a rollout to its reference.

`PolarReward` is a reward function for TRL's GRPO and RLOO trainers, for `polarctl rft` and for a
script of your own:

    reward = PolarReward.load("runs/rm", normalize="polar-7b", strip_thinking=True)
    trainer = GRPOTrainer(model=..., reward_funcs=reward, train_dataset=with_a_reference_column)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.records import Candidate, check
from polarctl.scoring.answers import REWARD_FLOOR, Answers
from polarctl.scoring.scorer import Floored, Item, Scorer, load_scorer, score_answers

# Mean that the paper's scripts subtract for each released model, before they divide by 10.
PRESETS: dict[str, float | None] = {"none": None, "polar-1.8b": -10.0, "polar-7b": -5.0}
WITHIN_GROUP = ("zscore", "rank")
_SCALE, _CLIP = 10.0, 10.0


def normalise(rewards: Sequence[float], preset: str) -> list[float]:
    """Rewards on the scale that the paper trains with: (r - mean) / 10, clipped to [-10, 10].

    GRPO compares the rollouts of one prompt with each other and divides by their spread, so a
    preset changes its result only through clipping; PPO and RLOO feel the scale.

    Args:
        rewards: Raw rewards.
        preset: `none` (as they are), `polar-1.8b` (mean -10) or `polar-7b` (mean -5).

    Raises:
        UsageError: No such preset.
    """
    if preset not in PRESETS:
        raise UsageError(f"no normalisation `{preset}`", hint=f"one of: {', '.join(PRESETS)}")
    mean = PRESETS[preset]
    if mean is None:
        return list(rewards)
    return [min(_CLIP, max(-_CLIP, (reward - mean) / _SCALE)) for reward in rewards]


def normalise_group(rewards: Sequence[float], how: str) -> list[float]:
    """The rewards of one group on another scale.

    Args:
        rewards: Raw rewards of the group's candidates.
        how: A preset of `normalise`; `zscore`: distance to the group's mean in its standard
            deviations, 0 where all are equal; `rank`: 0 for the lowest to 1 for the highest, equal
            rewards share the mean of their ranks.

    Raises:
        UsageError: No such scale.
        ValueError: `zscore` or `rank` of a single reward.
    """
    if how not in WITHIN_GROUP:
        return normalise(rewards, how)
    if len(rewards) < 2:
        raise ValueError(f"`{how}` compares the candidates of a group, and here is one")
    if how == "zscore":
        mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
        return [(reward - mean) / spread if spread else 0.0 for reward in rewards]
    ordered = sorted(rewards)
    places = {r: ordered.index(r) + (ordered.count(r) - 1) / 2 for r in set(rewards)}
    return [places[reward] / (len(rewards) - 1) for reward in rewards]


def continued(
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[Any],
    ends: Sequence[str] = (),
    *,
    no_reference: bool = False,
) -> tuple[list[Item], list[bool]]:
    """Rollouts as OpenRLHF tells them: a query goes on from its prompt, a label is the reference.

    Args:
        queries: Prompt and response in one text, as the policy's tokenizer decodes them.
        prompts: What the policy was given, with the markup of its chat template if it has one.
        labels: References. An object has `reference` and, if the prompt has markup, the `prompt`
            without; also `wrapper`.
        ends: What a policy may end its text with; one of them is taken off a response.
        no_reference: Labels may be empty.

    Returns:
        The rollouts, and whether each was cut off: it has none of `ends`, where there are some.

    Raises:
        RecordError: A query does not hold its prompt, or there is no reference.
    """
    items, cut_off = [], []
    for index, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        begin = len(prompt) if query.startswith(prompt) else response_at(query, prompt)
        if begin is None:
            raise RecordError(
                f"`query[{index}]` does not go on from its prompt",
                hint="it has to begin with the prompt, or with what a cut has left of its end",
            )
        known = label if isinstance(label, dict) else {"reference": label}
        # A data set gives every row the fields of all rows.
        known = {name: value for name, value in known.items() if value is not None}
        try:
            check({"prompt": prompt, **known, "output": ""}, Candidate)
        except RecordError as error:
            raise RecordError(f"`labels[{index}]`: {error.reason}") from None
        reference = known.get("reference", "")
        if not reference and not no_reference:
            raise RecordError(
                f"`labels[{index}]` has no reference to compare with",
                hint="OpenRLHF sends an empty label unless --data.label_key names the field",
            )
        response = query[begin:]
        answer = _without_end(response, ends)
        items.append(
            Item(known.get("prompt", prompt), reference, answer, known.get("wrapper", "sft"))
        )
        cut_off.append(bool(ends) and answer == response)
    return items, cut_off


_ANCHOR = 16  # characters, blanks left out, that are enough to know a prompt's end by


def response_at(query: str, prompt: str) -> int | None:
    """Where the response begins in a query that does not begin with its prompt.

    OpenRLHF cuts a long prompt from the left and decodes token ids, so a query begins with the end
    of the prompt, written as the tokenizer writes it: other blanks, other characters where the
    vocabulary has none. Blanks are left out of the comparison. The prompt's end is found as the
    longest one that the query begins with, or else by its last characters, where they stand in the
    query once.

    Args:
        query: A prompt and its response, decoded.
        prompt: The prompt as text.

    Returns:
        Index into the query, or None where the prompt's end is not found.
    """
    places = [i for i, char in enumerate(query) if not char.isspace() and char != "\ufffd"]
    told = "".join(query[i] for i in places)
    wanted = "".join(char for char in prompt if not char.isspace() and char != "\ufffd")
    end = _overlap(told, wanted)
    if end is None:
        tail = wanted[-_ANCHOR:]
        if len(tail) < _ANCHOR or told.count(tail) != 1:
            return None
        end = told.index(tail) + len(tail)
    begin = places[end - 1] + 1 if end else 0
    blank = prompt[len(prompt.rstrip()) :]  # is the prompt's, not the response's
    while begin < len(query) and blank and query[begin].isspace():
        begin, blank = begin + 1, blank[1:]
    return begin


def _overlap(text: str, before: str) -> int | None:
    """Length of the longest end of `before` that `text` begins with; None: too short to be sure."""
    least = min(_ANCHOR, len(before))
    at = before.find(text[:least]) if least and len(text) >= least else -1
    while at >= 0:
        if text.startswith(before[at:]):
            return len(before) - at
        at = before.find(text[:least], at + 1)
    return None


def _without_end(response: str, ends: Sequence[str]) -> str:
    text = response.rstrip()
    return next((text[: -len(end)] for end in ends if text.endswith(end)), response)


class PolarReward:
    """A reward function as TRL calls it: keyword arguments in, one number per completion out.

    Args:
        scorer: Computes raw rewards.
        normalize: A preset of `normalise`.
        strip_thinking: Score completions without their `<think>` parts.
        thinking_opened: The prompts end in `<think>`, so completions begin inside that part.
        wrapper: For prompts whose dataset has no `wrapper` column: `sft` or `pretrain`.
        reward_floor: Raw reward of a completion without an answer: empty, in an unfinished thought
            (with `strip_thinking`), or cut off (where `__call__` is told). None: what is left of it
            is scored.

    Attributes:
        scored: Completions scored so far.
        truncated: Those of them whose input was longer than the reward model takes and was cut.
        floored: How many of them got the floor, and why.
    """

    __name__ = "polar"  # TRL's metrics are named by it

    def __init__(
        self,
        scorer: Scorer,
        *,
        normalize: str = "none",
        strip_thinking: bool = False,
        thinking_opened: bool = False,
        wrapper: str = "sft",
        reward_floor: float | None = REWARD_FLOOR,
    ):
        normalise([], normalize)
        self.scorer, self.normalize, self.wrapper = scorer, normalize, wrapper
        self.answers = Answers(
            strip_thinking=strip_thinking, thinking_opened=thinking_opened, floor=reward_floor
        )
        self.scored = self.truncated = 0
        self.floored = Floored()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 8192,
        **options: Any,
    ) -> PolarReward:
        """A reward function from a reward model's folder or Hub id; see the class for options."""
        scorer = load_scorer(path, device=device, dtype=dtype, batch_tokens=batch_tokens)
        return cls(scorer, **options)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        reference: Sequence[Any] | None = None,
        wrapper: Sequence[str | None] | None = None,
        ended: Sequence[bool] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards in the order of the completions.

        Raw rewards go to `log_extra("polar_raw")`, their mean to `log_metric("polar_raw")`; why a
        completion got the floor to `log_extra("polar_floored")` (else an empty text), and the share
        of those to `log_metric("polar_floored")`.

        Args:
            prompts: Texts or lists of messages.
            completions: Texts or lists of messages.
            reference: The dataset's column of references, texts or lists of messages.
            wrapper: The dataset's column of wrappers, if it has one.
            ended: Whether the policy ended each completion itself; None: all did, for all we know.
            log_metric: Given by TRL.
            log_extra: Given by TRL.
            **columns: The other things that TRL gives; not used.

        Raises:
            PolarctlError: No reference, or the scorer failed. A failure is never a reward.
        """
        if reference is None or any(text is None for text in reference):
            raise PolarctlError(
                "the POLAR reward needs a `reference` for every prompt",
                hint="add a column `reference` to the dataset",
            )
        wrappers = wrapper or [None] * len(prompts)
        items = [
            Item(prompt, text, completion, kind or self.wrapper)
            for prompt, text, completion, kind in zip(
                prompts, reference, completions, wrappers, strict=True
            )
        ]
        cut_off = [False] * len(items) if ended is None else [not one for one in ended]
        found = score_answers(items, self.scorer, self.answers, cut_off)
        raw = [scored.reward for scored in found]
        self.scored += len(found)
        self.truncated += sum(bool(scored.truncated) for scored in found)
        self.floored.add(found, self.answers.floor)
        faults = [scored.floored or "" for scored in found]
        if log_extra is not None:
            log_extra("polar_raw", raw)
            log_extra("polar_floored", faults)
        if log_metric is not None:
            log_metric("polar_raw", sum(raw) / len(raw))
            log_metric("polar_floored", sum(map(bool, faults)) / len(faults))
        return normalise(raw, self.normalize)
