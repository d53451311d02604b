"""Parquet files for verl, written whole: a file appears only when it is complete.

pyarrow comes with the extras `[verl]` and `[data]` and is imported only here.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from polarctl.config import Common
from polarctl.errors import UsageError, need
from polarctl.storage import atomic, manifest, replace
from polarctl.storage.paths import check_paths, make_folders, remove_empty
from polarctl.storage.write import Output


def require_pyarrow(extra: str) -> Any:
    """The package pyarrow with its Parquet module; `extra` is the one of ours that brings it.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise need("pyarrow", extra) from None
    return pyarrow


def verl_schema(pyarrow: Any) -> Any:
    """The columns that `polarctl.formats.tools.write_verl` fills."""
    text = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct({"role": text, "content": text}))
    extra = {"split": text, "id": text, "prompt": turns, "wrapper": text, "fields": text}
    return pyarrow.schema(
        {
            "data_source": text,
            "prompt": turns,
            "ability": text,
            "reward_model": pyarrow.struct({"style": text, "ground_truth": text}),
            "extra_info": pyarrow.struct(extra),
        }
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write verl rows as a file, over one that is there.

    Raises:
        MissingError: pyarrow is not installed.
    """
    pyarrow = require_pyarrow("verl")
    table = pyarrow.Table.from_pylist(rows, schema=verl_schema(pyarrow))
    pyarrow.parquet.write_table(table, path)


class VerlFile:
    """A Parquet file of verl rows with its manifest; appears when the block ends without an error.

    Args:
        stage: Name of the stage.
        config: Its options (`output`, `rejects`, `manifest`, `force` are used here).
        inputs: `polarctl.storage.read.sizes` of the inputs.

    Attributes:
        sink: Where bad records go.
        counts: Numbers for the manifest.

    Raises:
        MissingError: pyarrow is not installed.
        UsageError: The file exists, is an input or cannot be written.
    """

    def __init__(self, stage: str, config: Common, inputs: list[dict[str, Any]]):
        self.stage, self.config, self.inputs = stage, config, inputs
        self._pyarrow = require_pyarrow("verl")
        check_paths(config, [entry["path"] for entry in inputs])
        self._made = make_folders(config.output, config.manifest)
        self._target = Path(config.output)
        self._mark = Path(config.manifest or f"{config.output}.manifest.json")
        self._temporary = replace.next_to(self._target)
        replace.check_mark(self._mark)
        if self._target.exists() and self._target.stat().st_size:
            if not config.force:
                raise UsageError(f"{config.output}: exists", hint="pass --force to replace it")
            replace.check_file(self._target, self._mark)
        # It writes no record: it only keeps the rejects.
        self.sink = Output(stage, dataclasses.replace(config, output="-", manifest=None), inputs)
        self.counts = self.sink.counts
        self._schema = verl_schema(self._pyarrow)

    def __enter__(self) -> VerlFile:
        self.sink.__enter__()
        self._writer = self._pyarrow.parquet.ParquetWriter(self._temporary, self._schema)
        return self

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows."""
        self.counts["records"] += len(rows)
        if rows:
            self._writer.write_table(self._pyarrow.Table.from_pylist(rows, schema=self._schema))

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._writer.close()
        self.sink.__exit__(kind, error, trace)
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            remove_empty(self._made)
            return
        with open(self._temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(self._temporary, os.path.realpath(self._target))
        atomic.sync_folder(self._target.parent)
        file = {
            "sha256": manifest.sha256(self._target),
            "bytes": self._target.stat().st_size,
            "path": str(self._target),
            "records": self.counts["records"],
        }
        manifest.write(
            self._mark,
            self.stage,
            self.config,
            inputs=manifest.hashed(self.inputs),
            outputs={self._target.name: file},
            counts=self.counts,
        )
