"""Manifests that are published: without the paths, hosts and users of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_OPTION = re.compile(r"api_?key|passw|pwd|secret|credential", re.IGNORECASE)
# A folder's name may hold spaces: rather a word too many is lost than a name told.
_FOLDER = r"[^\s/\\'\"`,;:]+(?: [^\s/\\'\"`,;:]+){0,4}"
_INNER_PATH = re.compile(rf"(?<![\w/.~])~?/(?:{_FOLDER}/)+([^\s/'\"`,;:]*)")
_INNER_WINDOWS_PATH = re.compile(
    rf"(?:(?<!\w)[A-Za-z]:|(?<![\w\\/:])[\\/](?=[\\/]\w))[\\/]+(?:{_FOLDER}[\\/]+)*([^\s\\/'\"`,;:]*)"
)
_USER_AT_HOST = re.compile(
    r"[\w.+-]+@(?:\[?[0-9A-Fa-f]*:[0-9A-Fa-f:]+\]?|[\w-]+(?:\.[\w-]+)+|[\w.-]+(?=:[/~]))"
)
_ADDRESS = re.compile(r"(?<![\w.])(?!127\.0\.0\.1|0\.0\.0\.0)\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"`]+", re.IGNORECASE)
_PUBLIC_SITE = re.compile(r"https://(?:[\w-]+\.)?(?:huggingface\.co|github\.com|arxiv\.org)(?:/|$)")


def scrub_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without hosts, users, paths, addresses of servers and options that hold a secret.

    Paths become their last name, addresses `<url>` and `<host>`; what else is there stays.
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
        parts = re.split(r"[\\/]" if "\\" in text else "/", text.rstrip("\\/"))
        share = text.startswith(("\\\\", "//")) and len(parts) < 5  # a server and what it shares
        return "<path>" if share else parts[-1] or text
    text = _URL.sub(lambda m: m[0] if _PUBLIC_SITE.match(m[0]) else "<url>", text)
    text = _USER_AT_HOST.sub("<host>", text)
    text = _ADDRESS.sub("<host>", text)
    text = _INNER_WINDOWS_PATH.sub(r"\1", text)
    text = _INNER_PATH.sub(r"\1", text)
    if len(host) >= 4:
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", text)
    return text


def _is_path(text: str) -> bool:
    """True for an absolute path, one that leaves its folder, a deep one, or an existing one."""
    if re.match(r"/|~/|\.\.?[\\/]|\\\\|[A-Za-z]:[\\/]", text):
        return True
    if "/" not in text or "://" in text:
        return False
    if any(map(str.isspace, text)):
        return os.path.exists(text)
    return text.count("/") > 1 or os.path.exists(text)
