"""Options: written once in a stage's `Config`, used as flag, environment variable and YAML key.

Order: flag > `POLARCTL_<STAGE>_<KEY>` > `--config` YAML > default. An unknown key or variable is
an error that names the nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import typer

from polarctl.errors import UsageError

COMMON = "Common options"
_MAX_YAML_BYTES = 1 << 20
KEY_VARIABLE = "POLARCTL_SERVER_KEY"  # of a server that is asked, or that `serve` is


# Names that options have in transformers, TRL, vLLM and LLaMA-Factory.
ELSEWHERE = {
    "learning-rate": "lr",
    "model-name-or-path": "model",
    "base-model": "model",
    "output-dir": "output",
    "out": "output",
    "num-train-epochs": "epochs",
    "num-epochs": "epochs",
    "train-batch-size": "batch-size",
    "per-device-train-batch-size": "batch-size",
    "max-seq-length": "max-length",
    "max-seq-len": "max-length",
    "cutoff-len": "max-length",
    "warmup-ratio": "warmup",
    "bf16": "dtype",
    "fp16": "dtype",
    "torch-dtype": "dtype",
    "tensor-parallel-size": "gpus",
    "nproc-per-node": "gpus",
    "lora-r": "lora-rank",
    "beta": "kl-coef",
    "max-completion-length": "max-new-tokens",
    "max-tokens": "max-new-tokens",
    "n": "samples",
    "resume-from-checkpoint": "resume",
    "eval-steps": "val-steps",
    "overwrite-output-dir": "force",
    "overwrite": "force",
}


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
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:I.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision of computing.")
]
LoraAlpha = Annotated[int | None, typer.Option(min=1, help="Their scale; default: twice the rank.")]
DeepSpeed = Annotated[
    str | None, typer.Option(metavar="CONFIG", help="zero1, zero2, zero3 or a JSON file.")
]
Gpus = Annotated[int, typer.Option(min=1, help="Processes on this machine.")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Work on a Ray cluster: auto (this machine's), HOST:PORT of its head, or local (one "
        "that ends with the run).",
    ),
]
RayResource = Annotated[
    tuple[str, ...],
    typer.Option(
        metavar="KEY=AMOUNT",
        help="What Ray reserves for a worker: GPU=2, CPU=8, ...; may be repeated. Default: GPU=1, "
        "or CPU=1 with --device cpu.",
    ),
]
ServerDeadline = Annotated[
    float, typer.Option(min=0, help="Seconds without a good reply before giving up.")
]
TestShare = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the prompts in the test part.")
]
Nnodes = Annotated[
    int,
    typer.Option(min=1, help="Machines; MASTER_ADDR, MASTER_PORT and NODE_RANK say the rest."),
]
SaveMinutes = Annotated[
    float,
    typer.Option(min=0, help="Minutes between checkpoints, beside --save-steps; 0: no clock."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=COMMON)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=COMMON)]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colours.", rich_help_panel=COMMON)]
Json = Annotated[
    bool, typer.Option("--json", help="Messages as JSON lines on stderr.", rich_help_panel=COMMON)
]


@dataclass(frozen=True)
class Needs:
    """Options that have an effect in some modes of a stage only; set in another, they are refused.

    Attributes:
        options: Their names, with spaces between.
        met: Whether the options of a run are such a mode.
        what: The mode in words: `is for ...`.
    """

    options: str
    met: Callable[[Any], bool]
    what: str


class Options:
    """What every `Config` has beside its options.

    Attributes:
        NEEDS: Which options need others; those of the base classes hold too.
        ABSENT: Options of the base classes that this stage can never use: it does not offer them.
        given: Options that the user has set, and where: `command line`, `environment` or
            `config`. Kept
            beside the values: two runs with the same values are the same run.
    """

    NEEDS: ClassVar[list[Needs]] = []
    ABSENT: ClassVar[frozenset[str]] = frozenset()
    given: ClassVar[Mapping[str, str]] = {}


@dataclass(frozen=True, kw_only=True)
class Bare(Options):
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
class Common(Options):
    """The options that every stage has.

    Attributes:
        NEUTRAL: Options of the stage that may differ at a resume, beside `BOOKKEEPING`.
    """

    NEEDS = [
        Needs("resume", lambda c: c.output != "-", "`-o FILE`: standard output cannot be resumed"),
        Needs(
            "force",
            lambda c: c.output != "-" or c.rejects is not None,
            "`-o FILE` or `--rejects FILE`, which it replaces",
        ),
    ]
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
    return {
        key: list(v) if isinstance(v, tuple) else v
        for key, v in values.items()
        if key not in config.ABSENT
    }


def shown(config: Common) -> dict[str, Any]:
    """The options for a plan: all but those that ask for nothing and are not set."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        key: value
        for key, value in resolved(config).items()
        if not (value is None or value == [] or (value is False and defaults[key] is False))
    }


def semantic(config: Common) -> dict[str, Any]:
    """The options that decide what is computed."""
    neutral = BOOKKEEPING | config.NEUTRAL
    return {k: v for k, v in resolved(config).items() if k not in neutral}


def keys(config_type: type[Common]) -> list[str]:
    """The option names of a stage, as used in YAML."""
    names = (field.name for field in dataclasses.fields(config_type))
    return [name for name in names if name not in config_type.ABSENT]


def flag_of(config_type: type[Options], name: str) -> str:
    """An option as it stands on the command line."""
    info = get_type_hints(config_type, include_extras=True)[name].__metadata__[0]
    if isinstance(info, typer.models.ArgumentInfo):
        return str(info.metavar or name.upper())
    # The first one that is written in an `Annotated` is called `default` until Typer has read it.
    long = [str(x) for x in (info.default, *(info.param_decls or ())) if str(x).startswith("--")]
    return long[0] if long else "--" + name.replace("_", "-")


def with_given(config: Any, given: Mapping[str, str]) -> Any:
    """The options, knowing which of them the user has set; see `Options.given`."""
    object.__setattr__(config, "given", dict(given))
    return config


def check_given(stage: str, config: Any) -> None:
    """Refuse options that the user has set and that would do nothing.

    Raises:
        UsageError: An empty text, or an option that this mode of the stage does not use.
    """
    kind = type(config)
    for name in config.given:
        value = getattr(config, name)
        if value == "" or (isinstance(value, tuple) and "" in value):
            raise UsageError(
                f"`{flag_of(kind, name)}` is empty", hint=leave_out(stage, config, name)
            )
    for need in (need for part in kind.__mro__ for need in vars(part).get("NEEDS", ())):
        for name in need.options.split():
            if name in config.given and not need.met(config):
                raise UsageError(
                    f"`{flag_of(kind, name)}` has no effect here: it is for {need.what}",
                    hint=leave_out(stage, config, name),
                )


def leave_out(stage: str, config: Any, name: str) -> str:
    """How to take back an option, by where it was set."""
    source = config.given.get(name)
    if source == "environment":
        return f"unset {env_prefix(stage)}{name.upper()}"
    return f"take `{name}` out of {config.config}" if source == "config" else "leave it out"


def _nearest(key: str, known: list[str]) -> str:
    elsewhere = ELSEWHERE.get(key.replace("_", "-"), key).replace("-", "_")
    near = [elsewhere] if elsewhere in known else difflib.get_close_matches(key, known, 1)
    return f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"


def yaml_of(path: str) -> Any:
    """What a YAML file says.

    Raises:
        UsageError: Unreadable, or no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes no key twice, where YAML's own would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """A mapping, refused when it names a key again."""
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise UsageError(f"{path}:{key.start_mark.line + 1}: a key that is no text")
                if key.value in seen:
                    raise UsageError(
                        f"{path}:{key.start_mark.line + 1}: `{key.value[:80]}` is given twice"
                    )
                seen.add(key.value)
            return dict(super().construct_mapping(node, deep))

    try:
        with open(path, "rb") as stream:
            text = stream.read(_MAX_YAML_BYTES + 1)
        if len(text) > _MAX_YAML_BYTES:
            raise UsageError(f"{path}: larger than {_MAX_YAML_BYTES >> 10} KiB")
        return yaml.load(text.decode("utf-8-sig"), Loader)  # noqa: S506
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UsageError:
        raise
    except Exception as error:  # beside its own, PyYAML lets through what a conversion raises
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"{path}: no YAML: {said or type(error).__name__}") from None


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
            raise UsageError(f"{path}: unknown key `{str(raw)[:80]}`", hint=_nearest(key, known))
        if key in result:
            raise UsageError(f"{path}: `{raw}` is given twice")
        result[key] = _yaml_value(value, kinds[key], f"{path}: `{raw}`")
    return result


def _yaml_value(value: Any, kind: Any, where: str) -> Any:
    """The value, refused where Typer would bend it: `true` is not a number and a list not a text.

    Texts are converted and checked as if they stood on the command line (YAML reads 1e-5 as one).
    """
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    takes_list = any(get_origin(k) in (tuple, list) for k in kinds)
    parts = value if isinstance(value, list) and takes_list else [value]
    if any(isinstance(part, dict | list) for part in parts):
        # Bounded: with YAML's references a few bytes can stand for gigabytes.
        raise UsageError(f"{where} takes one value, not {reprlib.repr(value)[:100]}")
    if any(isinstance(part, str) and not _is_text(part) for part in parts):
        raise UsageError(f"{where} holds a character that no text has: {reprlib.repr(value)[:100]}")
    if isinstance(value, bool) and bool not in kinds:
        raise UsageError(f"{where} takes no `{str(value).lower()}`")
    return [value] if takes_list and isinstance(value, str | int | float) else value


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def as_yaml(stage: str, config_type: type[Common], values: Mapping[str, Any]) -> str:
    """A file for `--config`: every option of a stage with its help.

    Args:
        stage: Name of the stage.
        config_type: Its options.
        values: What is set; all other options stand behind a `#`, with their defaults.
    """
    import textwrap

    import yaml

    hints = get_type_hints(config_type, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    lines = [
        f"# Options of `polarctl {stage}`, for `--config FILE`. Take away the `#` of what you set."
    ]
    for name in keys(config_type):
        if name == "config":
            continue
        kind, info = get_args(hints[name])
        options = (kind, *get_args(kind))
        choices = [c for k in options if get_origin(k) is Literal for c in get_args(k)]
        text = info.help + (f" One of: {', '.join(choices)}." if choices else "")
        default = fields[name].default
        if default is dataclasses.MISSING:
            text, default = f"{text} It has to be set.", None
        value = values.get(name, default)
        value = list(value) if isinstance(value, tuple) else value
        lines += ["", *textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="# ")]
        written = yaml.safe_dump(value, default_flow_style=True, width=10**6)
        written = f"{name}: {written.removesuffix('...' + chr(10)).strip()}".removesuffix(" null")
        lines.append(written if name in values else f"#{written}")
    return "\n".join(lines) + "\n"


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
