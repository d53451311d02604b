"""Manifests that are published: without the paths, hosts and users of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_SECRET_OPTION = re.compile(r"api_?key|passw|pwd|secret|credential", re.IGNORECASE)
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
