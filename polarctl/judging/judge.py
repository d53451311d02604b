"""A generative judge as an engine: it scores a record's candidates by the record's `principle`.

For every record the judge is asked once or in several orders, under masked names. Its scores,
from 1 to 5, become the record's rewards. A reply that cannot be read is an error of that record and
never a score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polarctl import console, seeding
from polarctl.errors import RecordError, UsageError
from polarctl.judging.chat import ChatServer
from polarctl.judging.controls import Finder, UnwritableError, of_tokenizer
from polarctl.judging.parsing import Failure, Judgement, Reply, parse
from polarctl.judging.prompting import INSTRUCTIONS, masked_names, orders_of, question, unmasked
from polarctl.model import devices
from polarctl.policies.continuation import Unfit
from polarctl.policies.pool import Policy, Sampling, find_model
from polarctl.policies.writer import Writer
from polarctl.records import Record, outputs_of, prompt_id
from polarctl.storage.read import OnBad


class Judge(Protocol):
    """A chat model that is asked.

    Attributes:
        controls: What is a control token in a text that it reads.
    """

    controls: Finder

    def ask(
        self, questions: Sequence[list[dict[str, str]]], seeds: Sequence[int]
    ) -> list[Reply | Failure]:
        """The replies in the order of the questions; messages and a seed each."""

    def close(self) -> None:
        """Give back what it holds."""


class LocalJudge:
    """Asks a causal language model in this process.

    Args:
        path: Folder or Hub id of a model with a chat template.
        device: `--device`.
        dtype: `--dtype`.
        temperature: 0 for the likeliest tokens.
        max_new_tokens: Length limit of an answer, thinking included.
        batch_size: Answers written together.

    Raises:
        MissingError: Config or tokenizer is not there.
        UsageError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str,
        dtype: str,
        temperature: float = 0.0,
        max_new_tokens: int = 4096,
        batch_size: int = 16,
    ):
        devices.quiet_libraries()
        sampling = Sampling(
            temperature=temperature or 1.0,
            top_p=1.0,
            top_k=0 if temperature else 1,
            max_new_tokens=max_new_tokens,
        )
        model = find_model(path, "--model")
        policy = Policy(name="judge", model=model, kind="chat", sampling=sampling)
        where = devices.device_of(device)
        self.writer = Writer(
            policy, device=where, dtype=devices.dtype_of(dtype, where), batch_size=batch_size
        )
        self.controls = of_tokenizer(self.writer.tokenizer)

    def close(self) -> None:
        """Nothing is held."""

    def ask(
        self, questions: Sequence[list[dict[str, str]]], seeds: Sequence[int]
    ) -> list[Reply | Failure]:
        """The replies in the order of the questions.

        Raises:
            MissingError: The weights cannot be loaded.
            PolarctlError: Out of memory, or logits that are not finite.
        """
        encoded = self.writer.encode(questions)
        good = [i for i, ids in enumerate(encoded) if not isinstance(ids, Unfit)]
        ids = [row for row in encoded if not isinstance(row, Unfit)]
        written = dict(zip(good, self.writer.write(ids, [seeds[i] for i in good]), strict=True))
        return [
            Failure(row.reason)
            if isinstance(row, Unfit)
            else Reply(written[i].text, finished=written[i].finish_reason == "stop")
            for i, row in enumerate(encoded)
        ]


@dataclass(frozen=True)
class Judged:
    """What a judge says of one record.

    Attributes:
        rewards: Score of each candidate, from 1 to 5: the mean over the orders.
        ranking: Names of the candidates, best to worst.
        reasoning: What it thought, with the candidates' own names; orders one after another.
    """

    rewards: list[float]
    ranking: list[str]
    reasoning: str


class PrincipleScorer:
    """Scores records by their principle.

    Args:
        judge: Who is asked: a `LocalJudge` or a `polarctl.judging.chat.ChatServer`.
        orders: In how many orders each record is shown; their scores are averaged.
        seed: The run's seed.
        instructions: The judge's system message, for one that was trained on another.

    Attributes:
        contradictions: Replies so far whose ranking contradicts their scores.

    Raises:
        UsageError: Less than one order.
    """

    def __init__(
        self, judge: Judge, *, orders: int = 1, seed: int = 0, instructions: str = INSTRUCTIONS
    ):
        if orders < 1:
            raise UsageError(f"`--orders {orders}`: at least 1")
        self.asked, self.orders, self.seed = judge, orders, seed
        self.instructions = instructions
        self.contradictions = 0

    def judge(self, records: Sequence[Record]) -> list[Judged | Failure]:
        """What the judge says of each record, in order.

        Args:
            records: With `principle` and one candidate or more (`require_principle`).

        Raises:
            PolarctlError: The judge cannot be asked at all.
        """
        shown = [
            orders_of(len(outputs_of(r)), self.orders, self.seed, prompt_id(r)) for r in records
        ]
        questions, seeds = [], []
        unfit: dict[int, Failure] = {}
        for place, (record, orders) in enumerate(zip(records, shown, strict=True)):
            try:
                asked = [self._question(record, order) for order in orders]
            except UnwritableError as token:
                unfit[place] = Failure(
                    f"cannot be shown to the judge: it holds the token `{token}`"
                )
                continue
            questions += asked
            seeds += [
                seeding.derive(self.seed, "judge", prompt_id(record), number)
                for number in range(len(orders))
            ]
        replies = iter(self.asked.ask(questions, seeds))
        return [
            unfit.get(place) or self._together(record, orders, [next(replies) for _ in orders])
            for place, (record, orders) in enumerate(zip(records, shown, strict=True))
        ]

    def _question(self, record: Record, order: Sequence[int]) -> list[dict[str, str]]:
        outputs = outputs_of(record)
        return question(
            record["principle"],
            record["prompt"],
            [outputs[i] for i in order],
            masked_names(len(order)),
            self.instructions,
            self.asked.controls,
        )

    def _together(
        self, record: Record, orders: Sequence[list[int]], replies: Sequence[Reply | Failure]
    ) -> Judged | Failure:
        """One judgement from the replies to all orders; every one must be readable."""
        count = len(orders[0])
        names = names_of(record)
        scores: list[list[float]] = [[] for _ in range(count)]
        places: list[list[int]] = [[] for _ in range(count)]
        thoughts = []
        for number, (order, reply) in enumerate(zip(orders, replies, strict=True), start=1):
            read = reply if isinstance(reply, Failure) else parse(reply, masked_names(count))
            if isinstance(read, Failure):
                which = f" (order {number} of {len(orders)})" if len(orders) > 1 else ""
                return Failure(f"the judge's reply cannot be used{which}: {read.reason}")
            self._add(read, order, scores, places)
            thoughts.append(unmasked(read.reasoning, order, names.__getitem__))
        rewards = [math.fsum(mine) / len(mine) for mine in scores]
        ranked = sorted(range(count), key=lambda i: (-rewards[i], sum(places[i]), i))
        return Judged(rewards, [names[i] for i in ranked], "\n\n".join(filter(None, thoughts)))

    def _add(
        self,
        read: Judgement,
        order: Sequence[int],
        scores: list[list[float]],
        places: list[list[int]],
    ) -> None:
        self.contradictions += read.contradicts_itself
        for candidate, name in zip(order, masked_names(len(order)), strict=True):
            scores[candidate].append(read.scores[name])
            places[candidate].append(read.ranking.index(name))

    def served(self) -> dict[str, Any]:
        """What tells the server's judge from another; see `ChatServer.served`."""
        assert isinstance(self.asked, ChatServer)
        return self.asked.served()

    def close(self) -> None:
        """Give back what the judge holds; warn of rankings that contradict their scores."""
        self.asked.close()
        if self.contradictions:
            console.warn(
                f"{self.contradictions:,} replies put a lower score before a higher one; "
                "the scores count"
            )


def names_of(record: Record) -> list[str]:
    """Names of a record's candidates: their own where each has another one, else `candidate-0`, ...

    A triple's are `chosen` and `rejected`.
    """
    if "candidates" in record:
        own = [candidate.get("name") for candidate in record["candidates"]]
        if all(own) and len(set(own)) == len(own):
            return own
    elif "chosen" in record:
        return ["chosen", "rejected"]
    return [f"candidate-{index}" for index in range(len(outputs_of(record)))]


def require_principle(record: Record) -> None:
    """Raise RecordError for a record without a `principle`; for `polarctl.storage.read.Reader`."""
    principle = record.get("principle")
    if not isinstance(principle, str) or not principle.strip():
        raise RecordError(
            "missing field `principle`" if principle is None else "field `principle`: no text",
            hint="a sentence that says what makes a response good",
        )


def judge_records(
    records: Sequence[Record], scorer: PrincipleScorer, on_bad: OnBad
) -> Iterator[dict[str, Any]]:
    """The records with what the judge says of them; those that it says nothing of are set aside.

    Adds `rewards` in the order of the candidates (`reward` for a single output), `ranking`,
    `reasoning` and `parse_status` ("ok": others are not written).

    Args:
        records: Records with a principle.
        scorer: Who judges.
        on_bad: What happens to a record that cannot be scored.
    """
    for record, found in zip(records, scorer.judge(records), strict=True):
        if isinstance(found, Failure):
            on_bad(record.where or prompt_id(record), found.reason, dict(record))
            continue
        group = "candidates" in record or "chosen" in record
        scores = {"rewards": found.rewards} if group else {"reward": found.rewards[0]}
        yield {
            **record,
            **scores,
            "ranking": found.ranking,
            "reasoning": found.reasoning,
            "parse_status": "ok",
        }
