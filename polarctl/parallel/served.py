"""What a server says that it serves: part of what a resume must find unchanged.

Each field is named `served_...`: kind and name, what tells the weights in its list of models
(`root`, a fingerprint), and the rewards of a few texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from polarctl import console
from polarctl.config import Common
from polarctl.errors import MissingError, PolarctlError
from polarctl.parallel.http_client import Answer, Fault, Remote, Request, refuse_errors

PROBE = "served_probe"
_IDENTITY = ("root", "parent", "max_model_len", "fingerprint")


def models(remote: Remote, url: str) -> list[dict[str, Any]] | None:
    """The models that a server lists at `url`; None when it has no such list.

    Raises:
        MissingError: No good reply until the deadline, or a refused key.
    """
    return remote.ask([Request("GET", url, None, _listed)])[0]


def fields(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of a server's list says of the model, as fields of a run's identity."""
    found = {name: row.get(name) for name in _IDENTITY}
    return {
        f"served_{name}": console.plain(value) if isinstance(value, str) else value
        for name, value in found.items()
        if isinstance(value, str | int | float)
    }


def unlike(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first `served_...` field that differs, if any.

    The rewards of the same texts may differ by 0.05 or 2 %: a server's batches change them in
    half precision. Two models differ by more in one text of eight at least.
    """
    for name in sorted({key for key in (*before, *now) if key.startswith("served_")}):
        one, other = before.get(name), now.get(name)
        if name == PROBE and isinstance(one, list) and isinstance(other, list):
            if len(one) == len(other) and all(map(_close, one, other)):
                continue
        if one != other:
            return name
    return None


def refuse_another(url: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare what a server says of its model with what it said at the start.

    After faults it may have been started anew, with another model.

    Raises:
        PolarctlError: It is another model.
    """
    name = unlike(before, now)
    if name is not None:
        raise PolarctlError(
            f"{url}: serves another model than at the start: `{name}` was "
            f"{before.get(name)!r} and is now {now.get(name)!r}",
            hint="serve the first one; the same command goes on from here",
        )


class ReplyName:
    """The model that the replies of a server name: always the same, if any.

    Args:
        url: The server, for messages.
        allowed: Names that it may be; none: whatever the first reply says, since servers may name
            a model otherwise than they are asked for it.

    Attributes:
        name: The name, once a reply has said it.
    """

    def __init__(self, url: str, allowed: Collection[str] = ()):
        self._url, self._allowed = url, allowed
        self.name: str | None = None

    def check(self, reply: dict[str, Any]) -> None:
        """Look at a reply.

        Raises:
            Fault: Its `model` is no text.
            PolarctlError: It names another model.
        """
        name = reply.get("model")
        if name is None:
            return
        if not isinstance(name, str):
            raise Fault("a reply whose `model` is no text")
        hint = "one model behind one address, from the first reply to the last"
        said = f"{self._url}: a reply is by the model `{console.plain(name, 100)}`"
        if self.name not in (None, name):
            first = console.plain(str(self.name), 100)
            raise PolarctlError(f"{said}, the ones before by `{first}`", hint=hint)
        if self._allowed and name not in self._allowed:
            raise PolarctlError(f"{said}, which it does not list", hint=hint)
        self.name = name


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=0.02, abs_tol=0.05)


def identity(config: Common, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the server serves, as a resume compares it.

    Args:
        config: The options of the output.
        ask: Asks the server. A complete output needs no server, and none is asked then.

    Returns:
        The fields of the interrupted or complete output where they are the same (rewards of the
        probe to a tolerance), else what the server says now.

    Raises:
        MissingError: No server answers.
    """
    before: Any = None
    complete = False
    if config.output != "-" and not config.force:
        journal = Path(f"{config.output}.journal")
        mark = Path(config.manifest or f"{config.output}.manifest.json")
        complete = not journal.exists() and Path(config.output).exists() and mark.exists()
        try:
            if complete:
                before = json.loads(mark.read_bytes())["fingerprint"]
            elif config.resume:
                before = json.loads(journal.read_bytes().partition(b"\n")[0])
            before = {k: v for k, v in before.items() if k.startswith("served_")}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            before = None  # none of ours, or nothing was finished: `Output` says which
    if complete and before:
        return before
    now = ask()
    return now if before is None or unlike(before, now) else before


def _listed(answer: Answer) -> list[dict[str, Any]] | None:
    if answer.status in (401, 403):
        raise MissingError(f"the server refuses the key: {answer.said()}", hint="look at the key")
    if answer.status != 200:
        return None
    reply = answer.value()
    refuse_errors(reply)
    rows = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(rows, list) or not rows:
        raise Fault("a list of models without any")
    if not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows):
        raise Fault("a list of models without their names")
    return rows
