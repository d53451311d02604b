"""What can go wrong, as one tree. The exit status is part of each class.

    PolarctlError            1   failed while running
    ├── UsageError           2   wrong option, config, path, or a resume that does not fit
    ├── RecordError          3   an input record breaks its schema (carries file and line)
    ├── MissingError         4   a needed package, GPU, model or server is missing
    ├── CheckFailed          5   a check that the user asked for did not hold
    └── Interrupted         75   stopped by SIGTERM (130: by Ctrl-C); the same command resumes

A user's mistake is shown as one line, `polarctl: <what is wrong>`, then `hint: <do this>`; a
traceback means a fault of the program.
"""

from __future__ import annotations


class PolarctlError(Exception):
    """Base of all errors that are shown to the user as one line.

    Args:
        message: What is wrong, without a full stop, literals in backticks.
        hint: What to do about it, or None.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class UsageError(PolarctlError):
    """The command line, the config, a path or the state on disk does not allow the run."""

    exit_status = 2


class RecordError(PolarctlError):
    """An input record breaks its schema.

    Args:
        message: What is wrong with the record.
        where: `file:line` of the record, or None when the caller adds it.
        hint: What to do about it, or None.
    """

    exit_status = 3

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None):
        super().__init__(message if where is None else f"{where}: {message}", hint=hint)
        self.reason = message
        self.where = where


class MissingError(PolarctlError):
    """A package, a GPU, a model or a server that the run needs is not there."""

    exit_status = 4


class CheckFailed(PolarctlError):
    """A check that the user asked for (`eval --min-accuracy`) did not hold."""

    exit_status = 5


class Interrupted(PolarctlError):
    """SIGTERM or Ctrl-C arrived; what was written is kept and the same command resumes.

    Args:
        message: What is wrong.
        hint: What to do about it, or None.
        exit_status: 75 for SIGTERM, 130 for Ctrl-C.
    """

    exit_status = 75

    def __init__(self, message: str, *, hint: str | None = None, exit_status: int = 75):
        super().__init__(message, hint=hint)
        self.exit_status = exit_status


def need(package: str, extra: str) -> MissingError:
    """The error for an optional package that is not installed."""
    return MissingError(
        f"this needs the package `{package}`", hint=f"pip install 'polarctl[{extra}]'"
    )
