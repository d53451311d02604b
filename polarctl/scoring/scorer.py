"""Rewards for records: single candidates, groups and triples, whatever engine computes them."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from polarctl import console
from polarctl.errors import PolarctlError, RecordError
from polarctl.evaluation.reference_source import FROM, OTHER_CORRECT
from polarctl.model.template import PIECES, plain_text
from polarctl.records import KINDS, Record, check, kind_of_scorable, outputs_of
from polarctl.scoring.answers import AS_THEY_ARE, FAULTS, Answers


@dataclass(frozen=True)
class Item:
    """One thing to score. Text fields are strings or messages."""

    prompt: Any
    reference: Any
    output: Any
    wrapper: str = "sft"


@dataclass(frozen=True)
class Scored:
    """A raw reward and how it came about.

    Attributes:
        reward: The reward.
        tokens: Tokens that were read for it.
        truncated: Pieces that had to be cut.
        floored: Why it is the floor (`polarctl.scoring.answers.FAULTS`); None: the model gave it.
    """

    reward: float
    tokens: int
    truncated: tuple[str, ...]
    floored: str | None = None


class Scorer(Protocol):
    """An engine that scores."""

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items."""

    def close(self) -> None:
        """Give back what it holds, and say what there is to say of it."""


class ModelScorer:
    """Scores with a reward model in this process.

    What candidates of one prompt and reference share is computed once, and several groups go
    through the model in one row. A model whose attention cannot be exchanged for that scores
    padded batches. Threads may share it: the model computes for one at a time.

    Args:
        model: A `polarctl.model.reward_model.PolarModel`; its attention is exchanged.
        batch_tokens: Tokens of one forward pass at most (a longer sequence goes alone).
    """

    def __init__(self, model: Any, batch_tokens: int = 8192):
        from polarctl.model.forward import Packed, Padded, module_of

        self.model, self.batch_tokens = model, batch_tokens
        self._computing = threading.Lock()
        self.module: Packed | Padded = module_of(model.model)

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Rewards in the order of the items.

        Raises:
            PolarctlError: The model gave a reward that is not a finite number.
        """
        return score_ids(items, self.model.encoder, self.rewards_of)

    def close(self) -> None:
        """Nothing to give back."""

    def rewards_of(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Rewards of the candidates of every group, from their token ids.

        Args:
            groups: Token ids of each group's candidates, each ending in the reward token.

        Raises:
            PolarctlError: The model gave a reward that is not a finite number.
        """
        import torch

        from polarctl.model import devices
        from polarctl.model.forward import Padded

        found = [[math.nan] * len(candidates) for candidates in groups]
        run = self._padded if isinstance(self.module, Padded) else self._packed
        with self._computing, torch.inference_mode(), devices.threads_for(self.model.model):
            for group, index, reward in run(groups):
                found[group][index] = reward
        check_finite(found)
        return found

    def _packed(self, groups: Any) -> Iterator[tuple[int, int, float]]:
        """(group, candidate, reward) of all candidates, in the order in which they are computed."""
        from polarctl.model.forward import RowInput
        from polarctl.model.packing import pack, portions

        kind = self.module.kind
        jobs: list[tuple[int, list[int]]] = []
        for number, candidates in enumerate(groups):
            alike: dict[Any, list[int]] = {}
            for i, ids in enumerate(candidates):
                alike.setdefault(kind(len(ids)) if kind else None, []).append(i)
            for own in alike.values():
                parts = portions([candidates[i] for i in own], self.batch_tokens)
                jobs += [(number, [own[i] for i in part]) for part in parts]
        wanted = [[groups[number][i] for i in part] for number, part in jobs]
        for row in pack(wanted, self.batch_tokens):
            given = RowInput.of(row, self.model.device)
            values = iter(self.module(given.ids, given.positions, given.layout).tolist())
            for member in row.members:
                number, part = jobs[member]
                yield from ((number, i, next(values)) for i in part)

    def _padded(self, groups: Any) -> Iterator[tuple[int, int, float]]:
        """The same in padded batches of like length."""
        from polarctl.model.reward_model import pad

        flat = [(n, i, ids) for n, group in enumerate(groups) for i, ids in enumerate(group)]
        pad_id = self.model.tokenizer.pad_token_id
        for batch in token_batches([len(ids) for _, _, ids in flat], self.batch_tokens):
            values = self.module(*pad([flat[k][2] for k in batch], pad_id, self.model.device))
            for k, value in zip(batch, values.tolist(), strict=True):
                yield flat[k][0], flat[k][1], value


def score_ids(
    items: Sequence[Item], encoder: Any, rewards_of: Callable[[list[list[list[int]]]], Any]
) -> list[Scored]:
    """Score with an engine that takes token ids, by groups of one prompt and reference.

    Args:
        items: What to score.
        encoder: The model's template.
        rewards_of: From the ids of each group's candidates to their rewards.

    Raises:
        RecordError: A text that cannot be encoded.
    """
    try:
        groups = [
            encoder.report_group(
                group[0].prompt,
                group[0].reference,
                [item.output for item in group],
                group[0].wrapper,
                shared_prompt_budget=False,  # each as if it were alone
            )
            for group in _by_prompt(items)
        ]
    except ValueError as error:
        raise RecordError(str(error)) from None
    found = rewards_of([[e.ids for e in group] for group in groups])
    return [
        Scored(value, len(e.ids), e.cut)
        for group, values in zip(groups, found, strict=True)
        for e, value in zip(group, values, strict=True)
    ]


def check_finite(rewards: Iterable[Iterable[float]]) -> None:
    """Raise PolarctlError when a reward is not a finite number."""
    if not all(math.isfinite(value) for values in rewards for value in values):
        raise PolarctlError(
            "the model gave a reward that is not finite",
            hint="--dtype float32, or look at the model's training",
        )


def _by_prompt(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Runs of items that differ in their output alone."""
    for _, group in itertools.groupby(items, lambda i: (i.prompt, i.reference, i.wrapper)):
        yield list(group)


def load_scorer(
    path: str,
    *,
    device: str,
    dtype: str,
    batch_tokens: int,
    no_reference: bool | None = False,
    as_polar: bool = False,
) -> ModelScorer:
    """A POLAR model as a scorer, from the options that every scoring stage has.

    Args:
        path: Folder or Hub id.
        device: `--device`.
        dtype: `--dtype`.
        batch_tokens: `--batch-tokens`.
        no_reference: `--no-reference`; a model that was trained otherwise is warned of. None: as
            it was trained.
        as_polar: See `polarctl.model.reward_model.load`.

    Raises:
        MissingError: No model, tokenizer, head or device there.
        UsageError: It reads conversations.
    """
    from polarctl.model import devices, reward_model

    devices.quiet_libraries()
    where = devices.device_of(device)
    loaded = reward_model.load(
        path, device=where, dtype=devices.dtype_of(dtype, where), as_polar=as_polar
    )
    if no_reference not in (None, loaded.no_reference):
        trained = "without" if loaded.no_reference else "with"
        console.warn(f"{path}: was trained {trained} references and now scores otherwise")
    return ModelScorer(loaded, batch_tokens)


class Cuts(Counter[str]):
    """How many inputs had which piece cut: `inputs`, `any`, `prompt`, `reference`, `output`."""

    def add(self, details: Iterable[Scored]) -> None:
        """Count some scored inputs."""
        for scored in details:
            self["inputs"] += 1
            self["any"] += bool(scored.truncated)
            self.update(scored.truncated)

    def say(self, model: str | None) -> None:
        """Warn when something was cut, with the limit and the remedy.

        Args:
            model: The reward model, a folder or a Hub id, or None where it is not known.
        """
        if not self["any"]:
            return
        from polarctl.model import reward_model

        pieces = ", ".join(f"{name}: {self[name]:,}" for name in PIECES if self[name])
        limits = None if model is None else reward_model.limits(model)
        takes, remedy = "", "; shorter texts are read whole"
        if limits is not None:
            takes = f", which takes {limits[0]:,} tokens, {limits[1]:,} of a response,"
            remedy += ", or a model that `polarctl finetune --max-length` has made longer"
        console.warn(
            f"{self['any']:,} of {self['inputs']:,} inputs are longer than the model's "
            f"template{takes} and were cut ({pieces}){remedy}"
        )


class Floored(Counter[str]):
    """How many of the `outputs` got the floor and why, and how many rewards are `below` it."""

    def add(self, details: Iterable[Scored], floor: float | None) -> None:
        """Count some scored outputs."""
        for scored in details if floor is not None else ():
            self.count(scored.reward, scored.floored, floor)

    def count(self, reward: float, fault: str | None, floor: float | None) -> None:
        """Count one output: its raw reward, and why that is the floor."""
        self["outputs"] += 1
        if fault is not None:
            self[fault] += 1
        elif floor is not None:
            self["below"] += reward <= floor

    def say(self, floor: float | None) -> None:
        """Warn of floored outputs, and of a floor that is none."""
        found = [(self[fault], words) for fault, words in FAULTS.items() if self[fault]]
        if found:
            parts = ", ".join(f"{count:,} {words}" for count, words in found)
            console.warn(
                f"{sum(count for count, _ in found):,} of {self['outputs']:,} outputs have no "
                f"answer and got the reward floor {floor:g} ({parts})"
            )
        if found and self["below"]:
            console.warn(
                f"{self['below']:,} answers have a reward at the floor or below it: those without "
                "an answer are not the worst; a lower --reward-floor"
            )


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length, each at most `budget` padded tokens (or one sequence)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score_records(
    records: Sequence[Record],
    scorer: Scorer,
    *,
    no_reference: bool = False,
    pooling: str = "mean",
    answers: Answers = AS_THEY_ARE,
) -> Iterator[tuple[dict[str, Any], list[Scored]]]:
    """The same records with `reward` (one output) or `rewards` (a group or a triple).

    Of several `references` each has a row of `reference_rewards`, with None where it has judged
    none. Where an output got the floor, `floored` says why, in the shape of the rewards.

    Args:
        records: Records with a reference (or `no_reference`).
        scorer: The engine.
        no_reference: Score against an empty reference.
        pooling: A candidate's reward among several `references`: their `mean` or `max`.
        answers: What to score of a candidate; the record keeps the candidate.

    Yields:
        Pairs of the new record and what is known of each of its rewards.
    """
    asked = [([""] if no_reference else references_of(r), outputs_of(r)) for r in records]
    used = [_comparisons(r, *parts) for r, parts in zip(records, asked, strict=True)]
    items, cut_off = [], []
    for record, (references, outputs), pairs in zip(records, asked, used, strict=True):
        cuts, wrapper = _cut_off(record), record.get("wrapper", "sft")
        for i, k in pairs:
            items.append(Item(record["prompt"], references[i], outputs[k], wrapper))
            cut_off.append(cuts[k])
    scored = iter(score_answers(items, scorer, answers, cut_off))
    for record, (references, outputs), pairs in zip(records, asked, used, strict=True):
        found: list[list[Scored]] = [[] for _ in outputs]
        table: list[list[float | None]] = [[None] * len(outputs) for _ in references]
        for i, k in pairs:
            one = next(scored)
            found[k].append(one)
            table[i][k] = None if one.floored else one.reward
        mine = [_pooled(column, pooling) for column in found]
        earlier = ("floored", "reference_rewards")
        result: dict[str, Any] = {k: v for k, v in record.items() if k not in earlier}
        values = [s.reward for s in mine]
        if "candidates" in record or kind_of_scorable(record) == "triple":
            result["rewards"] = values
        else:
            result["reward"] = values[0]
        if len(references) > 1:
            result["reference_rewards"] = table
        faults = [s.floored for s in mine]
        if any(faults):
            result["floored"] = faults if "rewards" in result else faults[0]
        yield result, mine


def _comparisons(
    record: Record, references: Sequence[Any], outputs: Sequence[Any]
) -> list[tuple[int, int]]:
    """(place of the reference, place of the candidate) of everything that is to be scored.

    Where the references are candidates themselves, none is compared with its own text.
    """
    pairs = [(i, k) for i in range(len(references)) for k in range(len(outputs))]
    if record.get(FROM) != OTHER_CORRECT or references == [""]:
        return pairs
    known, texts = [plain_text(text) for text in references], [plain_text(text) for text in outputs]
    pairs = [(i, k) for i, k in pairs if known[i] != texts[k]]
    if len({k for _, k in pairs}) < len(outputs):
        raise RecordError("a candidate has no reference but itself", where=record.where)
    return pairs


def _cut_off(record: dict[str, Any]) -> list[bool]:
    """Of each candidate of a record, whether a limit of tokens ended it."""
    if "candidates" in record:
        return [each.get("finish_reason") == "length" for each in record["candidates"]]
    single = kind_of_scorable(record) != "triple"  # the finish of a triple's texts is not known
    return [single and record.get("finish_reason") == "length"] * len(outputs_of(record))


def score_answers(
    items: Sequence[Item], scorer: Scorer, answers: Answers, cut_off: Sequence[bool]
) -> list[Scored]:
    """Score what is to be scored of each output; those without an answer get the floor.

    Args:
        items: With whole outputs.
        scorer: The engine; it is shown the outputs with an answer alone.
        answers: How to read outputs.
        cut_off: Whether the limit of new tokens ended each output.

    Raises:
        PolarctlError: The scorer failed, or gave another number of rewards.
    """
    faults = [
        answers.fault(item.output, cut_off=cut, wrapper=item.wrapper)
        for item, cut in zip(items, cut_off, strict=True)
    ]
    asked = [
        replace(item, output=answers.text(item.output))
        for item, fault in zip(items, faults, strict=True)
        if fault is None
    ]
    found = scorer.score(asked) if asked else []
    if len(found) != len(asked):
        raise PolarctlError(f"the scorer gave {len(found)} rewards for {len(asked)} outputs")
    given, floor = iter(found), answers.floor
    return [
        next(given) if fault is None or floor is None else Scored(floor, 0, (), fault)
        for fault in faults
    ]


def _pooled(scored: Sequence[Scored], pooling: str) -> Scored:
    """One candidate's score from those against each of its references."""
    if len(scored) == 1 or scored[0].floored:  # the output has no answer, whatever the reference
        return scored[0]
    rewards = [one.reward for one in scored]
    return Scored(
        max(rewards) if pooling == "max" else math.fsum(rewards) / len(rewards),
        sum(one.tokens for one in scored),
        tuple(name for name in PIECES if any(name in one.truncated for one in scored)),
    )


def references_of(record: dict[str, Any]) -> list[Any]:
    """What the candidates of a record are compared with: its `references`, or its one."""
    return record["references"] if "references" in record else [record["reference"]]


def check_scorable(record: Record, *, reference: bool) -> None:
    """Raise RecordError for a record that cannot be scored.

    Args:
        record: A candidate, a group or a triple.
        reference: The model compares with one, so there must be one.
    """
    given = record if reference else {"reference": "", **record}
    check(given, KINDS[kind_of_scorable(record)])
    if reference and "reference" in record and "references" in record:
        raise RecordError("has both `reference` and `references`", hint="drop one of them")
    if reference and not record.get("references", "reference" in record):
        raise RecordError(
            "missing field `reference`",
            hint="POLAR compares with a reference; --no-reference scores without",
        )
