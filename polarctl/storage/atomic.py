"""Files that a crash leaves whole, durable renames, and the permissions of the umask."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: str | Path, data: bytes) -> None:
    """Replace a file in one step: a reader sees the old bytes or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Make the contents of all files in a folder durable."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        else:
            sync_folder(file)
    sync_folder(folder)


def open_to_umask(folder: Path) -> None:
    """Give a folder's files the permissions of the umask; safetensors writes 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~umask)
