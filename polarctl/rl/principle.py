"""A principle-following judge as a reward: it sees all rollouts of a prompt together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polarctl.errors import PolarctlError
from polarctl.judging.judge import LocalJudge, PrincipleScorer
from polarctl.judging.parsing import Failure
from polarctl.records import Record, prompt_id
from polarctl.rl.reward_batch import Batch, Values, groups_of
from polarctl.scoring.answers import Answers

TRIES = 3  # of a question whose reply cannot be read, each in another order of the rollouts


class PrincipleReward:
    """The judge's scores, from 1 to 5, by the records' `principle`.

    Args:
        scorer: Asks the judge.
        answers: How outputs are read.
        size: Rollouts of a prompt.
    """

    def __init__(self, scorer: PrincipleScorer, answers: Answers, size: int):
        self.scorer, self.answers, self.size = scorer, answers, size

    def values(self, batch: Batch, wanted: Sequence[bool]) -> Values:
        """The scores; the floor for a rollout without an answer, which the judge is not shown.

        Raises:
            PolarctlError: The judge cannot be asked, or its replies cannot be read.
        """
        raw: list[float | None] = [None] * len(wanted)
        floored = [""] * len(wanted)
        shown: list[list[int]] = []
        for places in groups_of(batch.numbers, self.size):
            shown.append([])
            for i in filter(wanted.__getitem__, places):
                fault = self.answers.fault(
                    batch.completions[i],
                    cut_off=not batch.ended[i],
                    wrapper=batch.rows[i]["wrapper"],
                )
                if fault is None:
                    shown[-1].append(i)
                else:
                    raw[i], floored[i] = self.answers.floor, fault
        for places, scores in self._scores(batch, [places for places in shown if places]):
            for i, score in zip(places, scores, strict=True):
                raw[i] = score
        return Values(raw, raw, floored)

    def _scores(self, batch: Batch, groups: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        """Places of a group and their scores, for each group."""
        found = []
        reason = ""
        for attempt in range(TRIES):
            asked = [self._question(batch, places, attempt) for places in groups]
            unread = []
            for places, judged in zip(groups, self.scorer.judge(asked), strict=True):
                if isinstance(judged, Failure):
                    unread.append(places)
                    reason = judged.reason
                else:
                    found.append((places, judged.rewards))
            groups = unread
            if not groups:
                return found
        where = batch.records[groups[0][0]].where
        raise PolarctlError(
            f"{where}: {reason}, asked {TRIES} times",
            hint="a judge that answers with the scores as JSON, or another principle",
        )

    def _question(self, batch: Batch, places: Sequence[int], attempt: int) -> Record:
        record = batch.records[places[0]]
        # Order and seed of a question come from its id.
        name = prompt_id(record) + (f" again {attempt}" if attempt else "")
        outputs = [self.answers.text(batch.completions[i]) for i in places]
        return Record(
            {
                "id": name,
                "prompt": record["prompt"],
                "principle": record["principle"],
                "candidates": [{"output": output} for output in outputs],
            },
            record.where,
        )

    def served(self) -> dict[str, Any]:
        """What tells a server's judge from another; nothing of one in this process."""
        if isinstance(self.scorer.asked, LocalJudge):
            return {}
        return {f"judge_{name}": value for name, value in self.scorer.served().items()}

    def close(self) -> None:
        """Give back what the judge holds."""
        self.scorer.close()
