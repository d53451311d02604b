"""What must not leave this machine: secrets in files, paths and host names in manifests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import IO, Any

_BLOCK_BYTES = 1 << 20
_OVERLAP_BYTES = 1 << 10

# (what it is, bytes that any such secret contains, the secret). The bytes are looked for first:
# that is many times faster than the pattern, and nearly all blocks have none of them.
_SECRETS = tuple(
    (what, needle, re.compile(pattern))
    for what, needle, pattern in (
        ("a Hugging Face token", b"hf_", rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{20,}"),
        ("a Hugging Face token", b"api_org_", rb"(?<![A-Za-z0-9_])api_org_[A-Za-z0-9]{20,}"),
        # A run of 20 letters and digits with a digit among them: a slug (`sk-how-to-...`) has none.
        (
            "an API key",
            b"sk-",
            rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{0,160}?(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}",
        ),
        # AWS writes EXAMPLE into the keys of its manuals, and those are in many data sets.
        *(
            (
                "an AWS access key",
                start,
                rb"(?<![A-Z0-9])" + start + rb"(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}(?![A-Z0-9])",
            )
            for start in (b"AKIA", b"ASIA")
        ),
        ("a GitHub token", b"gh", rb"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{36}"),
        ("a GitHub token", b"github_pat_", rb"github_pat_[A-Za-z0-9_]{22,}"),
        ("a Google API key", b"AIza", rb"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}"),
        ("a Slack token", b"xox", rb"(?<![A-Za-z0-9])xox[abeprs]-[A-Za-z0-9-]{10,}"),
        ("a private key", b"PRIVATE KEY", rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    )
)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_SECRET_OPTION = re.compile(r"api_?key|passw|secret|credential", re.IGNORECASE)
_SECRET_MIN_BYTES = 12


def environment_secrets(environ: Mapping[str, str]) -> dict[str, bytes]:
    """`{what: value}` of the variables that hold a secret by their name."""
    return {
        f"the value of ${name}": value.strip().encode("utf-8", "surrogateescape")
        for name, value in sorted(environ.items())
        if _SECRET_VARIABLE.search(name)
        and len(value.strip()) >= _SECRET_MIN_BYTES
        and not value.startswith(("/", "~", "."))  # the path of a key file
    }


def find_secrets(stream: IO[bytes], known: Mapping[str, bytes]) -> Iterator[tuple[int, str]]:
    """Places that look like a secret.

    Args:
        stream: Plain bytes, read to the end in bounded memory.
        known: `{what: value}` of secrets to be found by their value.

    Yields:
        (line from 1, what it is), never the secret itself.
    """
    overlap = max([_OVERLAP_BYTES, *map(len, known.values())])
    seen: set[tuple[int, str]] = set()
    lines, tail = 1, b""
    while block := stream.read(_BLOCK_BYTES):
        text = tail + block
        for at, what in sorted(_in_block(text, known)):
            place = lines + text.count(b"\n", 0, at), what
            if place not in seen:
                seen.add(place)
                yield place
        tail = text[-overlap:]
        lines += text.count(b"\n", 0, len(text) - len(tail))


def _in_block(text: bytes, known: Mapping[str, bytes]) -> Iterator[tuple[int, str]]:
    for what, value in known.items():
        at = text.find(value)
        while at >= 0:
            yield at, what
            at = text.find(value, at + 1)
    for what, needle, pattern in _SECRETS:
        if needle in text:
            yield from ((match.start(), what) for match in pattern.finditer(text))


_INNER_PATH = re.compile(r"(?<![\w:/.~])~?/(?:[^\s/'\"`,;:]+/)+([^\s/'\"`,;:]*)")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"`]+", re.IGNORECASE)
_PUBLIC_SITE = re.compile(r"https://(?:[\w-]+\.)?(?:huggingface\.co|github\.com|arxiv\.org)(?:/|$)")


def scrub_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without host, paths, addresses of servers and options that hold a secret.

    Paths become their last name, addresses `<url>`; what else is in the manifest stays.
    """
    environment = dict(manifest.get("environment") or {})
    host = str(environment.pop("host", ""))
    cleaned = _scrub({**manifest, "environment": environment}, host)
    assert isinstance(cleaned, dict)
    return cleaned


def _scrub(value: Any, host: str) -> Any:
    if isinstance(value, dict):
        return {
            _scrub(str(key), host): _scrub(entry, host)
            for key, entry in value.items()
            if not _SECRET_OPTION.search(str(key))
        }
    if isinstance(value, list):
        return [_scrub(entry, host) for entry in value]
    return _scrub_text(value, host) if isinstance(value, str) else value


def _scrub_text(text: str, host: str) -> str:
    if _is_path(text):
        return PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name or text
    text = _URL.sub(lambda m: m[0] if _PUBLIC_SITE.match(m[0]) else "<url>", text)
    text = _INNER_PATH.sub(r"\1", text)
    if len(host) >= 4:
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", text)
    return text


def _is_path(text: str) -> bool:
    """True for an absolute path, one that leaves its folder, a deep one, or an existing one."""
    if text.startswith(("/", "~/", "../", "./")) or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    if "/" not in text or "://" in text or any(map(str.isspace, text)):
        return False
    return text.count("/") > 1 or os.path.exists(text)
