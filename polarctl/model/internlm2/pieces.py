"""Read a sentencepiece model without sentencepiece: the few fields of the file that we need.

The file is one protobuf message; field numbers are those of `sentencepiece_model.proto`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarctl.errors import MissingError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece: its text, its score (the highest is merged first), its kind.

    In the text U+2581 stands for a space.
    """

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A BPE model.

    Attributes:
        pieces: In the order of their ids.
        unk_id: Id of the unknown piece.
        byte_fallback: Whether an unknown character becomes its bytes.
        charsmap: Compiled rules of Unicode normalisation; empty for none.
        dummy_prefix: Whether a space goes before every text.
        squeeze: Whether outer spaces are dropped and runs of spaces become one.
    """

    pieces: tuple[Piece, ...]
    unk_id: int
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    squeeze: bool


def read(path: Path) -> Pieces:
    """A sentencepiece model from its file.

    Raises:
        MissingError: It is none, or none that merges pairs (BPE).
    """
    try:
        top = list(_fields(path.read_bytes()))
        pieces = tuple(_piece(dict(_fields(value))) for number, value in top if number == 1)
        by_number = dict(top)
        trainer = dict(_fields(by_number.get(2, b"")))
        rules = dict(_fields(by_number.get(3, b"")))
    except (ValueError, LookupError, TypeError, struct.error):
        raise MissingError(f"{path}: is no sentencepiece model") from None
    if trainer.get(3, 1) != _BPE or trainer.get(24, 0) or not rules.get(5, 1) or not pieces:
        raise MissingError(
            f"{path}: is no sentencepiece model of InternLM2's kind",
            hint="BPE with spaces escaped in front; or save it as tokenizer.json",
        )
    return Pieces(
        pieces=pieces,
        unk_id=trainer.get(40, 0),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=rules.get(2, b""),
        dummy_prefix=bool(rules.get(3, 1)),
        squeeze=bool(rules.get(4, 1)),
    )


def _piece(fields: dict[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return Piece(text=fields[1].decode("utf-8"), score=score, kind=fields.get(3, NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields; a value is an int or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("cut short")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
