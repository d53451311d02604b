"""What `score` does with a window of records, in its own process or in those of `--gpus`.

And what it says at its end: how the rewards are spread, and how fast it went.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from polarctl import console
from polarctl.errors import RecordError, UsageError
from polarctl.records import Record, outputs_of, prompt_id
from polarctl.scoring import conditions, engines
from polarctl.scoring.answers import AS_THEY_ARE, REWARD_FLOOR, Answers, floor_of
from polarctl.scoring.options import ScoreOptions
from polarctl.scoring.reward_function import WITHIN_GROUP, normalise_group
from polarctl.scoring.scorer import (
    Cuts,
    Floored,
    Scored,
    check_scorable,
    score_records,
)


@dataclass
class Done:
    """A window's records with their rewards.

    Attributes:
        records: In order.
        rejected: (place, reason, record) of those that could not be scored.
        rewards: All raw rewards.
        tokens: Tokens that were read for them.
        cuts: Inputs that were cut.
        floored: Outputs that got the floor.
        choices: What the process chose automatically so far.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[tuple[str, str, Any]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    tokens: int = 0
    cuts: Cuts = field(default_factory=Cuts)
    floored: Floored = field(default_factory=Floored)
    choices: dict[str, dict[str, str]] = field(default_factory=dict)

    def reject(self, where: str, reason: str, raw: Any = None) -> None:
        """Set a record aside."""
        self.rejected.append((where, reason, raw))


class ScoreWork:
    """Scores windows. Opens the engine at the first one, and can be pickled before that.

    Args:
        config: The options of `score`, which `polarctl.scoring.engines.check` has passed.
        chat: The model reads conversations (`polarctl.scoring.engines.reads_chat`).

    Raises:
        UsageError: Options that do not go together, or unusable conditions.
    """

    def __init__(self, config: ScoreOptions, *, chat: bool = False):
        self.config, self.chat = config, chat
        default = REWARD_FLOOR if config.strip_thinking else None
        self.answers = Answers(
            strip_thinking=config.strip_thinking, floor=floor_of(config.reward_floor, default)
        )
        self.principle = config.backend == "principle"
        self.conditions: conditions.Conditions | None = None
        self._engine: Any = None
        self._voice = console.snapshot()
        self._check()

    def _check(self) -> None:
        config = self.config
        if (config.condition_field is None) != (config.conditions is None):
            raise UsageError("`--condition-field` and `--conditions` go together")
        if config.condition_field is not None and config.conditions is not None:
            self.conditions = conditions.read(config.condition_field, config.conditions)
        if self.principle:
            if config.details or config.normalize.startswith("polar"):
                raise UsageError("a judge's scores have no `--details` and are on no POLAR scale")
            if self.answers != AS_THEY_ARE or self.conditions:
                raise UsageError(
                    "`--strip-thinking`, `--reward-floor` and `--conditions` are for reward models"
                )

    def verify(self, record: Record) -> None:
        """Raise RecordError for a record that lacks what the options need."""
        shown = not self.config.no_reference and (not self.chat or self.config.reference_in_prompt)
        check_scorable(record, reference=shown and not self.principle)
        if self.principle:
            from polarctl.judging.judge import require_principle

            require_principle(record)
        if self.config.normalize in WITHIN_GROUP and len(outputs_of(record)) < 2:
            raise RecordError(
                f"`--normalize {self.config.normalize}` compares the candidates of a record",
                hint="a group of `candidates`, or another --normalize",
            )
        if self.conditions is not None:
            self.conditions.verify(record)

    def __call__(self, window: Sequence[Record]) -> Done:
        """The window's records with their rewards.

        Raises:
            PolarctlError: The engine cannot be opened, or fails.
        """
        self.open()
        done = Done()
        if self.principle:
            self._judge(window, done)
        else:
            try:
                self._add(window, done)
            except RecordError:
                done = Done()  # which one it is: each alone
                for record in window:
                    try:
                        self._add([record], done)
                    except RecordError as error:
                        done.reject(record.where or prompt_id(record), error.reason, dict(record))
        done.choices = console.choices()
        return done

    def close(self) -> None:
        """Give back what the engine holds; it says what there is to say."""
        if self._engine is None:
            return
        self._engine.close()

    def served(self) -> dict[str, Any]:
        """What the server says that it serves; opens the engine.

        Raises:
            MissingError: No server answers.
        """
        self.open()
        found: dict[str, Any] = self._engine.served()
        return found

    def open(self) -> Any:
        """The engine, opened if it is not. Call it before several threads share this object."""
        if self._engine is not None:
            return self._engine
        import os

        from polarctl.parallel.pool import NUMBER

        if NUMBER in os.environ:  # one of several processes; the first says what it chose
            console.speak_as(self._voice)
        if self.principle:
            self._engine = engines.open_judge(self.config)
        else:
            self._engine = engines.open_scorer(self.config, chat=self.chat)
        return self._engine

    def _judge(self, window: Sequence[Record], done: Done) -> None:
        from polarctl.judging.judge import judge_records

        for record in judge_records(window, self._engine, done.reject):
            rewards = record["rewards"] if "rewards" in record else [record["reward"]]
            self._finish(record, rewards, done)

    def _add(self, window: Sequence[Record], done: Done) -> None:
        def score(records: Sequence[Record]) -> Iterable[tuple[dict[str, Any], list[Scored]]]:
            # A model that reads conversations has no use for a reference unless it is asked for.
            return score_records(
                records,
                self._engine,
                no_reference=self.config.no_reference
                or (self.chat and not self.config.reference_in_prompt),
                pooling=self.config.reference_pooling,
                answers=self.answers,
            )

        scored = score(window) if self.conditions is None else self.conditions.apply(window, score)
        for record, details in scored:
            done.tokens += sum(one.tokens for one in details)
            done.cuts.add(details)
            done.floored.add(details, self.answers.floor)
            if self.config.details:
                _put(record, "tokens", [one.tokens for one in details])
                _put(record, "truncated", [list(one.truncated) for one in details])
            self._finish(record, [one.reward for one in details], done)

    def _finish(self, record: dict[str, Any], rewards: list[float], done: Done) -> None:
        """What follows from the rewards alone."""
        if self.config.best_of_n and "rewards" in record:
            record["best"] = rewards.index(max(rewards))
        if self.config.normalize != "none":
            _put(record, "normalized", normalise_group(rewards, self.config.normalize))
        done.rewards += rewards
        done.records.append(record)


def _put(record: dict[str, Any], name: str, values: list[Any]) -> None:
    """A list where the record has `rewards`, else its one value."""
    record[name] = values if "rewards" in record else values[0]


class Summary:
    """Collects the raw rewards of this run, 8 bytes each; not those from before a resume."""

    def __init__(self) -> None:
        self.rewards = array("d")
        self.records = self.tokens = 0
        self.start = time.monotonic()

    def add(self, records: int, rewards: Iterable[float], tokens: int) -> None:
        """Count some scored records."""
        self.records += records
        self.tokens += tokens
        self.rewards.extend(rewards)

    def say(self) -> None:
        """Say mean, standard deviation, range and quartiles, and the throughput."""
        if not self.rewards:
            return
        import numpy as np

        values = np.frombuffer(self.rewards)
        low, first, middle, third, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
        seconds = max(time.monotonic() - self.start, 1e-9)
        console.note(
            f"rewards: {len(values):,}, mean {values.mean():.4g}, standard deviation "
            f"{values.std():.4g}; least {low:.4g}, quartiles {first:.4g}, {middle:.4g}, "
            f"{third:.4g}, largest {high:.4g}",
            rewards=len(values),
            mean=float(values.mean()),
            standard_deviation=float(values.std()),
            quantiles=[low, first, middle, third, high],
        )
        tokens = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        console.note(
            f"speed: {self.records:,} records in {seconds:.1f} s, loading included: "
            f"{self.records / seconds:,.1f} records/s, {len(values) / seconds:,.1f} "
            f"rewards/s{tokens}",
            seconds=seconds,
        )
