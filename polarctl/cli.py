"""The command line: one command per stage, made from the stage's `Config`; exit status; signals.

A stage module offers `Config`, `run(config)` and a docstring, which is its help. Nothing heavy is
imported before a stage runs.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.exceptions import TyperException

from polarctl import __version__, config, console
from polarctl.errors import Interrupted, PolarctlError

STAGES = (
    "sample pair pretrain finetune score eval rft push convert quickstart schema validate".split()
)

app = typer.Typer(
    name="polarctl",
    help="POLAR, policy-discriminative pre-training of reward models, as stages over JSONL.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"polarctl {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _read_config(stage: str, config_type: type[config.Common]) -> Callable[..., Any]:
    """The callback of `--config`: its values become the command's defaults."""

    def callback(context: typer.Context, value: str | None) -> str | None:
        value = value or os.environ.get(config.env_prefix(stage) + "CONFIG")
        if value and not context.resilient_parsing:
            context.default_map = config.read_yaml(value, config_type)
        return value

    return callback


def _parameters(stage: str, config_type: type[config.Common]) -> list[inspect.Parameter]:
    """The dataclass's fields as parameters that Typer understands."""
    hints = get_type_hints(config_type, include_extras=True)
    parameters = []
    for field in dataclasses.fields(config_type):
        kind, info = get_args(hints[field.name])
        info = copy.copy(info)
        if get_origin(kind) is tuple:
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        default = field.default
        info.envvar = config.env_prefix(stage) + field.name.upper()
        info.show_envvar = False
        if field.name == "config":
            info.is_eager, info.callback = True, _read_config(stage, config_type)
        if isinstance(default, tuple):
            default = list(default)
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=Annotated[kind, info],
            )
        )
    return parameters


def _add(stage: str, module: ModuleType) -> None:
    config_type = module.Config

    def command(**values: Any) -> None:
        config.check_environment(stage, config_type)
        tidy = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        settings = config_type(**tidy)
        console.configure(
            quiet=getattr(settings, "quiet", False),
            verbose=getattr(settings, "verbose", False),
            color=not getattr(settings, "no_color", False),
            json_lines=getattr(settings, "json", False),
        )
        with _guarded_stdout():
            module.run(settings)

    parameters = _parameters(stage, config_type)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(stage, help=inspect.getdoc(module))(command)


class _guarded_stdout:
    """Keep the real stdout for records; whatever a library prints goes to stderr."""

    def __enter__(self) -> None:
        from polarctl import output

        sys.stdout.flush()
        self.saved = os.dup(1)
        os.dup2(2, 1)
        output.records_out = os.fdopen(os.dup(self.saved), "wb")

    def __exit__(self, *_: object) -> None:
        from polarctl import output

        stream, output.records_out = output.records_out, None
        try:
            sys.stdout.flush()
            if stream is not None:
                stream.close()
        finally:
            os.dup2(self.saved, 1)
            os.close(self.saved)


for _stage in STAGES:
    _add(_stage, importlib.import_module(f"polarctl.stages.{_stage}"))


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by SIGTERM", hint="the same command goes on from here")


def _on_sigint(signum: int, frame: FrameType | None) -> None:
    # A second Ctrl-C ends the process at once, whatever the first is waiting for.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status, with any error said on stderr.

    Args:
        arguments: The command line without the program's name.
    """
    try:
        status = app(arguments, prog_name="polarctl", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except TyperException as error:
        return _usage(error, arguments)
    except PolarctlError as error:
        console.error(str(error), error.hint)
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        console.error("stopped by Ctrl-C", "the same command goes on from here")
        return 130
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). Keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            console.error(
                f"cannot write: {error.strerror}", "make room; the same command goes on from here"
            )
            return 1
        raise


def _usage(error: TyperException, arguments: list[str]) -> int:
    """Say a fault of the command line as one of our own errors."""
    message = error.format_message()
    if arguments:  # without any argument the message is the help text itself
        stage = next((word for word in arguments if word in STAGES), None)
        message = message[:1].lower() + message[1:].rstrip(".")
        console.error(message, f"polarctl {stage} --help" if stage else "polarctl --help")
    else:
        sys.stderr.write(message + "\n")
    return 2


def main() -> None:
    """Entry point of the `polarctl` program."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGINT, _on_sigint)
    sys.exit(run(sys.argv[1:]))
