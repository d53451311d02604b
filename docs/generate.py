"""Write docs/reference/ from the program itself: `python docs/generate.py`."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import typer

from polarctl import cli
from polarctl.records import KINDS
from polarctl.schemas.examples import EXAMPLES
from polarctl.schemas.export import json_schema

FOLDER = Path(__file__).parent / "reference"
WIDTH = 80
NOTE = "<!-- Written by docs/generate.py: run `make reference` instead of editing. -->\n"


def help_text(command: Any, name: str) -> str:
    """The help of a command at a fixed width."""
    context = command.context_class(
        command, info_name=name, terminal_width=WIDTH, **command.context_settings
    )
    text: str = command.get_help(context)
    return "\n".join(line.rstrip() for line in text.splitlines())


def cli_reference() -> str:
    """Every command's help."""
    parts = [
        "# Command line\n",
        NOTE,
        "An option can also be given as a key of a `--config` YAML file (`max_tokens: 512`) or as\n"
        "an environment variable (`POLARCTL_SAMPLE_MAX_TOKENS=512`). A flag beats a variable, a\n"
        "variable beats the file, the file beats the default.\n",
        "| exit status | meaning |\n|---|---|\n"
        "| 0 | done; also when the reader of a pipe has gone |\n"
        "| 1 | failed while running |\n"
        "| 2 | wrong option, config or path, or a resume that does not fit |\n"
        "| 3 | an input record breaks its schema |\n"
        "| 4 | a package, GPU, model or server that is needed is missing |\n"
        "| 5 | a check that was asked for did not hold |\n"
        "| 75 | stopped by SIGTERM; the same command goes on |\n"
        "| 130 | stopped by Ctrl-C; the same command goes on |\n",
        f"```text\n{help_text(typer.main.get_command(cli.app), 'polarctl')}\n```\n",
    ]
    for stage in cli.STAGES:
        text = help_text(cli.stage_command(stage), f"polarctl {stage}")
        parts.append(f"## polarctl {stage}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def type_name(schema: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(type_name(part) for part in schema["anyOf"])
    if "allOf" in schema:
        return " and ".join(type_name(part) for part in schema["allOf"])
    kind = schema.get("type", "anything")
    if kind == "array" and "prefixItems" in schema:
        return f"list of {', '.join(map(type_name, schema['prefixItems']))}"
    if kind == "array":
        return f"list of {type_name(schema['items'])}" if "items" in schema else "list"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_name(schema['additionalProperties'])}"
    limits = {
        "exclusiveMinimum": "above",
        "minimum": "at least",
        "exclusiveMaximum": "below",
        "maximum": "at most",
    }
    said = [f"{word} {schema[key]}" for key, word in limits.items() if key in schema]
    return " ".join([kind, ", ".join(said)]).strip()


def field_table(schema: dict[str, Any]) -> str:
    """The fields of an object as a Markdown table."""
    rows = ["| field | type | required | description |", "|---|---|---|---|"]
    for name, value in schema["properties"].items():
        required = "yes" if name in schema.get("required", []) else ""
        about = value.get("description", "").replace("|", "\\|")
        rows.append(f"| `{name}` | {type_name(value)} | {required} | {about} |")
    return "\n".join(rows)


def schema_reference() -> str:
    """Every kind of record: its fields and examples."""
    parts = [
        "# Records\n",
        NOTE,
        "One JSON object a line. Fields that are not listed pass through untouched. The same as\n"
        "JSON Schema: `polarctl schema KIND`, or the files in `schemas/`. To check a file:\n"
        "`polarctl validate FILE`.\n",
    ]
    shared: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        schema = json_schema(kind)
        shared.update(schema.get("$defs", {}))
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in EXAMPLES[kind])
        parts.append(
            f"## {kind}\n\n{schema['description']}\n\n{field_table(schema)}\n\n"
            f"```json\n{lines}\n```\n"
        )
    parts.append("## Parts of records\n")
    for name, schema in sorted(shared.items()):
        parts.append(f"### {name}\n\n{schema['description']}\n\n{field_table(schema)}\n")
    return "\n".join(parts)


# What the reference of the library shows: module, name, and of a class the methods.
LIBRARY = (
    ("polarctl", "RewardModel", ("from_pretrained", "score", "score_records", "save_pretrained")),
    ("polarctl", "read", ()),
    ("polarctl", "write", ()),
    ("polarctl", "evaluate", ()),
    ("polarctl.rewards", "PolarReward", ("load", "__call__")),
    ("polarctl.encoding", "Encoder", ("__init__", "encode", "text", "report")),
    ("polarctl.integrations.shared", "load", ()),
    ("polarctl.integrations.trl", "reward_function", ()),
    ("polarctl.integrations.verl", "compute_score", ()),
    ("polarctl.integrations.openrlhf", "reward_function", ()),
)


def signature(name: str, function: Any) -> str:
    """A call as it is written in a stub, one line for each parameter."""
    lines, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
            keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = f"{stars}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {'...' if callable(parameter.default) else repr(parameter.default)}"
        lines.append(text)
        keyword_only = keyword_only or parameter.kind is parameter.VAR_POSITIONAL
    returned = inspect.signature(function).return_annotation
    arrow = "" if returned is inspect.Signature.empty else f" -> {returned}"
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f"){arrow}"


def prose(docstring: str) -> str:
    """A Google docstring as Markdown: its sections become lists."""
    parts: list[str] = []
    for block in re.split(r"\n\n+", inspect.cleandoc(docstring)):
        head, _, body = block.partition(":\n")
        if head not in ("Args", "Returns", "Raises", "Yields", "Attributes"):
            parts.append(block)
            continue
        if head in ("Returns", "Yields"):
            parts.append(f"**{head}:** {' '.join(body.split())}")
            continue
        items = re.split(r"\n(?=\S)", textwrap.dedent(body).strip())
        texts = [" ".join(item.split()) for item in items]
        named = [re.sub(r"^([\w*]+): ", r"`\1`: ", text) for text in texts]
        parts.append(f"**{head}:**\n\n" + "\n".join(f"* {text}" for text in named))
    return "\n\n".join(parts)


def library_reference() -> str:
    """What scripts import: signatures and docstrings."""
    parts = [
        "# Library\n",
        NOTE,
        "What scripts may import; [Use it from Python](../guides/python.md) shows it at work.\n"
        "Other names may move. `Text` is a string or a list of messages.\n",
    ]
    for module, name, methods in LIBRARY:
        found = getattr(importlib.import_module(module), name)
        parts.append(f"## {module}.{name}\n")
        if not inspect.isclass(found):
            parts.append(f"```python\n{signature(name, found)}\n```\n")
        parts.append(f"{prose(found.__doc__)}\n")
        for method in methods:
            function = getattr(found, method)
            shown = {"__init__": name, "__call__": "reward"}.get(method, f"{name}.{method}")
            heading = f"Calling a {name}" if method == "__call__" else shown
            parts.append(f"### {heading}\n\n```python\n{signature(shown, function)}\n```\n")
            if method != "__init__":  # its arguments stand in the docstring of the class
                parts.append(f"{prose(function.__doc__)}\n")
    return "\n".join(parts)


PAGES = {
    "cli.md": cli_reference,
    "schemas.md": schema_reference,
    "library.md": library_reference,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
