"""Options: written once in a stage's `Config`, used as flag, environment variable and YAML key.

Order: flag > `POLARCTL_<STAGE>_<KEY>` > `--config` YAML > default. An unknown key or variable is
an error that names the nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer

from polarctl.errors import UsageError

COMMON = "Common options"


def shard_of(text: str) -> tuple[int, int]:
    """`I/N` as numbers, 0 <= I < N.

    Raises:
        UsageError: Not of that form.
    """
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise UsageError(f"`--shard {text}`: not of the form I/N with 0 <= I < N", hint="`--shard 0/4`")


# Options that are the same in every command, written once.
ConfigFile = Annotated[
    str | None, typer.Option(help="YAML file with any of these options.", rich_help_panel=COMMON)
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace existing output.", rich_help_panel=COMMON)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check options and input, say what would be done, write nothing.",
        rich_help_panel=COMMON,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=COMMON)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=COMMON)]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colours.", rich_help_panel=COMMON)]
Json = Annotated[
    bool, typer.Option("--json", help="Messages as JSON lines on stderr.", rich_help_panel=COMMON)
]


@dataclass(frozen=True, kw_only=True)
class Bare:
    """The options of every command: where options come from, and how it speaks."""

    config: ConfigFile = None
    quiet: Quiet = False
    verbose: Verbose = False
    no_color: NoColor = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Basic(Bare):
    """The common options of a command that writes something else than records."""

    force: Force = False
    dry_run: DryRun = False


@dataclass(frozen=True, kw_only=True)
class Common:
    """The options that every stage has.

    Attributes:
        NEUTRAL: Options of the stage that may differ at a resume, beside `BOOKKEEPING`.
    """

    NEUTRAL: ClassVar[frozenset[str]] = frozenset()

    input: Annotated[
        tuple[str, ...],
        typer.Argument(metavar="INPUT", help="Files or globs (.gz and .zst too); `-` for stdin."),
    ] = ("-",)
    output: Annotated[
        str, typer.Option("--output", "-o", help="Output; `-` for stdout.", metavar="PATH")
    ] = "-"
    config: ConfigFile = None
    seed: Annotated[
        int, typer.Option(help="Seed of every random choice.", rich_help_panel=COMMON)
    ] = 0
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Read only the first N records.", rich_help_panel=COMMON),
    ] = None
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do part I of N (from 0).", rich_help_panel=COMMON),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(help="Go on where an interrupted run stopped.", rich_help_panel=COMMON),
    ] = True
    force: Force = False
    dry_run: DryRun = False
    manifest: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Provenance file. Default: beside the output.",
            rich_help_panel=COMMON,
        ),
    ] = None
    rejects: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Write bad records here, with reasons, instead of stopping.",
            rich_help_panel=COMMON,
        ),
    ] = None
    quiet: Quiet = False
    verbose: Verbose = False
    no_color: NoColor = False
    json: Json = False


# How a run is done or described, not what it computes: these may differ at a resume.
BOOKKEEPING = frozenset(
    "input output config resume force dry_run manifest rejects quiet verbose no_color json".split()
)


def resolved(config: Common | Basic) -> dict[str, Any]:
    """Every option as plain JSON values."""
    values = dataclasses.asdict(config)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def semantic(config: Common) -> dict[str, Any]:
    """The options that decide what is computed."""
    neutral = BOOKKEEPING | config.NEUTRAL
    return {k: v for k, v in resolved(config).items() if k not in neutral}


def keys(config_type: type[Common]) -> list[str]:
    """The option names of a stage, as used in YAML."""
    return [field.name for field in dataclasses.fields(config_type)]


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"


def yaml_of(path: str) -> Any:
    """What a YAML file says.

    Raises:
        UsageError: Unreadable, or no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str, config_type: type[Common]) -> dict[str, Any]:
    """The options of a `--config` file.

    Raises:
        UsageError: Unreadable, no mapping, an unknown key (names the nearest), a wrong type.
    """
    values = yaml_of(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must be a mapping of options to values")
    known = keys(config_type)
    kinds = get_type_hints(config_type)
    result = {}
    for raw, value in values.items():
        key = str(raw).replace("-", "_")
        if key not in known or key == "config":
            raise UsageError(f"{path}: unknown key `{raw}`", hint=_nearest(key, known))
        result[key] = _yaml_value(value, kinds[key], f"{path}: `{raw}`")
    return result


def _yaml_value(value: Any, kind: Any, where: str) -> Any:
    """The value, refused where Typer would bend it: `true` is no number and a list no text.

    Texts are converted and checked as if they stood on the command line (YAML reads 1e-5 as one).
    """
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    takes_list = any(get_origin(k) in (tuple, list) for k in kinds)
    if takes_list and isinstance(value, str | int | float):
        return [value]
    if isinstance(value, dict) or (isinstance(value, list) and not takes_list):
        raise UsageError(f"{where} takes one value, not {value!r}")
    if isinstance(value, bool) and bool not in kinds:
        raise UsageError(f"{where} takes no `{str(value).lower()}`")
    return value


def env_prefix(stage: str) -> str:
    """The start of a stage's environment variables."""
    return f"POLARCTL_{stage.upper()}_"


def check_environment(stage: str, config_type: type[Common]) -> None:
    """Raise UsageError for a variable of this stage that names no option."""
    prefix = env_prefix(stage)
    known = [key.upper() for key in keys(config_type)]
    for name in sorted(os.environ):
        if name.startswith(prefix) and name.removeprefix(prefix) not in known:
            raise UsageError(
                f"unknown environment variable `{name}`",
                hint=_nearest(name, [prefix + key for key in known]),
            )
