"""Records as Parquet shards, with the schema that `datasets` and the Hub's viewer read.

A column has one type for all rows. Where records differ (a text in one, messages in the next) it is
of the type JSON, which `datasets` gives back as what it was. A field that a record lacks is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from polarctl import console
from polarctl.errors import UsageError, need
from polarctl.storage.read import Reader

_ROWS = 1024  # read at a time
_GROUP_BYTES = 64 << 20  # a row group, before compression: what a reader holds in memory
_SHARD_BYTES = 512 << 20  # a shard, before compression


@dataclass
class Split:
    """The shards of one split of a config.

    Attributes:
        files: Name in the repository to the file.
        records: Rows.
        size: Bytes before compression.
    """

    files: dict[str, Path] = field(default_factory=dict)
    records: int = 0
    size: int = 0


def require_datasets() -> tuple[Any, Any]:
    """The packages pyarrow, with its Parquet module, and datasets.

    Raises:
        MissingError: One is not installed.
    """
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise need(error.name or "datasets", "data") from None
    return pyarrow, datasets


def write_config(
    folder: Path, name: str, splits: dict[str, list[str]]
) -> tuple[dict[str, Split], dict[str, Any]]:
    """Write the shards of one config: records of one kind, in one or more splits.

    Args:
        folder: Where to; a folder of the config's name is made.
        name: Of the config.
        splits: Name of each split to its JSONL files.

    Returns:
        The splits, and the config's entry for `dataset_info` in the front matter.

    Raises:
        MissingError: A package is not installed.
        UsageError: A column holds what no Parquet type holds.
    """
    pyarrow, datasets = require_datasets()
    paths = [path for files in splits.values() for path in files]
    with console.progress("columns of the Parquet files", None, "rows") as bar:
        schema = schema_of(pyarrow, _counted(_rows(paths), bar))
    (folder / name).mkdir(parents=True)
    made = {}
    with console.progress("Parquet files", None, "rows") as bar:
        for split, files in splits.items():
            rows = _counted(_rows(files), bar)
            made[split] = _write_split(pyarrow, folder, f"{name}/{split}", schema, rows)
    info = datasets.DatasetInfo(
        features=datasets.Features.from_arrow_schema(schema),
        splits=datasets.SplitDict(
            {
                split: datasets.splits.SplitInfo(split, one.size, one.records)
                for split, one in made.items()
            }
        ),
        download_size=sum(p.stat().st_size for one in made.values() for p in one.files.values()),
        dataset_size=sum(one.size for one in made.values()),
    )
    return made, {"config_name": name, **info._to_yaml_dict()}


def _rows(paths: list[str]) -> Iterator[list[dict[str, Any]]]:
    for window in Reader(paths, None).windows(_ROWS):
        yield list(window.records)


def _counted(windows: Iterable[list[dict[str, Any]]], bar: Any) -> Iterator[list[dict[str, Any]]]:
    seen = 0
    for rows in windows:
        yield rows
        seen += len(rows)
        bar.update(seen)


def schema_of(pyarrow: Any, windows: Iterable[list[dict[str, Any]]]) -> Any:
    """The schema that holds all rows; columns in the order in which they first appear."""
    types: dict[str, Any] = {}
    large: set[str] = set()
    mixed = pyarrow.json_()
    for rows in windows:
        for name in dict.fromkeys(key for row in rows for key in row):
            if types.get(name) == mixed:
                continue
            try:
                values = pyarrow.array([row.get(name) for row in rows])
                found = values.type
                if pyarrow.types.is_integer(found):
                    large |= {name for v in values if abs(v.as_py() or 0) > 2**53}
                both = [kind for kind in (types.get(name), found) if kind is not None]
                parts = [pyarrow.schema([(name, kind)]) for kind in both]
                found = pyarrow.unify_schemas(parts, promote_options="permissive").field(0).type
                if name in large and pyarrow.types.is_floating(found):
                    found = mixed  # no float holds these
            except (pyarrow.ArrowException, OverflowError, TypeError):
                found = mixed
            types[name] = found
    return pyarrow.schema([(name, _settled(pyarrow, kind)) for name, kind in types.items()])


def _settled(pyarrow: Any, kind: Any) -> Any:
    """A type that Parquet can hold: what is always null is text, a dict that is empty JSON."""

    def settle(kind: Any) -> Any:
        if pyarrow.types.is_null(kind):
            return pyarrow.string()
        if pyarrow.types.is_list(kind):
            inner = settle(kind.value_type)
            return None if inner is None else pyarrow.list_(inner)
        if pyarrow.types.is_struct(kind):
            fields = [(f.name, settle(f.type)) for f in kind]
            whole = fields and all(inner is not None for _, inner in fields)
            return pyarrow.struct(fields) if whole else None
        return kind

    found = settle(kind)
    return pyarrow.json_() if found is None else found


def _write_split(
    pyarrow: Any,
    folder: Path,
    name: str,
    schema: Any,
    windows: Iterable[list[dict[str, Any]]],
) -> Split:
    found = Split()
    written: list[Path] = []
    writer: Any = None
    group: list[Any] = []
    in_group = in_shard = 0

    def flush() -> None:
        nonlocal writer, group, in_group
        if writer is None:
            written.append(folder / f"{name}-{len(written):05d}.parquet")
            writer = pyarrow.parquet.ParquetWriter(
                written[-1],
                schema,
                compression="zstd",
                write_page_index=True,
                use_content_defined_chunking=True,  # the Hub stores equal parts once
            )
        table = pyarrow.concat_tables(group) if group else schema.empty_table()
        writer.write_table(table.combine_chunks(), row_group_size=max(table.num_rows, 1))
        group, in_group = [], 0

    for rows in windows:
        table = _table(pyarrow, schema, rows)
        group.append(table)
        found.records += table.num_rows
        found.size += table.nbytes
        in_group += table.nbytes
        in_shard += table.nbytes
        if in_group >= _GROUP_BYTES or in_shard >= _SHARD_BYTES:
            flush()
        if in_shard >= _SHARD_BYTES:
            writer.close()
            writer, in_shard = None, 0
    if group or not written:
        flush()
    if writer is not None:
        writer.close()
    for number, path in enumerate(written):
        last = f"{name}-{number:05d}-of-{len(written):05d}.parquet"
        found.files[last] = path.rename(folder / last)
    return found


def _table(pyarrow: Any, schema: Any, rows: list[dict[str, Any]]) -> Any:
    columns = []
    for column in schema:
        values = [row.get(column.name) for row in rows]
        if column.type == pyarrow.json_():
            values = [None if v is None else orjson.dumps(v).decode() for v in values]
        try:
            columns.append(pyarrow.array(values, type=column.type))
        except (pyarrow.ArrowException, OverflowError, TypeError) as error:
            raise UsageError(
                f"field `{column.name}` fits no Parquet column: {error}",
                hint="leave out --parquet",
            ) from None
    return pyarrow.table(columns, schema=schema)
