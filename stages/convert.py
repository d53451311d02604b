r"""Bring the data formats of other tools to our records, and back.

Reads JSON lines, a JSON array, CSV, Parquet, a folder of these or of `save_to_disk`, or a data set
of the Hub by its id. `--from auto` tells the format of every row by its fields; at the end it says
what the rows were, what was written, and which fields it left unused. A row whose answers would go
unused is refused. Writes prompts, triples or candidates, or rows of another format: native, trl,
openai, sharegpt, nemo, llama-factory, verl (Parquet when the output ends in `.parquet`).

A preference without a reference becomes a group of two candidates, labels 1 and 0. `--to triples`
makes a triple of every pair of a group's candidates with different labels; without a reference,
every ranking A > B > C gives reference A, chosen B, rejected C. The last answer of a conversation
is the reference; the candidate (`output`) if the row has a reference of its own or if `--answer
output` says so. An answer with a `label` is always a candidate. `--split` keeps the train or the
test part of the prompts, chosen by their text. `--by reward` compares by the rewards of `score`:
pairs are the best and the worst of a group, `--best-of-n` keeps the best alone. `--join FIELD`
makes a group of neighbouring rows, such as rollouts of one prompt. `--dedup` leaves out prompts
that were there already, before the split.

`convert checkpoint SRC -o DIR` writes a published InternLM2 reward model, such as POLAR-7B, as a
plain Llama classifier without remote code; `--to internlm2` writes one of ours in its layout.

\b
polarctl convert ranked.jsonl --to triples --split train -o train.jsonl
polarctl convert ranked.jsonl --to candidates --split test | polarctl score - -m runs/rm
polarctl convert nvidia/HelpSteer3 --subset preference --to candidates -o helpsteer.jsonl
polarctl score groups.jsonl -m runs/rm | polarctl convert - --by reward --to trl -o dpo.jsonl
polarctl convert checkpoint internlm/POLAR-7B -o models/polar-7b
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polarctl.config import Common, Needs, TestShare

if TYPE_CHECKING:
    from polarctl.formats.duplicates import Duplicates

WINDOW_ROWS = 1024
SHAPES = ("native", "triples", "candidates", "prompts")
# Formats whose rows are pairs where a record compares candidates.
PAIRS = ("trl", "sharegpt", "nemo", "llama-factory", "triples")
# Told by fields that other tools export as null when they have nothing to say.
_OPTIONAL = "id reference wrapper category policy rejected_policy label".split()


def _of_rows(config: Any) -> bool:
    """Whether rows are converted, and no checkpoint."""
    return config.input[0] != "checkpoint" or os.path.isfile("checkpoint")


def _of_data_sets(config: Any) -> bool:
    """Whether an input may be a data set with subsets and splits."""
    from polarctl.formats.sources import hub_id

    return any(os.path.isdir(path) or hub_id(path) for path in config.input)


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl convert`."""

    NEEDS = [
        Needs(
            "from_format map answer ranked split test_share limit shard resume manifest rejects "
            "by best_of_n join subset source_split dedup",
            _of_rows,
            "rows, not for a checkpoint",
        ),
        Needs("seed test_share", lambda c: c.split is not None, "--split"),
        Needs("shard", lambda c: not c.dedup, "rows that are not compared, not for --dedup"),
        Needs("ranked", lambda c: c.to_format == "triples", "--to triples"),
        Needs(
            "by",
            lambda c: c.best_of_n or c.to_format in PAIRS,
            "--best-of-n, or formats of pairs: " + ", ".join(PAIRS),
        ),
        Needs("min_margin", lambda c: c.by == "reward" and not c.best_of_n, "pairs --by reward"),
        Needs("subset source_split", _of_data_sets, "data sets: a folder, or an id on the Hub"),
        Needs(
            "answer",
            lambda c: c.from_format not in ("native", "nemo", "gsm8k", "gsm8k-solutions"),
            "formats whose rows have an answer",
        ),
        Needs(
            "resume", lambda c: not c.output.endswith(".parquet"), "JSONL: Parquet comes at once"
        ),
    ]

    input: Annotated[
        tuple[str, ...],
        typer.Argument(
            metavar="INPUT",
            help="Files or globs (.gz and .zst too), a data set's folder or Hub id; `-` for stdin.",
        ),
    ] = ("-",)
    from_format: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="auto, native, trl, openai, sharegpt, nemo, llama-factory, llama-factory-v1, "
            "ms-swift, verl, helpsteer, pku-saferlhf, nectar, ultrafeedback, arena, gsm8k, "
            "gsm8k-solutions; benchmarks: rewardbench, rewardbench2, rm-bench, judgebench, "
            "rewardmath, helpsteer3, m-rewardbench, rmb, ppe.",
        ),
    ] = "auto"
    to_format: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="native, triples, candidates, prompts, trl, openai, sharegpt, nemo, "
            "llama-factory, verl; of a checkpoint: llama, internlm2.",
        ),
    ] = "native"
    map: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="OURS=THEIRS",
            help="Rename a field first, `a.b` for one inside `a`; may be given again.",
        ),
    ] = ()
    answer: Annotated[
        Literal["reference", "output"],
        typer.Option(help="What the last answer of a row without a reference is."),
    ] = "reference"
    ranked: Annotated[
        Literal["all", "adjacent", "top"],
        typer.Option(
            help="Rankings A > B > C of a group without a reference: all, adjacent ranks, or A "
            "always of the top rank."
        ),
    ] = "all"
    equal_chosen: Annotated[
        Literal["keep", "drop"],
        typer.Option(help="--to triples: a triple whose chosen text is its reference."),
    ] = "keep"
    split: Annotated[
        Literal["train", "test"] | None,
        typer.Option(help="Keep this part of the prompts, chosen by their text and the seed."),
    ] = None
    test_share: TestShare = 0.2
    dedup: Annotated[
        str | None,
        typer.Option(
            metavar="exact|SHARE",
            help="Leave out rows whose prompt was there already: the same text, or this share of "
            "the same runs of three words (0.8).",
        ),
    ] = None
    by: Annotated[
        Literal["label", "reward"],
        typer.Option(help="What candidates are compared by; reward: the best with the worst."),
    ] = "label"
    min_margin: Annotated[
        float,
        typer.Option(min=0, help="--by reward: by how much the best must exceed the worst."),
    ] = 0.0
    best_of_n: Annotated[
        bool,
        typer.Option("--best-of-n", help="Keep the best candidate of a group alone, for SFT."),
    ] = False
    join: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD", help="Make one group of neighbouring rows with the same FIELD."
        ),
    ] = None
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset (configuration) of a data set.")
    ] = None
    source_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split of a data set. Default: train, or its only one."),
    ] = None


def to_native(row: Mapping[str, Any], config: Config) -> tuple[dict[str, Any], str, str]:
    """A row as one of our records, checked; the format it was read as; why.

    Raises:
        RecordError: The row does not fit the format, or its fields break our schema.
    """
    from polarctl.errors import RecordError
    from polarctl.formats.groups import check_native, merged
    from polarctl.formats.rows import JOINED, field_map, renamed, with_candidates
    from polarctl.formats.table import FORMATS, detect
    from polarctl.formats.unused import refuse_answers

    if config.join is not None:
        if JOINED not in row:
            raise RecordError(f"no field `{config.join}` (--join {config.join})")
        alone = replace(config, join=None)
        read = [to_native(one, alone) for one in row[JOINED]]
        record = merged([record for record, _, _ in read])
        check_native(record)
        return record, *read[0][1:]
    fields = renamed(row, field_map(config.map))
    fields = {k: v for k, v in fields.items() if v is not None or k not in _OPTIONAL}
    if type(fields.get("id")) is int:
        fields["id"] = str(fields["id"])
    name, reason = config.from_format, "asked for"
    if name == "auto":
        name, reason = detect(fields)
    reads = FORMATS[name].read
    assert reads is not None, "the option was checked"
    record = with_candidates(reads(fields, config.answer))
    check_native(record)
    if config.to_format != "prompts":
        refuse_answers(record)
    return record, name, reason


def shaped(record: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """The rows of `--to` that one of our records gives; none when nothing can be compared."""
    from polarctl.formats import groups, ranking
    from polarctl.formats.table import FORMATS

    if config.best_of_n:
        record = ranking.best_of(record, config.by)
    elif config.to_format in PAIRS and groups.shape_of(record) == "group":
        if config.by == "reward":
            pair = ranking.best_and_worst(record, config.min_margin)
            if pair is None:
                return []
            record = pair
        else:
            ranking.values(record, "label")  # or it would vanish without a word
    if config.to_format == "triples":
        return groups.triples(record, config.ranked)
    if config.to_format == "candidates":
        return [groups.group(record)]
    if config.to_format == "prompts":
        return [groups.prompt(record)]
    if config.to_format == "verl" and config.split and "split" not in record:
        record = {**record, "split": config.split}
    write = FORMATS[config.to_format].write
    assert write is not None, "the option was checked"
    return write(record)


def convert(
    rows: Iterable[Mapping[str, Any]],
    config: Config,
    counts: Counter[str] | None = None,
    duplicates: Duplicates | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of one format as rows of another.

    Args:
        rows: Decoded rows.
        config: The options that say what is read, compared and written are used.
        counts: Where to count: see `polarctl.formats.summary.FIXED`, and `format.NAME`,
            `read.SHAPE`, `unused.FIELD`.
        duplicates: Knows the prompts of the rows before; rows with one of them are left out.

    Raises:
        RecordError: A row does not fit the format, or the other has no place for it.
    """
    from polarctl.formats import summary
    from polarctl.formats.groups import is_copy, part_of

    counts = Counter() if counts is None else counts
    for row in rows:
        record, name, _ = to_native(row, config)
        counts["rows"] += 1
        # Before the split: so a prompt that is in one part is in the other in no other words.
        if duplicates is not None and (again := duplicates.add(record["prompt"])):
            counts[again] += 1
            continue
        if config.split and part_of(record, config.test_share, config.seed) != config.split:
            counts["other_part"] += 1
            continue
        made = shaped(record, config)
        summary.count(
            counts,
            record,
            name,
            written=bool(made),
            to=config.to_format,
            by_label=config.to_format in PAIRS and config.by == "label",
        )
        if config.to_format == "triples" and (copies := sum(map(is_copy, made))):
            counts["equal_chosen"] += copies
            if config.equal_chosen == "drop":
                made = [triple for triple in made if not is_copy(triple)]
        yield from made


def run(config: Config) -> None:
    """Convert every row of the input."""
    if not _of_rows(config):
        _checkpoint(config)
        return
    from functools import partial

    from polarctl import console
    from polarctl.errors import UsageError
    from polarctl.formats import sources, summary
    from polarctl.formats.duplicates import Duplicates
    from polarctl.formats.rows import field_map
    from polarctl.formats.table import readable, require, writable
    from polarctl.records import Record
    from polarctl.storage import read as reading
    from polarctl.storage import windows
    from polarctl.storage.write import Output

    require("--from", config.from_format, ["auto", *readable()])
    require("--to", config.to_format, [*SHAPES, *writable()])
    if config.equal_chosen == "drop" and config.to_format != "triples":
        raise UsageError("`--equal-chosen` is for `--to triples`")
    if config.from_format == "rewardmath" and config.join is None:
        console.choice("join", "problem_id", "a row of rewardmath is one solution of a problem")
        config = replace(config, join="problem_id")
    field_map(config.map)
    duplicates = Duplicates(config.dedup) if config.dedup else None
    paths = windows.inputs_of("convert", config, sources.expand)
    told: dict[str, str] = {}

    def verify(row: Record) -> None:
        record, name, reason = to_native(row, config)
        shaped(record, config)
        if config.from_format == "auto" and name not in told:
            told[name] = reason
            console.choice("format", ", ".join(told), "; ".join(told.values()))

    make = partial(
        sources.RowReader,
        subset=config.subset,
        source_split=config.source_split,
        join=config.join,
    )
    if config.dry_run:
        windows.dry_run("convert", config, paths, None, verify=verify, make=make)
        return
    if config.output.endswith(".parquet"):
        _write_parquet(config, paths, verify, make, duplicates)
        return
    with Output("convert", config, reading.sizes(paths)) as out:
        if out.complete:
            return
        counts = summary.resumed(out.counts)

        def work(rows: list[Record]) -> Iterator[dict[str, Any]]:
            yield from convert(rows, config, counts, duplicates)
            out.counts.update(counts)

        reader = windows.reader_of(config, paths, None, on_bad=out.reject, verify=verify, make=make)
        if duplicates is not None:

            def learn(rows: list[Record]) -> None:
                deque(convert(rows, config, None, duplicates), maxlen=0)

            reader.learn = learn
        windows.map_windows(out, reader, work, size=WINDOW_ROWS, title="convert")
        summary.say(counts, out.counts["records"], config.to_format)


def _write_parquet(
    config: Config, paths: list[str], verify: Any, make: Any, duplicates: Duplicates | None
) -> None:
    """Write verl's rows as one Parquet file, whole or not at all."""
    from polarctl.errors import UsageError
    from polarctl.formats import parquet, summary
    from polarctl.storage import read as reading
    from polarctl.storage import windows

    if config.to_format != "verl":
        raise UsageError("only `--to verl` writes Parquet", hint="-o FILE.jsonl")
    counts: Counter[str] = Counter()
    with parquet.VerlFile("convert", config, reading.sizes(paths)) as out:
        reader = windows.reader_of(
            config, paths, None, on_bad=out.sink.reject, verify=verify, make=make
        )
        for window in reader.windows(WINDOW_ROWS):
            out.write(list(convert(window.records, config, counts, duplicates)))
            out.counts.update(counts)
    summary.say(counts, out.counts["records"], config.to_format)


def _checkpoint(config: Config) -> None:
    """Write a checkpoint in the other layout; print its folder."""
    from polarctl import console
    from polarctl.errors import UsageError
    from polarctl.model import devices
    from polarctl.model.internlm2 import convert
    from polarctl.storage import claim, manifest
    from polarctl.storage import replace as replacing
    from polarctl.storage.write import stdout

    devices.quiet_libraries()
    layouts = {"llama": convert.to_llama, "internlm2": convert.to_internlm2}
    layout = "llama" if config.to_format == "native" else config.to_format
    if len(config.input) != 2 or config.output == "-" or layout not in layouts:
        raise UsageError(
            "a checkpoint is converted from one folder or Hub id to a folder",
            hint="polarctl convert checkpoint SRC -o DIR [--to llama|internlm2]",
        )
    source, target = config.input[1], Path(config.output)
    if config.dry_run:
        console.note(f"convert: would write {source} as {layout} into {target}")
        return
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken and not config.force:
        raise UsageError(f"{target}: exists already", hint="another folder, or --force")
    if taken:
        replacing.check_unused(target, {}, [source])
        replacing.check_folder(target)
        replacing.check_exchange(target)
    place = replacing.next_to(target)
    if not place.parent.is_dir():
        raise UsageError(f"{target.parent}: is no folder", hint="make it first")
    lock = claim.locked(f"{place}.lock", target)
    try:
        shutil.rmtree(place, ignore_errors=True)
        layouts[layout](source, place)
        manifest.write(
            place / replacing.MANIFEST,
            "convert",
            config,
            inputs=[{"path": source, "bytes": None}],
            outputs=manifest.folder_files(place),
            counts={},
        )
        if taken:
            replacing.exchange(place, target)
        else:
            place.rename(os.path.realpath(target))
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.unlink(f"{place}.lock")
        lock.close()
    stdout().write(f"{target}\n".encode())
