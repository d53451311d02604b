"""Everything that is said to the user, on stderr: notes, choices, warnings, errors, progress.

Records own stdout. A message is one line, plain unless stderr is a terminal, so that logs stay
readable; `--json` turns every message into a JSON object a line.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

PLAIN_INTERVAL_S = 30.0
_SHORTEST_HIDDEN = 8  # in what we say ourselves: `a` as a key would leave no message readable
_PASSWORD = re.compile(r"(?<=://)[^\s/?#:]*:[^\s/?#]*(?=@)")
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # terminal escapes, bidi overrides, surrogates, ...


@dataclass
class _State:
    quiet: bool = False
    silent: bool = False
    verbose: bool = False
    json: bool = False
    color: bool = True
    choices: dict[str, dict[str, str]] = field(default_factory=dict)


_state = _State()
_hidden: set[str] = set()


def hide(*secrets: str) -> None:
    """Never say these texts: keys and passwords. Shown as `***` for the rest of the process."""
    _hidden.update(filter(None, secrets))


def plain(text: str, most: int = 300) -> str:
    """What somebody else has said, fit for a message: one line, bounded, no secrets, no escapes.

    Args:
        text: From a server or a library.
        most: Characters at most.
    """
    line = _clean(" ".join(text.split()), 1)
    return line if len(line) <= most else line[: most - 3] + "..."


def _clean(value: Any, shortest: int = _SHORTEST_HIDDEN) -> Any:
    """Texts, also inside lists and dicts, with what cannot be seen written out and no secrets."""
    if isinstance(value, dict):
        return {_clean(key, shortest): _clean(entry, shortest) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(entry, shortest) for entry in value]
    if not isinstance(value, str):
        return value
    for secret in sorted(_hidden, key=len, reverse=True):
        if len(secret) >= shortest:
            value = value.replace(secret, "***")
    return visible(_PASSWORD.sub("***", value))


def visible(text: str) -> str:
    """A text that a terminal shows and does not obey: what cannot be seen is written out."""
    return text if text.isprintable() else "".join(map(_seen, text))


def _seen(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode()


def snapshot() -> dict[str, Any]:
    """How messages look now, for `restore`."""
    return dict(vars(_state))


def restore(saved: dict[str, Any]) -> None:
    """Put back what `snapshot` gave, after a stage that another stage ran."""
    vars(_state).update(saved)


def speak_as(saved: dict[str, Any]) -> None:
    """Have messages look as in the process whose `snapshot` this is; for those that it starts."""
    configure(
        quiet=saved["quiet"],
        verbose=saved["verbose"],
        color=saved["color"],
        json_lines=saved["json"],
    )


def configure(*, quiet: bool, verbose: bool, color: bool, json_lines: bool) -> None:
    """Set how messages look; forgets the choices recorded so far.

    Of several processes only the first (RANK or POLARCTL_WORKER is 0) says anything but errors.
    """
    _state.quiet, _state.verbose, _state.json = quiet, verbose, json_lines
    own = os.environ.get("POLARCTL_WORKER") or os.environ.get("RANK") or "0"
    _state.silent = own != "0"
    _state.color = color and "NO_COLOR" not in os.environ and sys.stderr.isatty()
    _state.choices = {}


def _emit(kind: str, message: str, style: str = "", **fields: Any) -> None:
    if _state.silent and kind not in ("error", "hint"):
        return
    message, fields = _clean(message), _clean(fields)
    if _state.json:
        import json

        line = json.dumps({"level": kind, "message": message, **fields}, ensure_ascii=False)
    elif _state.color and style:
        line = f"\x1b[{style}m{message}\x1b[0m"
    else:
        line = message
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def note(message: str, **fields: Any) -> None:
    """Say what happened. Hidden by `--quiet`."""
    if not _state.quiet:
        _emit("info", message, **fields)


def note_at_once(message: str) -> None:
    """`note` from a signal handler, which may have interrupted another message."""
    if not (_state.quiet or _state.silent or _state.json):
        with contextlib.suppress(OSError):
            os.write(2, f"{message}\n".encode())


def detail(message: str, **fields: Any) -> None:
    """Say something that only `--verbose` asks for."""
    if _state.verbose:
        _emit("debug", message, "2", **fields)


def warn(message: str, **fields: Any) -> None:
    """Say what the user should look at. Not hidden by `--quiet`."""
    _emit("warning", f"warning: {message}", "33", **fields)


def error(message: str, hint: str | None = None, **fields: Any) -> None:
    """Say why the program stops: `polarctl: ...`, then `hint: ...`."""
    text = f"polarctl: {message}"
    if _state.json:
        _emit("error", text, hint=hint, **fields)
        return
    _emit("error", text, "31")
    if hint:
        _emit("hint", f"hint: {hint}")


def choice(what: str, value: str, reason: str) -> None:
    """Say an automatic choice with its reason, and keep it for the manifest."""
    value, reason = _clean(value), _clean(reason)
    if _state.choices.get(what) == {"value": value, "reason": reason}:
        return  # said already
    _state.choices[what] = {"value": value, "reason": reason}
    note(f"{what}: {value} ({reason})", choice=what, value=value, reason=reason)


def choices() -> dict[str, dict[str, str]]:
    """The automatic choices of this run: `{what: {value, reason}}`."""
    return dict(_state.choices)


def keep(choices: dict[str, dict[str, str]]) -> None:
    """Keep for the manifest what another process of this run has chosen, and said."""
    _state.choices = {**choices, **_state.choices}


class Progress(Protocol):
    """A counter that somebody watches."""

    def update(self, done: float, text: str = "") -> None:
        """Set how much is done, with a few words of state (loss, rate)."""


def duration(seconds: float) -> str:
    """Seconds in the units that fit: `45 s`, `3 min 05 s`, `2 h 10 min`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {left:02} s" if minutes else f"{left} s"


class _PlainProgress:
    """One line every 30 s, for logs and pipes."""

    def __init__(self, title: str, total: float | None, unit: str, eta: bool):
        self.title, self.total, self.unit, self.eta = title, total, unit, eta
        self.last = time.monotonic()
        self.first: tuple[float, float] | None = None

    def update(self, done: float, text: str = "") -> None:
        now = time.monotonic()
        if self.first is None:  # what an earlier run has done says nothing of the speed
            self.first = now, done
        if now - self.last < PLAIN_INTERVAL_S:
            return
        self.last = now
        begin, before = self.first
        rate = (done - before) / max(now - begin, 1e-9)
        parts = [f"{done:,.0f}" + (f"/{self.total:,.0f}" if self.total else "") + f" {self.unit}"]
        if rate:
            parts.append(f"{rate:,.1f}/s")
            if self.eta and self.total and self.total > done:
                parts.append(f"{duration((self.total - done) / rate)} left")
        note(f"{self.title}: {', '.join(parts)} {text}".rstrip())


class _RichProgress:
    """A live bar on a terminal."""

    def __init__(self, progress: Any, task: Any):
        self.progress, self.task = progress, task

    def update(self, done: float, text: str = "") -> None:
        self.progress.update(self.task, completed=done, text=text)


@contextmanager
def progress(
    title: str,
    total: float | None = None,
    unit: str = "records",
    *,
    eta: bool = True,
    above: Callable[[], Any] | None = None,
) -> Iterator[Progress]:
    """Watch a loop: a bar on a terminal, else a line every 30 s, nothing with `--quiet`.

    Args:
        title: Of what is done.
        total: How much there is to do, or None.
        unit: Of what is counted.
        eta: Say how long it will take; False where the text of `update` does.
        above: Gives a rich object that a terminal shows above the bar, in place of the text of
            `update`, or nothing; it is asked for several times a second, in a thread of its own.
    """
    if _state.quiet or _state.silent or _state.json or not sys.stderr.isatty():
        yield _PlainProgress(title, total, unit, eta)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    class Bar(RichProgress):
        def get_renderables(self) -> Iterator[Any]:
            if above is not None and (shown := above()):
                yield shown
            yield from super().get_renderables()

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TimeRemainingColumn()] if eta and total else []),
        *([TextColumn("{task.fields[text]}")] if above is None else []),
        console=Console(stderr=True, no_color=not _state.color),
        redirect_stdout=False,  # stdout carries records
        transient=True,
    )
    with bar:
        yield _RichProgress(bar, bar.add_task(title, total=total, text=""))


def show(renderable: Any) -> None:
    """Print a rich object (a table) on stderr. Hidden by `--quiet`; with `--json` left out."""
    if _state.quiet or _state.silent or _state.json:
        return
    from rich.console import Console

    Console(stderr=True, no_color=not _state.color).print(renderable)
