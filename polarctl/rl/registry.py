"""The rewards of `rft` by name, and what they give to a step's rollouts.

polar            the POLAR model of `--reward-model`, here or on a server
rm:PATH          a reward model that reads a conversation, without the reference
principle:MODEL  a chat model that judges by the records' `principle`, here or on a server
anything else    a verifier (`polarctl.verifiers.named`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polarctl import console
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.judging.judge import require_principle
from polarctl.model.template import content_text
from polarctl.parallel import rank
from polarctl.records import Record
from polarctl.rl.combine import combined, overlong_penalty
from polarctl.rl.reward_batch import Batch, Values, groups_of
from polarctl.scoring import engines
from polarctl.scoring.answers import REWARD_FLOOR, Answers, floor_of
from polarctl.scoring.reward_function import PolarReward
from polarctl.scoring.scorer import Item, Scorer, load_scorer, score_answers
from polarctl.verifiers import named
from polarctl.verifiers.bounds import Bounds
from polarctl.verifiers.named import Verifier, open_verifier

OVERLONG = "overlong"


@dataclass(frozen=True)
class Rewarded:
    """What a batch gets.

    Attributes:
        raw: The combined reward of each rollout.
        used: The same on the scale that is trained on.
        components: For each rollout, reward name to raw value; None: not applicable.
        floored: Why a rollout's reward by POLAR is the floor; empty where it is not.
    """

    raw: list[float]
    used: list[float]
    components: list[dict[str, float | None]]
    floored: list[str]


class _Part(Protocol):
    """A reward."""

    def values(self, batch: Batch, wanted: Sequence[bool]) -> Values:
        """Its values; where it is not wanted it may save the work and give None."""

    def close(self) -> None:
        """Give back what it holds."""


class _Polar:
    """The POLAR model."""

    def __init__(self, reward: PolarReward):
        self.reward = reward

    def values(self, batch: Batch, wanted: Sequence[bool]) -> Values:
        places = [number for number, yes in enumerate(wanted) if yes]
        found: dict[str, list[Any]] = {"polar_raw": [], "polar_floored": []}
        rows = [batch.rows[i] for i in places]
        used = iter(
            self.reward(
                [batch.prompts[i] for i in places],
                [batch.completions[i] for i in places],
                reference=[row.get("reference") for row in rows],
                wrapper=[row["wrapper"] for row in rows],
                ended=[batch.ended[i] for i in places],
                log_extra=found.__setitem__,
            )
            if places
            else ()
        )
        raw, floored = iter(found["polar_raw"]), iter(found["polar_floored"])
        return Values(
            [next(raw) if yes else None for yes in wanted],
            [next(used) if yes else None for yes in wanted],
            [next(floored) if yes else "" for yes in wanted],
        )

    def served(self) -> dict[str, Any]:
        served = getattr(self.reward.scorer, "served", None)
        return served() if served is not None else {}

    def close(self) -> None:
        if self.reward.truncated:
            console.warn(
                f"{self.reward.truncated:,} of {self.reward.scored:,} rollouts were scored with an "
                "input longer than the reward model's template, which was cut"
            )
        self.reward.scorer.close()


class _ChatModel:
    """A reward model that reads a conversation."""

    def __init__(self, scorer: Scorer, answers: Answers):
        self.scorer, self.answers = scorer, answers

    def values(self, batch: Batch, wanted: Sequence[bool]) -> Values:
        items = [
            Item(prompt, "", completion, row["wrapper"])
            for prompt, completion, row, yes in zip(
                batch.prompts, batch.completions, batch.rows, wanted, strict=True
            )
            if yes
        ]
        cut = [not ended for ended, yes in zip(batch.ended, wanted, strict=True) if yes]
        given = iter(score_answers(items, self.scorer, self.answers, cut))
        raw = [next(given).reward if yes else None for yes in wanted]
        return Values(raw, raw, [""] * len(raw))

    def close(self) -> None:
        self.scorer.close()


class _Verified:
    """A verifier."""

    def __init__(self, verifier: Verifier, answers: Answers):
        self.verifier, self.answers = verifier, answers

    def values(self, batch: Batch, wanted: Sequence[bool]) -> Values:
        texts = texts_for(self.verifier, self.answers, batch.completions)
        raw = self.verifier.values(batch.records, texts)
        return Values(raw, raw, [""] * len(raw))

    def close(self) -> None:
        self.verifier.close()


def texts_for(verifier: Verifier, answers: Answers, completions: Sequence[Any]) -> list[str]:
    """What a verifier looks at of each completion: the whole, or the answer alone."""
    return [content_text(one if verifier.whole else answers.text(one)) for one in completions]


def judges_of(names: Sequence[str]) -> list[str]:
    """Those of several rewards that are judges."""
    return [name for name in names if name.startswith("principle:")]


def check_names(config: Any) -> None:
    """Raise UsageError for rewards that cannot be used together; nothing is loaded."""
    if config.check is not None and not named.is_verifier(config.check):
        raise UsageError(
            f"`--check {config.check}`: no verifier", hint=f"one of: {', '.join(named.NAMES)}"
        )
    names = config.reward
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"`--reward {twice[0]}` is given twice")
    for name in names:
        kind, _, rest = name.partition(":")
        known = name == "polar" or (kind in ("rm", "principle") and rest) or named.is_verifier(name)
        if not known:
            raise UsageError(
                f"no reward `{name}`",
                hint=f"polar, rm:PATH, principle:MODEL, or one of: {', '.join(named.NAMES)}",
            )
    if config.method == "sft":
        return
    if "polar" in names and config.reward_model is None:
        raise UsageError(
            f"`--method {config.method}` with `--reward polar` needs `--reward-model`",
            hint="another --reward, or --method sft, which learns from the references alone",
        )
    if config.reward_weights and len(config.reward_weights) != len(names):
        raise UsageError(
            f"{len(config.reward_weights)} `--reward-weights` for {len(names)} rewards",
            hint="one for each `--reward`, in their order",
        )
    sides = any(map(named.has_truth, names)), not all(map(named.is_verifier, names))
    if config.combine == "gate" and not all(sides):
        missing = "model" if sides[0] else "verifier that compares with a field of the record"
        raise UsageError(
            f"`--combine gate` is between verifiers and models, and here is no {missing}",
            hint="for example --reward exact --reward polar",
        )
    if config.judge_server is not None and len(judges_of(names)) > 1:
        raise UsageError("`--judge-server` is for one `--reward principle:MODEL`")
    here = config.batch_size // rank.count()
    whole = ["--combine zsum"] if config.combine == "zsum" and len(names) > 1 else []
    whole += [f"--reward {name}" for name in judges_of(names)]
    if whole and here % config.num_generations:
        raise UsageError(
            f"`{whole[0]}` looks at all {config.num_generations} rollouts of a prompt, and a "
            f"process has {here} rollouts of a step",
            hint="a larger --batch-size",
        )


def sources_of(config: Any) -> dict[str, str]:
    """Models and files that the rewards are made from, by a name for each."""
    names = (*config.reward, *((config.check,) if config.check else ()))
    here = ("rm:",) if config.judge_server is not None else ("rm:", "principle:")
    models = {name: name.partition(":")[2] for name in names if name.startswith(here)}
    files = {name: path for name in names for path in named.files_of(name)}
    held = {"check_prompts": config.check_prompts} if config.check_prompts else {}
    return models | files | held


class Rewards:
    """All rewards of a run.

    Args:
        parts: By name.
        config: Options of `polarctl rft`.

    Attributes:
        modules: The models that compute here.
    """

    def __init__(self, parts: dict[str, _Part], config: Any, modules: Sequence[Any] = ()):
        self.parts, self.config, self.modules = parts, config, list(modules)
        given = config.reward_weights or (1.0,) * len(parts)
        self.weights = dict(zip(parts, given, strict=True))
        self.gates = frozenset(filter(named.has_truth, parts))
        self.models = frozenset(name for name in parts if not named.is_verifier(name))

    def __call__(self, batch: Batch) -> Rewarded:
        """Reward the rollouts of a batch.

        Raises:
            PolarctlError: A reward failed, or none applies. A failure is never a reward.
        """
        values: dict[str, Values] = {}
        wanted = [True] * len(batch.numbers)
        for name in sorted(self.parts, key=lambda name: name not in self.gates):
            values[name] = self.parts[name].values(batch, wanted)
            if self.config.combine == "gate" and name in self.gates:
                verdicts = values[name].raw
                wanted = [yes and v is None for yes, v in zip(wanted, verdicts, strict=True)]
        raw, used = self._combined(batch, values, "raw"), self._combined(batch, values, "used")
        components: list[dict[str, float | None]] = [
            {name: values[name].raw[i] for name in self.parts} for i in range(len(raw))
        ]
        if self.config.overlong_buffer is not None:
            longest, buffer = self.config.max_new_tokens, self.config.overlong_buffer
            for i, tokens in enumerate(batch.tokens):
                penalty = overlong_penalty(tokens, longest, buffer)
                components[i][OVERLONG] = penalty
                raw[i] += penalty
                used[i] += penalty
        floored = [
            next(filter(None, reasons), "")
            for reasons in zip(*(v.floored for v in values.values()), strict=True)
        ]
        return Rewarded(raw, used, components, floored)

    def _combined(self, batch: Batch, values: dict[str, Values], scale: str) -> list[float]:
        result: list[float] = []
        for places in groups_of(batch.numbers, self.config.num_generations):
            columns = {
                name: [getattr(values[name], scale)[i] for i in places] for name in self.parts
            }
            try:
                result += combined(
                    columns,
                    self.weights,
                    self.config.combine,
                    gates=self.gates,
                    models=self.models,
                )
            except PolarctlError as error:
                where = batch.records[places[0]].where
                raise PolarctlError(f"{where}: {error}", hint=error.hint) from None
        return result

    def served(self) -> dict[str, Any]:
        """What tells the models of servers from others, for a run's identity."""
        asked = (getattr(part, "served", dict) for part in self.parts.values())
        return {name: value for served in asked for name, value in served().items()}

    def close(self) -> None:
        """Give back what the rewards hold, and say what there is to say of them."""
        for part in self.parts.values():
            part.close()


def answers_of(config: Any, thinking_opened: bool, floor: float | None = None) -> Answers:
    """How outputs are read, from the options."""
    return Answers(
        strip_thinking=config.strip_thinking, thinking_opened=thinking_opened, floor=floor
    )


def limits_of(config: Any) -> Bounds:
    """What a verifier may take, from the options."""
    return Bounds(timeout_s=config.verifier_timeout, memory_gib=config.verifier_memory)


def open_rewards(config: Any, *, device: str, dtype: str, thinking_opened: bool = False) -> Rewards:
    """The rewards that the options name, their models loaded.

    Args:
        config: Options that `check_names` has passed.
        device: Torch device of models in this process.
        dtype: Their precision, as `--dtype`.
        thinking_opened: Prompts end in `<think>`, so outputs begin inside that part.
    """
    parts: dict[str, _Part] = {}
    modules: list[Any] = []
    place = {"device": device, "dtype": dtype, "batch_tokens": config.batch_tokens}
    for name in config.reward:
        if named.is_verifier(name):
            verifier = open_verifier(
                name, limits=limits_of(config), thinking_opened=thinking_opened
            )
            parts[name] = _Verified(verifier, answers_of(config, thinking_opened))
        elif name == "polar":
            scorer = _polar_scorer(config, place)
            if hasattr(scorer, "model"):
                modules.append(scorer.model.model)
            parts[name] = _Polar(
                PolarReward(
                    scorer,
                    normalize=config.normalize,
                    strip_thinking=config.strip_thinking,
                    thinking_opened=thinking_opened,
                    reward_floor=floor_of(config.reward_floor, REWARD_FLOOR),
                )
            )
        elif name in judges_of(config.reward):
            parts[name] = _judge(name.partition(":")[2], config, device, dtype, thinking_opened)
        else:
            from polarctl.scoring.chat_classifier import ClassifierScorer

            judge = ClassifierScorer(name.partition(":")[2], **place)
            modules.append(judge.engine.model.model)
            # The default floor is below what POLAR gives; another model has another scale.
            floor = floor_of(config.reward_floor, None)
            parts[name] = _ChatModel(judge, answers_of(config, thinking_opened, floor))
    return Rewards(parts, config, modules)


def _polar_scorer(config: Any, place: dict[str, Any]) -> Scorer:
    if config.server is None:
        return load_scorer(config.reward_model, **place)
    return engines.open_served(config, config.reward_model)


def _judge(model: str, config: Any, device: str, dtype: Any, opened: bool) -> _Part:
    from polarctl.rl.principle import PrincipleReward
    from polarctl.scoring.options import EngineConfig

    scorer = engines.open_judge(
        EngineConfig(
            model=model,
            backend="principle",
            server=config.judge_server,
            concurrency=config.concurrency,
            server_deadline=config.server_deadline,
            device=device,
            dtype=dtype,
            seed=config.seed,
        )
    )
    floor = floor_of(config.reward_floor, None)
    return PrincipleReward(scorer, answers_of(config, opened, floor), config.num_generations)


def needs_reference(record: Record, why: str) -> None:
    """Raise RecordError for a record without a reference."""
    if "reference" not in record:
        raise RecordError("missing field `reference`", hint=why)


class Checker:
    """Whether the rewards have something to say of a record, before anything is trained.

    Args:
        config: Options of `polarctl rft`.

    Attributes:
        used: Names of verifiers that apply to some record so far.
    """

    def __init__(self, config: Any):
        self.config = config
        self.verifiers = {
            name: open_verifier(name, limits=limits_of(config))
            for name in (config.reward if config.method != "sft" else ())
            if named.is_verifier(name)
        }
        self.used: set[str] = set()

    def __call__(self, record: Record) -> None:
        """Look at a record.

        Raises:
            RecordError: No reward applies, or a field cannot be used.
        """
        if self.config.method == "sft":
            needs_reference(record, "it is the answer that --method sft learns")
            return
        applying = {name for name, v in self.verifiers.items() if v.applies(record)}
        self.used |= applying
        gated = self.config.combine == "gate" and any(map(named.has_truth, applying))
        if "polar" in self.config.reward and not gated:
            needs_reference(record, "the POLAR reward compares with a reference")
        if judges_of(self.config.reward) and not gated:
            require_principle(record)
        if not applying and len(self.verifiers) == len(self.config.reward):  # no model either
            raise RecordError(
                f"none of the rewards applies ({', '.join(self.verifiers)})",
                hint="the field that a verifier looks at, such as `answer`",
            )

    def close(self) -> None:
        """End the verifiers."""
        for verifier in self.verifiers.values():
            verifier.close()

    def finish(self) -> None:
        """All records were looked at.

        Raises:
            UsageError: A verifier applied to none of them.
        """
        self.close()
        unused = [name for name in self.verifiers if name not in self.used]
        if unused:
            raise UsageError(
                f"`--reward {unused[0]}` applies to no record", hint="a field that the records have"
            )
