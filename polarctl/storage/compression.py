"""gzip and zstandard: told by a file's first bytes when read, by its name when written."""

from __future__ import annotations

import gzip
import io
import re
import sys
from typing import IO, Any, cast

from polarctl.errors import UsageError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame of zstandard without content


def is_compressed(path: str) -> bool:
    """True when what is written to this path is compressed."""
    return path.endswith((".gz", ".zst"))


def block(data: bytes, path: str) -> bytes:
    """Some bytes as they go to the path: a whole member or frame, or themselves.

    Members join to one valid stream, so a resume can start after any of them.
    """
    if path.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    if path.endswith(".zst"):
        import zstandard

        # With a checksum, as gzip has one: without it damage can read as other text.
        return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data)
    return data


def open_bytes(path: str) -> IO[bytes]:
    """A path or `-` as a buffered stream of plain bytes; compression is told by its first bytes.

    Raises:
        UsageError: The file cannot be opened, or not be read.
    """
    try:
        raw: Any = sys.stdin.buffer if path == "-" else open(path, "rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        head = raw.peek(4)[:4]
    except OSError as error:
        raw.close()
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if head.startswith(_GZIP):
        return cast(IO[bytes], _Gzip(fileobj=raw))
    if head.startswith(_ZSTD) or _SKIPPABLE.match(head):
        return cast(IO[bytes], io.BufferedReader(_Zstd(raw), 1 << 20))
    return cast(IO[bytes], raw)


class _Gzip(gzip.GzipFile):
    """Closes the file below it too."""

    def close(self) -> None:
        below: Any = self.fileobj
        super().close()
        if below is not None:
            below.close()


class _Zstd(io.RawIOBase):
    """Plain bytes of a zstandard stream; unlike zstandard's own reader it notices a torn end."""

    # One KiB can grow to some 30 MiB at the most: this bounds the memory.
    feed_bytes = 1 << 10

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self.raw = raw
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame = self.new_frame()
        self.started = False
        self.plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.plain:
            data = (self.frame.unused_data if self.frame.eof else b"") or self.raw.read(
                self.feed_bytes
            )
            if not data:
                if self.started and not self.frame.eof:
                    raise EOFError("compressed file ends in the middle of a frame")
                return 0
            if self.frame.eof:
                self.frame = self.new_frame()
            self.started = True
            self.plain = memoryview(self.frame.decompress(data))
        count = min(len(buffer), len(self.plain))
        buffer[:count] = self.plain[:count]
        self.plain = self.plain[count:]
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()
