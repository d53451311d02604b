"""The next policy's weights, read into the page cache while the one before it writes.

Loading a model is mostly waiting for its files. Read beforehand, they come from memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from polarctl import console
from polarctl.policies.pool import Policy

LEAST_BYTES = 256 << 20  # smaller files load in a moment
_CHUNK_BYTES = 8 << 20
_ROOM = 2  # times the files: the running policy needs memory, too


def free_memory() -> int | None:
    """Bytes that can be used without swapping, or None where the system does not say (Linux)."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith("MemAvailable:")]
    return int(found[0][1]) << 10 if found else None


def weights_of(policy: Policy) -> list[Path]:
    """Files of the weights of a policy that runs on this machine, where they are here already."""
    if policy.backend == "openai":
        return []
    folder = Path(policy.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(policy.model, revision=policy.revision, local_files_only=True)
            )
        except OSError:  # not there yet: huggingface_hub's errors are of this kind
            return []
    return sorted(folder.glob("*.safetensors"))


class ReadAhead:
    """Reads files in a thread of its own. A context manager: at its end the thread stops.

    Args:
        least: Bytes of weights that are worth it. Default: `LEAST_BYTES`.
        free: Gives the bytes of free memory, or None.
    """

    def __init__(self, *, least: int | None = None, free: Callable[[], int | None] = free_memory):
        self._least, self._free = LEAST_BYTES if least is None else least, free
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        """Wait until all that was begun is read."""
        if self._thread is not None:
            self._thread.join()

    def begin(self, policy: Policy) -> None:
        """Read a policy's weights where memory has room for twice as much, and say so."""
        files = weights_of(policy)
        size, free = sum(path.stat().st_size for path in files), self._free()
        if size < self._least or free is None or (self._thread and self._thread.is_alive()):
            return
        what = f"weights of policy `{policy.name}`, {size / 2**30:,.1f} GiB"
        if free <= _ROOM * size:
            console.note(f"{what}: not read ahead ({free / 2**30:,.1f} GiB of memory are free)")
            return
        console.note(f"{what}: read ahead ({free / 2**30:,.1f} GiB of memory are free)")
        self._thread = threading.Thread(target=self._read, args=(files,), daemon=True)
        self._thread.start()

    def _read(self, files: Iterable[Path]) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        for path in files:
            try:
                with open(path, "rb", buffering=0) as stream:
                    while not self._stop.is_set() and stream.readinto(buffer):
                        pass
            except OSError:  # whoever loads the model says what is wrong with it
                return
