"""Where a model comes from: a folder here, or the Hub, whose library waits a minute for no network.

One short question to the Hub comes before the first model that is not here. Where no answer comes,
only what is in the cache can be loaded, and that is tried at once. Where one comes, the library
fetches the files and tries again as it always does.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from pathlib import Path

from polarctl import console
from polarctl.errors import MissingError

PATIENCE_S = 5.0  # for all tries together, names that do not resolve included
_PAUSES_S = (0.0, 0.5, 1.0)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def require(path: str) -> None:
    """Check that a model can be there, before a library looks for it.

    Args:
        path: A folder, a file, or a Hub id.

    Raises:
        MissingError: It is not a Hub id and nothing is there; or it is not in the cache of the Hub,
            and the Hub cannot be reached.
    """
    if Path(path).exists():
        return
    if not _HUB_ID.fullmatch(path):
        raise MissingError(
            f"{path}: no such folder", hint="a folder with config.json, or a Hub id (`owner/name`)"
        )
    import huggingface_hub
    from huggingface_hub import constants

    reason: str | None = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        reason = unreachable(constants.ENDPOINT)
    if reason is None:
        return
    if not any(isinstance(huggingface_hub.try_to_load_from_cache(path, f), str) for f in _FILES):
        raise MissingError(
            f"{path}: no such folder, not in the cache, and the Hub cannot be reached: {reason}",
            hint="a folder with config.json; for the Hub look at the network and HF_ENDPOINT",
        )
    if not constants.HF_HUB_OFFLINE:
        console.choice("Hub", "the cache alone", reason)
        constants.HF_HUB_OFFLINE = True


@functools.cache
def unreachable(address: str) -> str | None:
    """Why a server gives no answer, or None when it gives any; asked once for each address.

    Args:
        address: `https://...`.
    """
    found: list[str | None] = []

    def ask() -> None:
        reason: str | None = None
        for pause in _PAUSES_S:
            time.sleep(pause)
            reason = _fault(address)
            if reason is None:
                break
        found.append(reason)

    # Names are resolved without any limit of time, so the wait is this thread's and not ours.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return found[0] if found else f"{address}: no answer within {PATIENCE_S:g} s"


def _fault(address: str) -> str | None:
    """Why one question, asked as the Hub's library asks, got no answer."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=PATIENCE_S)
    except Exception as error:  # httpx's or requests', OSError, ...
        said = str(error).strip().splitlines()
        return f"{address}: {said[0][:200] if said else type(error).__name__}"
    return None  # whatever the answer says
