r"""Bring the data formats of other tools to our records, and back.

Reads rows of any format below, or our own records. Writes prompts, triples or candidates, or rows
of another format: native, trl, openai, sharegpt, nemo, llama-factory, and verl (Parquet when the
output ends in `.parquet`). gsm8k and gsm8k-solutions are only read. `--from auto` tells the format
of every row by its fields.

A preference without a reference becomes a group of two candidates, labels 1 and 0. `--to triples`
makes a triple of every pair of a group's candidates with different labels; without a reference,
every ranking A > B > C gives reference A, chosen B, rejected C. The last answer of a conversation
is the reference; the candidate (`output`) if the row has a reference of its own or if `--answer
output` says so. `--split` keeps the train or the test part of the prompts, chosen by their text.

`convert checkpoint SRC -o DIR` writes a published InternLM2 reward model, such as POLAR-7B, as a
plain Llama classifier without remote code; `--to internlm2` writes one of ours in its layout.

\b
polarctl convert ranked.jsonl --to triples --split train -o train.jsonl
polarctl convert ranked.jsonl --to candidates --split test | polarctl score - -m runs/rm
polarctl convert checkpoint internlm/POLAR-7B -o models/polar-7b
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from polarctl.config import Common, Needs

WINDOW_ROWS = 1024
SHAPES = ("native", "triples", "candidates", "prompts")
_COUNTS = ("rows", "other_part", "no_pair", "equal_chosen")
# Told by fields that other tools export as null when they have nothing to say.
_OPTIONAL = "id reference wrapper category policy rejected_policy label".split()


def _of_rows(config: Any) -> bool:
    """Whether rows are converted, and no checkpoint."""
    return config.input[0] != "checkpoint" or os.path.isfile("checkpoint")


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of `polarctl convert`."""

    NEEDS = [
        Needs(
            "from_format map answer ranked split test_share limit shard resume manifest rejects",
            _of_rows,
            "rows, not for a checkpoint",
        ),
        Needs("seed test_share", lambda c: c.split is not None, "--split"),
        Needs("ranked", lambda c: c.to_format == "triples", "--to triples"),
        Needs(
            "answer",
            lambda c: c.from_format not in ("native", "nemo", "gsm8k", "gsm8k-solutions"),
            "formats whose rows have an answer",
        ),
        Needs(
            "resume", lambda c: not c.output.endswith(".parquet"), "JSONL: Parquet comes at once"
        ),
    ]

    from_format: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="auto, native, trl, openai, sharegpt, nemo, llama-factory, gsm8k, "
            "gsm8k-solutions.",
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
        typer.Option(metavar="OURS=THEIRS", help="Rename a field first; may be given again."),
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
    test_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts in the test part.")
    ] = 0.2


def to_native(row: Mapping[str, Any], config: Config) -> tuple[dict[str, Any], str, str]:
    """A row as one of our records, checked; the format it was read as; why.

    Raises:
        RecordError: The row does not fit the format, or its fields break our schema.
    """
    from polarctl.formats.groups import check_native
    from polarctl.formats.rows import field_map, renamed
    from polarctl.formats.table import FORMATS, detect
    from polarctl.formats.unused import refuse_answers

    fields = renamed(row, field_map(config.map))
    fields = {k: v for k, v in fields.items() if v is not None or k not in _OPTIONAL}
    if type(fields.get("id")) is int:
        fields["id"] = str(fields["id"])
    name, reason = config.from_format, "asked for"
    if name == "auto":
        name, reason = detect(fields)
    read = FORMATS[name].read
    assert read is not None, "the option was checked"
    record = read(fields, config.answer)
    check_native(record)
    if config.to_format != "prompts":
        refuse_answers(record)
    return record, name, reason


def shaped(record: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """The rows of `--to` that one of our records gives; none when nothing can be compared."""
    from polarctl.formats import groups
    from polarctl.formats.table import FORMATS

    if config.to_format == "triples":
        return groups.triples(record, config.ranked)
    if config.to_format == "candidates":
        return [groups.group(record)]
    if config.to_format == "prompts":
        return [groups.prompt(record)]
    write = FORMATS[config.to_format].write
    assert write is not None, "the option was checked"
    return write(record)


def convert(
    rows: Iterable[Mapping[str, Any]], config: Config, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of one format as rows of another.

    Args:
        rows: Decoded rows.
        config: `from_format`, `to_format`, `map`, `answer`, `ranked`, `equal_chosen`, `split`,
            `test_share` and `seed` are used.
        counts: Where to count `rows`, `other_part` (of the split), `no_pair`, and triples with
            `equal_chosen`.

    Raises:
        RecordError: A row does not fit the format, or the other has no place for it.
    """
    from polarctl.formats.groups import is_copy, part_of

    counts = Counter() if counts is None else counts
    for row in rows:
        record = to_native(row, config)[0]
        counts["rows"] += 1
        if config.split and part_of(record, config.test_share, config.seed) != config.split:
            counts["other_part"] += 1
            continue
        made = shaped(record, config)
        counts["no_pair"] += not made
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
    from polarctl import console
    from polarctl.errors import UsageError
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
    field_map(config.map)
    paths = windows.inputs_of("convert", config)
    _refuse_array(paths)
    told: dict[str, str] = {}

    def verify(row: Record) -> None:
        record, name, reason = to_native(row, config)
        shaped(record, config)
        if config.from_format == "auto" and name not in told:
            told[name] = reason
            console.choice("format", ", ".join(told), "; ".join(told.values()))

    if config.dry_run:
        windows.dry_run("convert", config, paths, None, verify=verify)
        return
    if config.output.endswith(".parquet"):
        _write_parquet(config, paths, verify)
        return
    with Output("convert", config, reading.sizes(paths)) as out:
        if out.complete:
            return
        counts = Counter({key: out.counts.get(key, 0) for key in _COUNTS})

        def work(rows: list[Record]) -> Iterator[dict[str, Any]]:
            yield from convert(rows, config, counts)
            out.counts.update(counts)

        reader = windows.reader_of(config, paths, None, on_bad=out.reject, verify=verify)
        windows.map_windows(out, reader, work, size=WINDOW_ROWS, title="convert")
        _say(counts, out.counts["records"])


def _say(counts: Counter[str], records: int) -> None:
    from polarctl import console

    parts = [f"convert: {counts['rows']:,} rows gave {records:,} records"]
    if counts["other_part"]:
        parts.append(f"{counts['other_part']:,} rows are of the other part")
    if counts["no_pair"]:
        parts.append(f"{counts['no_pair']:,} rows have no candidates with different labels")
    if counts["equal_chosen"]:
        parts.append(f"in {counts['equal_chosen']:,} triples the chosen text is the reference")
    console.note("; ".join(parts), **counts)


def _refuse_array(paths: list[str]) -> None:
    """Say what to do about a file that is one JSON array, as LLaMA-Factory's and ShareGPT's are."""
    import os

    from polarctl.errors import RecordError
    from polarctl.storage.compression import open_bytes

    for path in paths:
        if not os.path.isfile(path):
            continue
        with open_bytes(path) as stream:
            try:
                first = stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            except Exception:  # each kind of compression raises its own
                continue  # a broken file is the reader's to explain
        if first == b"[":
            hint = f"jq -c '.[]' {path} | polarctl convert -"
            raise RecordError("is one JSON array, not one object a line", where=path, hint=hint)


def _write_parquet(config: Config, paths: list[str], verify: Any) -> None:
    """Write verl's rows as one Parquet file, whole or not at all."""
    from polarctl.errors import UsageError
    from polarctl.formats import parquet
    from polarctl.storage import read as reading
    from polarctl.storage import windows

    if config.to_format != "verl":
        raise UsageError("only `--to verl` writes Parquet", hint="-o FILE.jsonl")
    counts: Counter[str] = Counter()
    with parquet.VerlFile("convert", config, reading.sizes(paths)) as out:
        reader = windows.reader_of(config, paths, None, on_bad=out.sink.reject, verify=verify)
        for window in reader.windows(WINDOW_ROWS):
            out.write(list(convert(window.records, config, counts)))
            out.counts.update(counts)
    _say(counts, out.counts["records"])


def _checkpoint(config: Config) -> None:
    """Write a checkpoint in the other layout; print its folder."""
    from polarctl import console
    from polarctl.errors import UsageError
    from polarctl.model import devices
    from polarctl.model.internlm2 import convert
    from polarctl.storage import claim, manifest, replace
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
        replace.check_unused(target, {}, [source])
        replace.check_folder(target)
        replace.check_exchange(target)
    place = replace.next_to(target)
    if not place.parent.is_dir():
        raise UsageError(f"{target.parent}: is no folder", hint="make it first")
    lock = claim.locked(f"{place}.lock", target)
    try:
        shutil.rmtree(place, ignore_errors=True)
        layouts[layout](source, place)
        manifest.write(
            place / replace.MANIFEST,
            "convert",
            config,
            inputs=[{"path": source, "bytes": None}],
            outputs=manifest.folder_files(place),
            counts={},
        )
        if taken:
            replace.exchange(place, target)
        else:
            place.rename(os.path.realpath(target))
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.unlink(f"{place}.lock")
        lock.close()
    stdout().write(f"{target}\n".encode())
