r"""Secrets in files: those that Kingfisher knows, and the values of this machine's own variables.

Kingfisher (https://github.com/mongodb/kingfisher) looks for about 500 kinds in this process and
without the network; `secrets.yml` beside this file adds a few. What it cannot see is done here:
values of the environment, letters written as `\u0068`, large files in bounded memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

from polarctl.errors import need

HASH_DIGITS = 16

_BLOCK_BYTES = 8 << 20
_OVERLAP_BYTES = 64 << 10  # no secret is longer, its letters written as escapes
_SECRET_VARIABLE = re.compile(
    r"(?:token|key|secret|password|passwd|passphrase|pwd|credentials?|(?:^|_)(?:pass|pat|auth))"
    r"_?\d*$",
    re.IGNORECASE,
)
_ESCAPE = re.compile(rb'\\(?:u00([2-7][0-9A-Fa-f])|(["\\/bfnrt]))')
# A line break inside a text becomes a CR, so that the lines of the file can still be counted.
_ESCAPED = {b"n": b"\r", b"r": b"\r", b"t": b"\t", b"b": b" ", b"f": b" "}


@dataclass(frozen=True)
class Secret:
    """A place that looks like a secret; the secret itself is nowhere in it.

    Attributes:
        line: Line from 1.
        what: Kind, as `gitlab-pat` or `the value of $NAME`.
        hash: First 16 hexadecimal digits of its SHA-256, by which it can be allowed.
    """

    line: int
    what: str
    hash: str


def environment_secrets(environ: Mapping[str, str]) -> dict[str, bytes]:
    """`{what: value}` of the variables that hold a secret by their name."""
    return {
        f"the value of ${name}": value.strip().encode("utf-8", "surrogateescape")
        for name, value in sorted(environ.items())
        if _SECRET_VARIABLE.search(name) and _may_be_secret(value.strip())
    }


def _may_be_secret(value: str) -> bool:
    """Long enough, no word that any text may hold, no path of a key file."""
    if value.startswith(("~/", "./", "../")):
        return False
    if value.startswith("/") and os.path.exists("/" + value[1:].partition("/")[0]):
        return False
    return len(value) >= 12 or (len(value) >= 8 and not value.isalpha() and not value.isdigit())


def find_secrets(
    stream: IO[bytes], known: Mapping[str, bytes], *, escaped: bool = False
) -> Iterator[Secret]:
    """Places that look like a secret, in the order of their lines within a block of some MiB.

    Args:
        stream: Plain bytes, read to the end in bounded memory.
        known: `{what: value}` of secrets to be found by their value.
        escaped: The text is JSON, so that nothing of it means what it is before it is unescaped.

    Raises:
        MissingError: Kingfisher is not installed.
    """
    overlap = max([_OVERLAP_BYTES, *(8 * len(value) for value in known.values())])
    line, rest = 1, b""
    while True:
        block = stream.read(_BLOCK_BYTES)
        text = rest + block
        cut = _cut(text, overlap) if block else len(text)
        head, rest = text[:cut], text[cut:]
        yield from _in_block(head, rest, known, line, escaped)
        line += head.count(b"\n")
        if not block:
            return


def _cut(text: bytes, overlap: int) -> int:
    """Where the next block begins: what starts before is whole in this one."""
    end = max(0, len(text) - overlap)
    return (text.rfind(b"\n", 0, end) + 1) or (text.rfind(b" ", 0, end) + 1) or end


def _in_block(
    head: bytes, rest: bytes, known: Mapping[str, bytes], line: int, escaped: bool
) -> Iterator[Secret]:
    """Secrets that start in the head of a block, as it is written and as it is meant."""
    seen = set()
    if escaped:
        head, rest = _unescaped(head), _unescaped(rest)
    for _ in range(3):  # JSON within JSON, as the arguments of tools, is escaped once more
        text = head + rest
        at, number = 0, line
        for start, what, value in sorted(_matches(text, known)):
            if start >= len(head):
                break
            number, at = number + text.count(b"\n", at, start), start
            found = Secret(number, what, hashlib.sha256(value).hexdigest()[:HASH_DIGITS])
            if (found.line, found.hash) not in seen:
                seen.add((found.line, found.hash))
                yield found
        again = _unescaped(head), _unescaped(rest)
        if again == (head, rest):
            return
        head, rest = again


def _matches(text: bytes, known: Mapping[str, bytes]) -> Iterator[tuple[int, str, bytes]]:
    for what, value in known.items():
        for form in {value, _in_ascii(value)}:
            at = text.find(form)
            while at >= 0:
                yield at, what, value
                at = text.find(form, at + 1)
    for finding in _scanner().scan(text):
        if finding.visible:  # others are parts of a pair, such as a public id
            what = re.split(r"[./]", finding.rule_id)[-1]
            yield finding.location["start_offset"], what, finding.secret.encode()


def _in_ascii(value: bytes) -> bytes:
    """How JSON writes it whose letters are all ASCII; ASCII itself is unescaped before."""
    letters = value.decode("utf-8", "replace")
    return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in letters).encode()


def _unescaped(text: bytes) -> bytes:
    return _ESCAPE.sub(_character, text) if b"\\" in text else text


def _character(match: re.Match[bytes]) -> bytes:
    code, letter = match.groups()
    return bytes([int(code, 16)]) if code else _ESCAPED.get(letter, letter)


@lru_cache(maxsize=1)
def _scanner() -> Any:
    """Kingfisher with its rules and ours; compiled once, then kept in the user's cache folder."""
    try:
        from kingfisher_sdk import Rules, Scanner
    except ImportError:
        raise need("kingfisher-secret-scanner", "push") from None
    from importlib import resources

    with resources.as_file(resources.files("polarctl.hub") / "secrets.yml") as ours:
        return Scanner(Rules([ours]))
