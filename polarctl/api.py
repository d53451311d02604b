"""The library's face: a reward model, reading and writing of records, an evaluation.

Everything here gives what the command line gives: the same rewards, the same records, the same
figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from polarctl.errors import UsageError
from polarctl.records import Record

PathLike: TypeAlias = str | os.PathLike[str]
Text: TypeAlias = str | Sequence[Mapping[str, Any]]


class RewardModel:
    """A reward model that scores candidates against a reference.

    Make one with `from_pretrained`.

    Attributes:
        path: Folder or Hub id that it was loaded from.
    """

    def __init__(self, path: str, scorer: Any, *, wrapper: str = "sft"):
        self.path, self.wrapper = path, wrapper
        self._scorer = scorer

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_tokens: int = 8192,
        wrapper: str = "sft",
    ) -> RewardModel:
        """Load a reward model.

        Args:
            path: Folder or Hub id: a POLAR model, published or of ours, or a classifier with a
                chat template. What it is is told as `polarctl score` tells it.
            device: `auto`, `cpu`, `cuda` or `cuda:I`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            batch_tokens: Tokens of one forward pass at most; a longer input goes alone.
            wrapper: `sft` for instructions, `pretrain` for text that is continued.

        Raises:
            MissingError: No model, tokenizer or reward head there, or no such device.
            UsageError: An option with a value that does not exist.
        """
        from polarctl.scoring import engines
        from polarctl.scoring.options import EngineConfig

        config = EngineConfig(
            model=os.fspath(path), device=device, dtype=dtype, batch_tokens=batch_tokens
        )
        return cls(
            config.model,
            engines.open_scorer(config, chat=engines.reads_chat(config)),
            wrapper=wrapper,
        )

    def score(self, prompt: Any, reference: Any, outputs: Any) -> Any:
        """Raw rewards: unbounded, higher is closer to the reference.

        A text is a string or a list of messages. What the candidates of one prompt share is
        computed once, so give them together.

        Args:
            prompt: One text; or a list of texts, one for each item of a batch.
            reference: One text; of a batch a list, as long as `prompt`.
            outputs: One text, or a list of texts: the candidates. Of a batch a list of either.

        Returns:
            A float for one text, a list of floats for a list of candidates; of a batch a list of
            either.

        Raises:
            ValueError: Lists of a batch that are not of one length.
            RecordError: A text that cannot be encoded.
            PolarctlError: The model gave a reward that is not a finite number.
        """
        from polarctl.scoring.scorer import Item

        batch = not _is_text(prompt)
        prompts, references, asked = (
            (prompt, reference, outputs) if batch else ([prompt], [reference], [outputs])
        )
        if not len(prompts) == len(references) == len(asked):
            raise ValueError(
                f"{len(prompts)} prompts, {len(references)} references and {len(asked)} outputs: "
                "the lists of a batch are of one length"
            )
        groups = [[one] if _is_text(one) else list(one) for one in asked]
        items = [
            Item(text, known, output, self.wrapper)
            for text, known, group in zip(prompts, references, groups, strict=True)
            for output in group
        ]
        scored = iter(self._scorer.score(items) if items else ())
        found = [[next(scored).reward for _ in group] for group in groups]
        rewards = [row[0] if _is_text(one) else row for one, row in zip(asked, found, strict=True)]
        return rewards if batch else rewards[0]

    def score_records(
        self, records: Iterable[Mapping[str, Any]], *, no_reference: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The records with `reward`, or `rewards` for a group or a triple.

        Args:
            records: Candidates or triples, as `polarctl score` reads them.
            no_reference: Score against an empty reference.

        Raises:
            RecordError: A record that breaks its schema, or has no reference.
        """
        from polarctl.records import check, find_kind, kind_of_scorable, require_reference
        from polarctl.scoring.scorer import score_records

        for given in records:
            record = Record(dict(given), getattr(given, "where", None))
            check(record, find_kind(kind_of_scorable(record)))
            if not no_reference:
                require_reference(record)
            for scored, _ in score_records([record], self._scorer, no_reference=no_reference):
                yield scored

    def save_pretrained(self, folder: PathLike) -> None:
        """Write config, weights and tokenizer as a plain sequence classifier.

        Args:
            folder: Where to; made if missing. An existing model there is overwritten.

        Raises:
            UsageError: The model is not a POLAR model.
        """
        from polarctl.scoring.scorer import ModelScorer

        if not isinstance(self._scorer, ModelScorer):
            raise UsageError(f"{self.path}: is no POLAR model", hint="copy its folder")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._scorer.model.save(folder)


def read(paths: PathLike | Iterable[PathLike], kind: str | None = None) -> Iterator[Record]:
    """Records of files, one at a time; gzip and zstandard too.

    Args:
        paths: A file or a glob, or several.
        kind: Kind that every record must be (`polarctl schema` lists them), or None for any.

    Raises:
        UsageError: No such file or kind.
        RecordError: A line that is not a record; it names file and line.
    """
    from polarctl.records import find_kind
    from polarctl.storage.read import Reader, expand

    if kind is not None:
        find_kind(kind)
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    return iter(Reader(expand([os.fspath(path) for path in given]), kind))


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
        PolarctlError: A record that is not JSON.
    """
    from polarctl.storage.write import write_whole

    return write_whole(Path(path), records, overwrite=overwrite)


def evaluate(
    records: Iterable[Mapping[str, Any]],
    *,
    by: str = "category",
    seed: int = 0,
    on_verdict: Callable[[dict[str, Any]], None] = lambda verdict: None,
) -> dict[str, Any]:
    """The report that `polarctl eval` writes: accuracy with 95 % intervals, beside baselines.

    Args:
        records: Scored triples or groups with labels.
        by: Field that groups the figures.
        seed: Seed of the bootstrap over prompts.
        on_verdict: Called with the verdict of every case.

    Returns:
        A `Report` record (`polarctl schema report`): `overall`, `categories`, `margins`, ...

    Raises:
        RecordError: A record without rewards, or nothing to compare.
    """
    from polarctl.errors import RecordError
    from polarctl.evaluation.cases import Cases, summarise, verdicts

    cases = Cases()
    for given in records:
        for verdict in verdicts(Record(dict(given), getattr(given, "where", None)), by, cases):
            on_verdict(verdict)
    if not cases.margins:
        raise RecordError(
            "nothing to compare", hint="triples, or groups of candidates with different labels"
        )
    return summarise(cases, seed)


def _is_text(value: Any) -> bool:
    """A string, or a list of messages; an empty list is a batch of nothing."""
    if isinstance(value, str):
        return True
    return bool(value) and all(isinstance(part, Mapping) for part in value)
