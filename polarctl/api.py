"""What `import polarctl` offers: a reward model, reading and writing of records, an evaluation.

Everything here gives what the command line gives: the same rewards, the same records, the same
figures.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from polarctl.errors import RecordError, UsageError
from polarctl.records import Record, find_kind

if TYPE_CHECKING:
    from polarctl.scoring.window import ScoreWork

PathLike: TypeAlias = str | os.PathLike[str]
Text: TypeAlias = str | Sequence[Mapping[str, Any]]
Texts: TypeAlias = Sequence[Text]


class RewardModel:
    """A reward model that scores candidates against a reference.

    Make one with `from_pretrained`.

    Attributes:
        path: Folder or Hub id that it was loaded from.
    """

    def __init__(self, path: str, work: ScoreWork):
        self.path, self._work = path, work

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_tokens: int = 8192,
        no_reference: bool = False,
    ) -> RewardModel:
        """Load a reward model.

        Args:
            path: Folder or Hub id: a POLAR model, published or trained here, or a classifier with
                a chat template. Which of the two it is, is decided as in `polarctl score`.
            device: `auto`, `cpu`, `cuda` or `cuda:I`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            batch_tokens: Tokens of one forward pass at most; a longer input goes alone.
            no_reference: Score against an empty reference, whatever reference is given.

        Raises:
            MissingError: No model, tokenizer or reward head there, or no such device.
            UsageError: An option with a value that does not exist.
        """
        from polarctl.scoring import engines
        from polarctl.scoring.options import ScoreOptions
        from polarctl.scoring.window import ScoreWork

        if batch_tokens < 1:
            raise UsageError(f"`batch_tokens={batch_tokens}`: at least 1")
        options = ScoreOptions(
            model=os.fspath(path),
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            no_reference=no_reference,
        )
        work = ScoreWork(options, chat=engines.reads_chat(options))
        work.open()
        return cls(options.model, work)

    # A string is a sequence of strings too, so mypy sees the first two overlap with the others.
    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompt: Text, reference: Text, outputs: Text, *, wrapper: str = ...
    ) -> float: ...
    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompt: Text, reference: Text, outputs: Texts, *, wrapper: str = ...
    ) -> list[float]: ...
    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompt: Texts, reference: Texts, outputs: Texts, *, wrapper: str = ...
    ) -> list[float]: ...
    @overload
    def score(
        self, prompt: Texts, reference: Texts, outputs: Sequence[Texts], *, wrapper: str = ...
    ) -> list[list[float]]: ...
    def score(self, prompt: Any, reference: Any, outputs: Any, *, wrapper: str = "sft") -> Any:
        """Raw rewards: unbounded, higher is closer to the reference.

        A text is a string or a list of messages. What the candidates of one prompt share is
        computed once, so give them together.

        Args:
            prompt: One text; or a list of texts, one for each item of a batch.
            reference: One text; of a batch a list, as long as `prompt`.
            outputs: One text, or a list of texts: the candidates. Of a batch, one of the two for
                each item, and the same one for all.
            wrapper: `sft` for instructions, `pretrain` for text that is continued.

        Returns:
            A float for one text, a list of floats for a list of candidates; of a batch a list of
            such.

        Raises:
            ValueError: The lists of a batch differ in length, or hold both texts and lists.
            RecordError: Something that is not a text, or a text that cannot be encoded.
            PolarctlError: The model gave a reward that is not a finite number.
        """
        batch = not _is_text(prompt)
        if not batch:
            prompt, reference, outputs = [prompt], [reference], [outputs]
        elif _is_text(reference) or _is_text(outputs):
            raise ValueError("`prompt` is a list, so `reference` and `outputs` must be lists too")
        if not len(prompt) == len(reference) == len(outputs):
            raise ValueError(
                f"{len(prompt)} prompts, {len(reference)} references and {len(outputs)} outputs: "
                "the lists of a batch must have one length"
            )
        single = [_is_text(one) for one in outputs]
        if len(set(single)) > 1:
            raise ValueError("`outputs` of a batch must be texts, or lists of texts, not both")
        groups = [[one] if alone else list(one) for one, alone in zip(outputs, single, strict=True)]
        asked = []
        for number, (text, known, group) in enumerate(zip(prompt, reference, groups, strict=True)):
            texts = {"prompt": text, "reference": known, "wrapper": wrapper}
            candidates = [{"output": output} for output in group]
            if group:
                asked.append(Record({**texts, "candidates": candidates}, f"item {number + 1}"))
        scored = iter(list(self.score_records(asked)))  # all of it, so that cuts are said
        rewards = [next(scored)["rewards"] if group else [] for group in groups]
        if single and single[0]:
            rewards = [values[0] for values in rewards]
        return rewards if batch else rewards[0]

    def score_records(self, records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The records with `reward`, or `rewards` for a group or a triple.

        Records are read and scored in windows of 512, as `polarctl score` does: a reward is then
        the same to its last digit.

        Args:
            records: Candidates or triples.

        Raises:
            RecordError: A record that breaks its schema, has no reference, or cannot be encoded.
            PolarctlError: The model gave a reward that is not a finite number.
        """
        from polarctl.scoring.options import WINDOW_ROWS
        from polarctl.scoring.scorer import Cuts

        cuts = Cuts()

        checked = _checked(records, self._work.verify)
        while window := list(itertools.islice(checked, WINDOW_ROWS)):
            done = self._work(window)
            for where, reason, _ in done.rejected:
                raise RecordError(reason, where=where)
            cuts.update(done.cuts)
            yield from done.records
        cuts.say(str(self.path))

    def save_pretrained(self, folder: PathLike) -> None:
        """Write config, weights and tokenizer as a plain sequence classifier.

        Args:
            folder: Where to; made if missing. A model that is there is overwritten.

        Raises:
            UsageError: The model is not a POLAR model, or the folder cannot be made.
        """
        from polarctl.scoring.scorer import ModelScorer

        scorer = self._work.open()
        if not isinstance(scorer, ModelScorer):
            raise UsageError(f"{self.path}: is not a POLAR model", hint="copy its folder")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made: {error.strerror}") from None
        scorer.model.save(folder)


def read(paths: PathLike | Iterable[PathLike], kind: str | None = None) -> Iterator[Record]:
    """Records of files, one at a time; gzip and zstandard too.

    Args:
        paths: A file or a glob, or several.
        kind: Kind that every record must be (`polarctl schema` lists them), or None for any.

    Returns:
        An iterator over the records; none for an empty file.

    Raises:
        UsageError: No such file or kind.
        RecordError: A line that is not such a record; raised when it is reached, and names file
            and line.
    """
    from polarctl.storage.read import Reader, decode, expand

    if kind is not None:
        find_kind(kind)
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    lines = Reader(expand([os.fspath(path) for path in given]), kind).lines()
    return (decode(line, where, kind) for where, line in lines)


def write(path: PathLike, records: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> int:
    """Write records as JSON Lines; the file is there when all of it is, or not at all.

    Args:
        path: Where to; a name that ends in `.gz` or `.zst` is compressed.
        records: What to write.
        overwrite: Replace a file that is there.

    Returns:
        Records written.

    Raises:
        UsageError: There is such a file already, or it cannot be written.
        RecordError: A record that JSON cannot hold, such as one with a NaN.
    """
    from polarctl.storage.write import write_whole

    return write_whole(Path(path), records, overwrite=overwrite)


def evaluate(
    records: Iterable[Mapping[str, Any]],
    *,
    by: str | None = None,
    seed: int = 0,
    on_verdict: Callable[[dict[str, Any]], None] = lambda verdict: None,
) -> dict[str, Any]:
    """The report that `polarctl eval` writes: accuracy with 95 % intervals, beside baselines.

    Args:
        records: Scored triples or groups with labels.
        by: Field that groups the figures; None: `category`, if it is there.
        seed: Seed of the bootstrap over prompts.
        on_verdict: Called with the verdict of every case.

    Returns:
        A `Report` record (`polarctl schema report`): `overall`, `categories`, `margins`, ...

    Raises:
        RecordError: A record without rewards, or nothing to compare.
        UsageError: No record has the field `by`.
    """
    from polarctl.evaluation.cases import (
        Cases,
        check_by,
        require_cases,
        require_rewards,
        verdicts,
    )
    from polarctl.evaluation.figures import summarise

    cases, fields, count = Cases(), set[str](), 0
    for record in _checked(records, require_rewards):
        count += 1
        fields.update(record)
        for verdict in verdicts(record, by or "category", cases):
            on_verdict(verdict)
    check_by(by, fields)
    require_cases(cases, count)
    return summarise(cases, seed)


def _checked(
    records: Iterable[Mapping[str, Any]], verify: Callable[[Record], None]
) -> Iterator[Record]:
    """Records that a check has passed; an error names file and line, or the number from 1."""
    for number, given in enumerate(records, 1):
        record = Record(dict(given), getattr(given, "where", None) or f"record {number}")
        try:
            verify(record)
        except RecordError as error:
            raise RecordError(error.reason, where=record.where, hint=error.hint) from None
        yield record


def _is_text(value: Any) -> bool:
    """A string, or a list of messages; an empty list is a batch of nothing."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return isinstance(value, str)
    return bool(value) and all(isinstance(part, Mapping) for part in value)
