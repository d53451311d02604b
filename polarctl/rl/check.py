"""The held-out check of `rft`: what the policy is worth to a verifier that is not the reward.

Every so many steps the policy answers prompts that it is not trained on, and a verifier looks at
the answers. The policy with the best mean is the one that is written in the end. Each prompt has a
seed of its own, the same at every check, so that checks can be compared and the training's random
numbers stay as they are.

All that a resume has to know stands in `metrics.jsonl`; the best weights stay beside the
checkpoints until a checkpoint knows of better ones.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import safetensors.torch
import torch
from accelerate.utils import gather_object

from polarctl import console, seeding
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.policies.pool import Sampling
from polarctl.policies.writer import Writer
from polarctl.records import Record, prompt_id
from polarctl.rl.registry import OVERLONG, answers_of, limits_of, texts_for
from polarctl.scoring.answers import Answers
from polarctl.storage import atomic
from polarctl.storage.read import Reader
from polarctl.storage.run_folder import Run
from polarctl.verifiers import named
from polarctl.verifiers.named import Verifier, open_verifier

START = "check_start"
_MOST = 200  # prompts that are set aside
_FELL = 0.1  # of a verifier's mean over the rollouts: more than a step's noise


class Check:
    """Looks at a policy every so many steps, keeps the best, and says when to stop.

    Args:
        config: Options of `polarctl rft`.
        verifier: What looks at the answers.
        records: Held-out prompts, to all of which it applies.
        writer: Writes as the policy; its own weights are not loaded.
        answers: How outputs are read.
        folder: Where the best weights are kept until the end.

    Attributes:
        values: Step to value; step 0 is the policy at the start.
    """

    def __init__(
        self,
        config: Any,
        verifier: Verifier,
        records: Sequence[Record],
        writer: Writer,
        answers: Answers,
        folder: Path,
    ):
        self.config, self.verifier, self.records = config, verifier, records
        self.writer, self.answers, self.folder = writer, answers, folder
        self.values: dict[int, float] = {}
        self.prompts = writer.encode([record["prompt"] for record in records])
        self.seeds = [seeding.derive(config.seed, "check", prompt_id(r)) for r in records]

    @property
    def best(self) -> int:
        """The step with the highest value; of equal ones the first."""
        return max(self.values, key=lambda step: (self.values[step], -step))

    @property
    def over(self) -> bool:
        """Whether `--patience` has run out."""
        since = [step for step in self.values if step > self.best]
        return self.config.patience is not None and len(since) >= self.config.patience

    def resume(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Know what was found until a checkpoint, from its lines of `metrics.jsonl`."""
        self.values = {}
        for entry in entries:
            if START in entry:
                self.values[0] = entry[START]
            if "check" in entry:
                self.values[entry["step"]] = entry["check"]
        if self.values and not self._weights(self.best).exists():
            raise UsageError(
                f"{self._weights(self.best)}: the best policy so far is not there",
                hint="pass --force to start again",
            )

    def due(self, step: int, last: int) -> bool:
        """Whether to look after a step."""
        return step % self.config.check_steps == 0 or step == last

    def look(self, trainer: Any, step: int) -> None:
        """Let the policy answer, and keep it if it is the best so far. All processes call it."""
        place = trainer.accelerator
        policy = trained(trainer)
        if any(hasattr(weight, "ds_id") for weight in policy.parameters()):
            raise UsageError(
                "`--check` does not go with ZeRO-3, which holds no policy whole",
                hint="--deepspeed zero2",
            )
        mine = slice(place.process_index, None, place.num_processes)
        found = self._answered(policy, self.records[mine], self.prompts[mine], self.seeds[mine])
        parts = gather_object(found) if place.num_processes > 1 else found
        if not parts:
            raise PolarctlError(f"`--check {self.config.check}` applies to no held-out prompt")
        self.values[step] = math.fsum(parts) / len(parts)
        if self.best == step and place.is_main_process:
            self._keep(policy, step)
        place.wait_for_everyone()

    def _answered(
        self, policy: Any, records: Sequence[Record], prompts: Any, seeds: Sequence[int]
    ) -> list[float]:
        training = policy.training
        policy.eval()
        try:
            # Adapters stand inside the base model, whose arguments the decoding knows.
            base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
            self.writer.use(base)
            written = self.writer.write(prompts, seeds)
        finally:
            policy.train(training)
        return [v for v in self.judged(records, [one.text for one in written]) if v is not None]

    def judged(self, records: Sequence[Record], outputs: Sequence[str]) -> list[float | None]:
        """What the verifier says to outputs; None where it is not applicable."""
        return self.verifier.values(records, texts_for(self.verifier, self.answers, outputs))

    def entry(self, step: int) -> dict[str, float]:
        """What a step's line of metrics says of it."""
        found = {START: self.values[0]} if step == 1 else {}
        return found | ({"check": self.values[step]} if step in self.values else {})

    def forget(self) -> None:
        """Remove weights that no resume will ask for, once a checkpoint is whole."""
        for path in self.folder.glob("*.safetensors"):
            if path != self._weights(self.best):
                path.unlink()

    def restore(self, trainer: Any) -> None:
        """Give the trainer's policy the best weights, and say which they are."""
        best, last = self.best, max(self.values)
        weights = safetensors.torch.load_file(self._weights(best))
        with torch.no_grad():
            for name, weight in _learning(trained(trainer)):
                weight.copy_(weights[name])
        name = f"`{self.config.check}` on {len(self.records):,} held-out prompts"
        what = f"the policy of step {best} is written: {self.values[best]:.3f} by {name}"
        if best == 0:
            console.warn(f"no step was better than the policy at the start: {what}")
        else:
            console.note(
                f"rft: {what} ({self.values[0]:.3f} at the start, {self.values[last]:.3f} after "
                f"step {last}, the last)"
            )

    def held_out(self) -> bytes:
        """The prompts, a line each."""
        return b"".join(orjson.dumps(record) + b"\n" for record in self.records)

    def counts(self) -> dict[str, Any]:
        """Numbers for the manifest."""
        return {
            "check_prompts": len(self.records),
            "check_start": self.values[0],
            "best_step": self.best,
            "best_check": self.values[self.best],
        }

    def _keep(self, policy: Any, step: int) -> None:
        path = self._weights(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        kept = {name: weight.detach().cpu().contiguous() for name, weight in _learning(policy)}
        safetensors.torch.save_file(kept, half)
        with open(half, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(half, path)
        atomic.sync_folder(path.parent)

    def _weights(self, step: int) -> Path:
        return self.folder / f"{step}.safetensors"


def trained(trainer: Any) -> Any:
    """The policy of a trainer, without what the trainer puts around it."""
    return trainer.accelerator.unwrap_model(trainer.model)


def _learning(policy: Any) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in policy.named_parameters() if weight.requires_grad]


def prepared(
    config: Any,
    run: Run,
    writer: Writer,
    verify: Callable[[Callable[[Record], None]], Callable[[Record], None]],
    thinking_opened: bool,
) -> tuple[Run, Check | None]:
    """The check that the options ask for, and the run without the prompts that it sets aside.

    Args:
        config: Options of `polarctl rft`.
        run: With all records.
        writer: Knows what the policy can read.
        verify: From a check of a record to one that also looks whether the policy can read it.
        thinking_opened: Prompts end in `<think>`.

    Raises:
        RecordError: A row of `--check-prompts` that cannot be used.
        UsageError: The verifier applies to no record, or nothing is left to train on.
    """
    if config.check is None:
        return run, None
    verifier = open_verifier(
        config.check, limits=limits_of(config), thinking_opened=thinking_opened
    )
    if config.check in config.reward and config.method != "sft":
        console.warn(
            f"`--check {config.check}` is a reward too: it sees what is rewarded, and not whether "
            "the reward is exploited"
        )
    if config.check_prompts is None:
        held = set_aside(run.records, verifier, config.seed)
        of = f"{len(held):,} of {len(run.records):,} prompts"
        console.choice("held out", of, "drawn by the seed for --check; held_out.jsonl names them")
        records = [run.records[i] for i in sorted(held)]
        kept = tuple(record for i, record in enumerate(run.records) if i not in held)
        run = dataclasses.replace(run, records=kept)
    else:
        records = list(Reader([config.check_prompts], "prompt", verify=verify(_applying(verifier))))
        known = {prompt_id({"prompt": record["prompt"]}) for record in run.records}
        both = sum(prompt_id({"prompt": record["prompt"]}) in known for record in records)
        if both:
            console.warn(
                f"{config.check_prompts}: {both:,} of {len(records):,} prompts are trained on too"
            )
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
    )
    policy = dataclasses.replace(writer.policy, sampling=sampling)
    own = Writer(policy, device="cpu", dtype=None, batch_size=config.batch_size)
    answers = answers_of(config, thinking_opened)
    return run, Check(config, verifier, records, own, answers, run.checkpoints / "best")


def _applying(verifier: Verifier) -> Callable[[Record], None]:
    def check(record: Record) -> None:
        if not verifier.applies(record):
            raise RecordError(
                f"`--check {verifier.name}` does not apply", hint="the field that it looks at"
            )

    return check


def set_aside(records: Sequence[Record], verifier: Verifier, seed: int) -> set[int]:
    """Indices of a tenth of the records, 200 at most, that the policy will not be trained on.

    Drawn by the seed from the records that the verifier applies to; records with the same prompt
    stay together.

    Raises:
        UsageError: The verifier applies to no record, or nothing would be left to train on.
    """
    alike: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        alike.setdefault(prompt_id({"prompt": record["prompt"]}), []).append(index)
    groups = [g for g in alike.values() if all(verifier.applies(records[i]) for i in g)]
    if not groups:
        raise UsageError(
            f"`--check {verifier.name}` applies to no record", hint="a field that the records have"
        )
    seeding.rng(seed, "check").shuffle(groups)
    wanted, held = min(_MOST, max(1, len(records) // 10)), set[int]()
    for group in groups:
        if len(held) < wanted:
            held |= set(group)
    if len(held) == len(records):
        raise UsageError(
            "`--check` sets prompts aside, and none is left to train on",
            hint="more prompts, or --check-prompts FILE",
        )
    return held


def alarms(entries: Sequence[Mapping[str, Any]], window: int, prompts: int) -> dict[str, str]:
    """Signs that a policy exploits its reward, in words; empty when there are none.

    A reward is said to rise when its mean over the last `window` steps is above that over the
    `window` steps up to the one that it is compared with. Then three things are wrong:

    check: The value is below the best one by more than two standard errors of the difference of
        two shares, sqrt(p (1 - p) / n + q (1 - q) / n). Compared with the best step.
    form: A verifier's mean over the rollouts (as a reward, also of weight 0, or as `accuracy`) has
        fallen by more than 0.1 since the first `window` steps.
    words: `distinct_2` is less than half of what it was in the first `window` steps.

    Args:
        entries: The lines of metrics so far.
        window: Steps.
        prompts: Held-out prompts; 0 where there is no check.

    Returns:
        `check`, `form` or `words` to what is wrong, with the numbers.
    """
    found: dict[str, str] = {}
    now = entries[-1]
    checks = {e["step"]: e["check"] for e in entries if "check" in e}
    if prompts and "check" in now:
        checks[0] = entries[0][START]
        best = max(checks, key=lambda step: (checks[step], -step))
        p, q = checks[best], now["check"]
        error = math.sqrt((p * (1 - p) + q * (1 - q)) / prompts)
        rise = _rise(entries, max(best, 1), window)
        if p - q > 2 * error and rise:
            since = f"since step {best}" if best else "since the start"
            found["check"] = (
                f"{rise} {since} while the check fell from {p:.3f} to {q:.3f} ({prompts:,} "
                "prompts): the policy may be exploiting the reward"
            )
    if len(entries) > window:
        found |= _since_the_first(entries, window)
    return found


def _since_the_first(entries: Sequence[Mapping[str, Any]], window: int) -> dict[str, str]:
    """What has fallen from the first steps to the last ones while a reward rose."""
    found: dict[str, str] = {}
    first, last = entries[:window], entries[-window:]
    since = f"since the first {window:,} steps while"
    verifiers = [name for name in _rewards(last) if named.is_verifier(name.partition("/")[2])]
    for name in (*verifiers, "accuracy"):
        before, after = _mean(first, name), _mean(last, name)
        rise = _rise(entries, window, window, but=name)
        if before is not None and after is not None and after < before - _FELL and rise:
            found["form"] = (
                f"{rise} {since} `{name.removeprefix('reward/')}` of the rollouts fell from "
                f"{before:.3f} to {after:.3f}: the policy may be exploiting the reward"
            )
    before, after = _mean(first, "distinct_2"), _mean(last, "distinct_2")
    rise = _rise(entries, window, window)
    if before is not None and after is not None and after < before / 2 and rise:
        found["words"] = (
            f"{rise} {since} the share of different pairs of words in a rollout fell from "
            f"{before:.3f} to {after:.3f}: the policy repeats itself"
        )
    return found


def _rewards(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the rewards; the penalty of length is none."""
    keys = dict.fromkeys(key for entry in entries for key in entry if key.startswith("reward/"))
    return [key for key in keys if key != f"reward/{OVERLONG}"]


def _rise(entries: Sequence[Mapping[str, Any]], step: int, window: int, but: str = "") -> str:
    """Which reward has risen since a step, and by how much; empty when none has."""
    for name in _rewards(entries[-window:]):
        before = _mean(entries[max(0, step - window) : step], name)
        after = _mean(entries[-window:], name)
        if name != but and before is not None and after is not None and after > before:
            return f"`{name.partition('/')[2]}` rose from {before:.3f} to {after:.3f}"
    return ""


def _mean(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [entry[name] for entry in entries if isinstance(entry.get(name), int | float)]
    return statistics.fmean(values) if values else None
