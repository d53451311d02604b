"""The command line: one command per stage, made from the stage's `Config`; exit status; signals.

A stage module offers `Config`, `run(config)` and a docstring, which is its help. Only the stage
that is asked for is imported, and nothing heavy before it runs, so that help comes at once.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import errno
import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
import typer.core
from typer.exceptions import TyperException

from polarctl import __version__, config, console
from polarctl.errors import Interrupted, PolarctlError, UsageError
from polarctl.parallel import launcher, rank

STAGES = (
    "sample pair pretrain finetune score serve eval compare rate rft push convert show "
    "quickstart schema validate doctor".split()
)

_RESUME = "the same command goes on from here"
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
_TYPER: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,  # or the terminal's, where that is less
    },
}


class _Stages(typer.core.TyperGroup):
    """The stages as commands, each made when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return STAGES

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in STAGES:
            return stage_command(cmd_name)
        if ctx.resilient_parsing or cmd_name.startswith("-"):
            return None
        near = difflib.get_close_matches(cmd_name, STAGES, 1)
        hint = f"did you mean `{near[0]}`?" if near else "polarctl --help"
        raise UsageError(f"no stage `{cmd_name}`", hint=hint)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Stages"):
            formatter.write_dl([(stage, _summary(stage)) for stage in STAGES])


def _summary(stage: str) -> str:
    """The first line of a stage's docstring, read without importing the stage."""
    spec = importlib.util.find_spec(f"polarctl.stages.{stage}")
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as source:
        return source.readline().strip().lstrip("r").strip('"').rstrip(".")


app = typer.Typer(
    name="polarctl",
    cls=_Stages,
    help="POLAR, policy-discriminative pre-training of reward models, as stages over JSONL.",
    no_args_is_help=True,
    **_TYPER,
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
    offered = config.keys(config_type)
    for field in _in_order(config_type, hints):
        if field.name not in offered:
            continue
        kind, info = get_args(hints[field.name])
        info = copy.copy(info)
        info.metavar = info.metavar or _metavar(field.name, kind)
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


def _in_order(
    config_type: type[config.Common], hints: dict[str, Any]
) -> list[dataclasses.Field[Any]]:
    """The fields as help shows them: required ones first, those of every stage last."""

    def place(field: dataclasses.Field[Any]) -> tuple[bool, bool]:
        common = get_args(hints[field.name])[1].rich_help_panel == config.COMMON
        return common, field.default is not dataclasses.MISSING

    return sorted(dataclasses.fields(config_type), key=place)


def _metavar(name: str, kind: Any) -> str | None:
    """What stands for a value in help; None: the choices, or nothing."""
    kinds = set(get_args(kind)) | {kind}
    if int in kinds:
        return "N"
    if float in kinds:
        return "X"
    return name.rpartition("_")[2].upper() if str in kinds else None


class _Stage(typer.core.TyperCommand):
    """A command with its options in panels, which takes none twice unless its values add up."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            shown = parameter.get_help_record(ctx)
            if shown is None:
                continue
            argument = parameter.param_type_name == "argument"
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.name == "help":
                panel = config.COMMON
            if argument:
                shown = (parameter.metavar or shown[0], shown[1])
            panels.setdefault("Arguments" if argument else panel, []).append(shown)
        panels = {"Arguments": panels.pop("Arguments", []), **panels}
        for panel, rows in panels.items():
            if not rows:
                continue
            with formatter.section(_title(panel)):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            if PRINT_CONFIG in args[: args.index("--") if "--" in args else None]:
                ctx.obj = PRINT_CONFIG
                ctx.resilient_parsing = True  # what a run would need need not be there
                return super().parse_args(ctx, args)
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            for parameter, times in Counter(order).items():
                several = getattr(parameter, "multiple", True) or parameter.name == "help"
                if times > 1 and not several:
                    raise UsageError(
                        f"`{max(parameter.opts, key=len)}` is given twice",
                        hint=f"polarctl {ctx.command.name} --help",
                    )
        return super().parse_args(ctx, args)


PRINT_CONFIG = "--print-config"
# Where a value may come from, by click's names; a default is from nowhere.
_SOURCES = {"COMMANDLINE": "command line", "ENVIRONMENT": "environment", "DEFAULT_MAP": "config"}


def _given(
    context: typer.Context, settings: Any, config_type: type[config.Common]
) -> dict[str, str]:
    """The options that the user has set, and where; not those that are set to nothing."""
    found = {}
    for field in dataclasses.fields(config_type):
        if field.name in config_type.ABSENT:
            continue
        source = context.get_parameter_source(field.name)
        value = getattr(settings, field.name)
        nothing = value is None or value == () or (value is False and field.default is False)
        if source is not None and source.name in _SOURCES and not nothing:
            found[field.name] = _SOURCES[source.name]
    return found


def _title(text: str) -> str:
    """A heading, bold where the terminal has colour (without rich: help has to come at once)."""
    plain = "NO_COLOR" in os.environ or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[1m{text}\x1b[0m"


def stage_command(stage: str) -> Any:
    """The command of a stage, made from its `Config`; imports that stage alone."""
    module = importlib.import_module(f"polarctl.stages.{stage}")
    config_type = module.Config

    def command(polarctl_context: typer.Context, **values: Any) -> None:
        from polarctl.hub.secrets import environment_secrets

        secrets = environment_secrets(os.environ).values()
        console.hide(*(value.decode("utf-8", "surrogateescape") for value in secrets))
        config.check_environment(stage, config_type)
        del values["polarctl_print_config"]
        tidy = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if polarctl_context.obj == PRINT_CONFIG:
            given = _given(polarctl_context, SimpleNamespace(**tidy), config_type)
            sys.stdout.write(config.as_yaml(stage, config_type, {k: tidy[k] for k in given}))
            return
        settings = config_type(**tidy)
        settings = config.with_given(settings, _given(polarctl_context, settings, config_type))
        config.check_given(stage, settings)
        before = console.snapshot()
        console.configure(
            quiet=settings.quiet,
            verbose=settings.verbose,
            color=not settings.no_color,
            json_lines=settings.json,
        )
        for name, source in settings.given.items():
            # Without its value: a server's address may hold a password.
            console.detail(f"option {config.flag_of(config_type, name)}: from the {source}")
        try:
            with _guarded_stdout():
                module.run(settings)
        finally:
            console.restore(before)  # a stage may run inside another

    own = inspect.Parameter(
        "polarctl_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    show = inspect.Parameter(
        "polarctl_print_config",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool,
            typer.Option(
                PRINT_CONFIG,
                help="Print all options as a file for --config, with those that are set here.",
                rich_help_panel=config.COMMON,
            ),
        ],
    )
    parameters = [own, *_parameters(stage, config_type), show]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    single = typer.Typer(add_completion=False, **_TYPER)
    # A line `\b` in a raw docstring keeps the lines below it as they are.
    text = (inspect.getdoc(module) or "").replace("\\b\n", "\b\n")
    single.command(stage, cls=_Stage, help=text)(command)
    return typer.main.get_command(single)


class _guarded_stdout:
    """Keep the real stdout for records; whatever a library prints goes to stderr."""

    def __enter__(self) -> None:
        from polarctl.storage import write

        sys.stdout.flush()
        self.saved, self.before = os.dup(1), write.records_out
        self.stdout_before, launcher.stdout = launcher.stdout, self.saved
        os.dup2(2, 1)
        write.records_out = os.fdopen(os.dup(self.saved), "wb")

    def __exit__(self, *_: object) -> None:
        from polarctl.storage import write

        stream, write.records_out = write.records_out, self.before
        launcher.stdout = self.stdout_before
        try:
            sys.stdout.flush()
            if stream is not None:
                stream.close()
        finally:
            os.dup2(self.saved, 1)
            os.close(self.saved)


class _Stopped(BaseException):
    """SIGTERM arrived. Like Ctrl-C it is not an `Exception`: no library may catch it and go on."""


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise _Stopped


def _on_sigint(signum: int, frame: FrameType | None) -> None:
    # A second Ctrl-C ends the process at once, whatever the first is waiting for.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


def _dispatch(arguments: list[str]) -> None:
    """Parse and run. Typer's own `main` is not used: it swallows Ctrl-C and closed pipes."""
    if "_POLARCTL_COMPLETE" in os.environ:
        app(prog_name="polarctl")
    if arguments and arguments[0] in STAGES:
        # Straight to the stage: parsing the group first would load what `--help` can do without.
        command, name = stage_command(arguments[0]), f"polarctl {arguments[0]}"
        arguments = arguments[1:]
    else:
        command, name = typer.main.get_command(app), "polarctl"
    with command.make_context(name, list(arguments)) as context:
        command.invoke(context)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status, with any error said on stderr.

    Args:
        arguments: The command line without the program's name.
    """
    console.configure(
        quiet=False,
        verbose=False,
        color="--no-color" not in arguments,
        json_lines="--json" in arguments,
    )
    before, launcher.command_line = launcher.command_line, arguments
    try:
        _dispatch(arguments)
        return 0
    except typer.Exit as end:
        return end.exit_code
    except TyperException as error:
        return _usage(error, arguments)
    except PolarctlError as error:
        return _fail(error.exit_status, str(error), error.hint)
    except KeyboardInterrupt:
        return _fail(130, "stopped by Ctrl-C", _RESUME)
    except _Stopped:
        return _fail(Interrupted.exit_status, "stopped by SIGTERM", _RESUME)
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). Keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:  # a full disk is told by libraries in errors of their own
        why = _failed_write(error)
        if why is not None:
            return _fail(1, f"cannot write: {why}", f"make room; {_RESUME}")
        if not isinstance(error, OSError) or error.filename is None:
            raise
        # Removed, moved or closed to us while this runs.
        return _fail(1, f"{os.fsdecode(error.filename)}: {error.strerror}", _RESUME)
    finally:
        launcher.command_line = before


def _failed_write(error: BaseException) -> str | None:
    """What the system said of a write that failed; None when that is not why the run ends.

    safetensors and torch put it into errors and words of their own, or leave it out.
    """
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"\(os error (\d+)\)", text)
        number = int(found[1]) if found else None
    if number in _NO_ROOM:
        return os.strerror(number)
    if error.__context__ is not None and (why := _failed_write(error.__context__)):
        return why
    torn = "unexpected pos" in text or "PytorchStreamWriter failed writing" in text
    return "a checkpoint could not be written whole" if torn else None


def _fail(exit_status: int, message: str, hint: str | None) -> int:
    """Say why the program stops, or have it said by the process that has started this one."""
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is stopping already
    if not rank.tell(exit_status, message, hint):
        console.error(rank.prefix() + message, hint)
    return exit_status


def _usage(error: Any, arguments: list[str]) -> int:
    """Say a fault of the command line as one of our own errors."""
    message = error.format_message()
    if arguments:  # without any argument the message is the help text itself
        stage = next((word for word in arguments if word in STAGES), None)
        if type(error).__name__ == "NoSuchOption":
            unknown = error.option_name
            return _fail(2, f"no such option: {unknown}", _meant(unknown, error, stage))
        message = " ".join(message.replace("Value error, ", "").split())
        message = re.sub(r"'([^'\s]+)'", r"`\1`", message)
        message = message[:1].lower() + message[1:].rstrip(".")
        return _fail(2, message, f"polarctl {stage} --help" if stage else "polarctl --help")
    sys.stderr.write(message + "\n")
    return 2


def _meant(unknown: str, error: Any, stage: str | None) -> str:
    """What an option that does not exist may have been meant for."""
    context = error.ctx
    known = [name for p in context.command.params for name in p.opts] if context else []
    word = unknown.lstrip("-").replace("_", "-")
    elsewhere = [f"--{word}", f"--{config.ELSEWHERE.get(word, word)}"]
    near = [name for name in elsewhere if name in known]
    near += difflib.get_close_matches(f"--{word}", known, 2, cutoff=0.75)
    help_text = f"polarctl {stage} --help" if stage else "polarctl --help"
    return f"did you mean `{near[0]}`? {help_text}" if near else help_text


def main() -> None:
    """Entry point of the `polarctl` program."""
    rank.adopt()
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed by the caller (`>&-`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w"))
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGINT, _on_sigint)
    try:
        status = run(sys.argv[1:])
    except _Stopped:  # while another error was being said
        status = _fail(Interrupted.exit_status, "stopped by SIGTERM", _RESUME)
    # All is done but Python's own end: SIGTERM does not change how it has gone.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
    sys.exit(status)
