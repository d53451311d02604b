"""A temporary SQLite database: what a run has to keep and cannot hold in memory.

What does not fit into its cache lies in a file without a name, in the folder of SQLITE_TMPDIR or
TMPDIR, else in /var/tmp; the operating system removes it whatever happens to the process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from polarctl.errors import PolarctlError

_PRAGMAS = """
pragma cache_size = -{kib};
pragma temp_store = file;
pragma journal_mode = off;
pragma synchronous = off;
"""


class Scratch:
    """Tables on disk for the time of a run.

    Args:
        tables: SQL that makes them.
        cache_mib: Memory of SQLite for pages, and again for a sort, MiB.
        failure: What is said when the disk is full: `prompts cannot be kept on disk`.
        room: How much TMPDIR has to hold then: `twice the prompts`.
    """

    def __init__(self, tables: str, *, cache_mib: float, failure: str, room: str):
        self.failure, self.room = failure, room
        self._store = sqlite3.connect("", isolation_level=None)
        self._store.executescript(_PRAGMAS.format(kib=int(cache_mib * 1024)) + tables)

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """The database, for several changes that are written down together.

        Raises:
            PolarctlError: The disk is full, or does not work.
        """
        with self._told():
            self._store.execute("begin")
            yield self._store
            self._store.execute("commit")

    def insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows to a table."""
        if rows:
            with self.change() as store:
                places = ", ".join("?" * len(rows[0]))
                store.executemany(f"insert into {table} values ({places})", rows)

    def select(self, query: str, values: Iterable[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows that a query finds, read as they are asked for."""
        with self._told():
            yield from self._store.execute(query, tuple(values))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise PolarctlError(
                f"{self.failure}: {error}",
                hint=f"TMPDIR=FOLDER names a folder with room for {self.room}",
            ) from None
