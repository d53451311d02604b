"""A file that grows by whole units of work, and the hash that tells how much of it is sound."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any

from polarctl.errors import PolarctlError, UsageError
from polarctl.storage import compression, manifest
from polarctl.storage.replace import next_to

_BLOCK_BYTES = 1 << 20


def open_append(path: str) -> IO[bytes]:
    """The file opened for reading and appending.

    Raises:
        UsageError: It cannot be.
    """
    try:
        return open(path, "a+b")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


class Track:
    """One growing file and the hash of what it holds.

    It grows out of sight until `publish`, so that nothing stands at its path that no journal
    vouches for.

    Args:
        path: The file.
        replacing: An old file keeps its place until the end.

    Attributes:
        final: The file, links followed.
        path: Where it grows now: `final`, or the file beside it.
        size: Bytes of the file that the hash covers.
        hash: SHA-256 of these bytes.

    Raises:
        UsageError: The file cannot be opened for writing.
    """

    def __init__(self, path: str, *, replacing: bool = False):
        self.final = os.path.realpath(path)
        seen = not replacing and os.path.exists(self.final) and os.path.getsize(self.final) > 0
        self.path = self.final if seen else str(next_to(path))
        self.replacing = replacing
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self.size = 0
        self.hash = hashlib.sha256()
        self.stream = open_append(self.path)

    @property
    def unknown(self) -> bool:
        """Whether something stands at its place that `cut_back` has not found in a journal."""
        return not self.hidden and self.size == 0

    @property
    def hidden(self) -> bool:
        """Whether it grows beside its place."""
        return self.path != self.final

    def publish(self) -> None:
        """Give the file its place, now that a journal vouches for it.

        Raises:
            UsageError: Somebody has put a file there meanwhile.
        """
        if not self.hidden:
            return
        empty = os.path.exists(self.final) and os.path.getsize(self.final) == 0
        if not (self.replacing or empty) and os.path.exists(self.final):
            raise UsageError(f"{self.final}: was made by somebody else during this run")
        os.replace(self.path, self.final)
        self.path = self.final

    def discard(self) -> None:
        """Remove what has grown out of sight."""
        if self.hidden:
            Path(self.path).unlink(missing_ok=True)

    def add(self, line: bytes) -> None:
        """Keep a line for the next flush."""
        self.pending.append(line)
        self.pending_bytes += len(line)

    def cut_back(self, entries: list[dict[str, Any]], key: str) -> int:
        """Number of leading journal entries that the file's bytes agree with."""
        good = 0
        with open(self.path, "rb") as stream:
            for entry in entries:
                size, digest = entry[key]
                probe = self.hash.copy()
                missing = size - self.size
                while missing > 0 and (block := stream.read(min(missing, _BLOCK_BYTES))):
                    probe.update(block)
                    missing -= len(block)
                if missing or probe.hexdigest() != digest:
                    break
                self.hash, self.size = probe, size
                good += 1
        return good

    def truncate(self, size: int) -> None:
        """Forget everything past `size` bytes, for good; what begins again does so out of sight."""
        if not size and not self.hidden:
            self.stream.close()
            os.unlink(self.final)
            self.path = str(next_to(self.final))
            self.stream = open_append(self.path)
        self.stream.truncate(size)
        os.fsync(self.stream.fileno())
        if size != self.size:
            self.hash, self.size = hashlib.sha256(), 0
            with open(self.path, "rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    self.hash.update(block)
                    self.size += len(block)

    def flush(self) -> None:
        """Write and sync the lines kept so far.

        Raises:
            PolarctlError: The file is not as this run left it.
        """
        self.check()
        data = b"".join(self.pending)
        self.pending, self.pending_bytes = [], 0
        if not data:
            return
        data = compression.block(data, self.path)
        self.stream.write(data)
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.hash.update(data)
        self.size += len(data)

    def check(self, *, content: bool = False) -> None:
        """Look whether the file is still where and as long as this run left it.

        Args:
            content: Read all of it, too.

        Raises:
            PolarctlError: Another program has moved, removed, replaced or changed it.
        """
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self.stream.fileno()))
        except OSError:
            there = False
        what = "" if there else "moved, removed or replaced"
        if there and os.path.getsize(self.path) != self.size:
            what = "cut or added to"
        elif there and content and manifest.sha256(self.path) != self.hash.hexdigest():
            what = "changed"
        if what:
            raise PolarctlError(
                f"{self.final}: was {what} by another program during this run",
                hint="the same command writes again what is missing",
            )
