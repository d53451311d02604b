"""The house rules that a linter does not know: floors, lazy imports, sizes, speed of help."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polarctl.cli import STAGES

ROOT = Path(__file__).parent.parent
MAX_LINES = 350


def floors() -> dict[str, int]:
    """{module: floor} from the table in docs/architecture.md; a new module gets its place there."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`([\w.]+)`", names)}


FLOOR_OF = floors()

# The tour gives the other stages' commands as a user would: through the command line.
UPWARD = {("stages.quickstart", "cli")}

HEAVY = {"torch", "transformers", "accelerate", "trl", "vllm", "deepspeed", "peft", "datasets"}
# Help must come at once: nothing of these is needed for it.
NOT_FOR_HELP = HEAVY | {"numpy", "matplotlib", "pydantic", "msgspec", "orjson", "yaml", "rich"}


def sources() -> list[tuple[str, Path]]:
    """(module name without `polarctl.`, file) of the whole package."""
    found = []
    for folder, prefix in (("polarctl", ""), ("stages", "stages.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found.append(
                (name.removesuffix(".__init__").removesuffix("__init__").rstrip("."), path)
            )
    return [(name, path) for name, path in found if name]


SOURCES = sources()
MODULES = {name for name, _ in SOURCES}
# Folders: their `__init__` holds a docstring and nothing else, so they stand on no floor.
FOLDERS = {name for name, path in SOURCES if path.name == "__init__.py"}
each_source = pytest.mark.parametrize(("name", "path"), SOURCES, ids=[name for name, _ in SOURCES])


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that is imported anywhere in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of the house among the imports, without `polarctl.`."""
    found = set()
    for full in imports(tree):
        if full.startswith("polarctl."):
            inner = full.removeprefix("polarctl.")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {""}


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of functions."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return Strip().visit(tree)


def floor(name: str) -> int:
    key = "stages" if name.startswith("stages") else name
    assert key in FLOOR_OF, f"give `{name}` its place in the table of docs/architecture.md"
    return FLOOR_OF[key]


@each_source
def test_imports_go_strictly_down(name, path):
    for used in own_imports(ast.parse(path.read_bytes())):
        assert not (name.startswith("stages") and used.startswith("stages")), (
            f"{name} imports {used}: stages never import each other"
        )
        if (name, used) in UPWARD:
            continue
        assert floor(used) < floor(name), f"{name} imports {used}, which is not below it"


def test_every_module_has_a_floor_and_every_floor_its_modules():
    modules = {name for name in MODULES - FOLDERS if not name.startswith("stages")}
    assert set(FLOOR_OF) == modules | {"stages"}


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_folders_init_holds_only_its_docstring(name):
    (path,) = [path for found, path in SOURCES if found == name]
    (statement,) = ast.parse(path.read_bytes()).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@each_source
def test_heavy_packages_are_imported_where_they_are_used(name, path):
    tree = ast.parse(path.read_bytes())
    if name in ("cli", "config", "console", "errors") or name.startswith("stages"):
        top = {full.partition(".")[0] for full in imports(at_module_level(tree))}
        assert not top & HEAVY
    if name != "backends.vllm":
        assert "vllm" not in {full.partition(".")[0] for full in imports(tree)}


@each_source
def test_a_file_stays_readable_in_one_go(name, path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@each_source
def test_what_is_public_says_what_it_is(name, path):
    tree = ast.parse(path.read_bytes())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name}"
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    overrides = any(not isinstance(base, ast.Constant) for base in node.bases)
                    assert overrides or ast.get_docstring(inner), f"{node.name}.{inner.name}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_offers_config_run_and_a_docstring_with_a_pipe(stage):
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_bytes())
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {"Config", "run"} <= names
    text = ast.get_docstring(tree) or ""
    assert f"polarctl {stage}" in text, "the docstring shows no command"
    assert text.splitlines()[0].endswith("."), "the first line is a sentence on one line"


def test_every_stage_file_is_a_stage():
    files = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert files == set(STAGES)


def test_help_loads_nothing_that_it_does_not_need():
    program = f"""
import contextlib, io, sys
from polarctl import cli
for arguments in [["--help"], *([stage, "--help"] for stage in cli.STAGES)]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert cli.run(arguments) == 0
    assert "Usage: polarctl" in text.getvalue()
    loaded = [name for name in {sorted(NOT_FOR_HELP)!r} if name in sys.modules]
    assert not loaded, (arguments, loaded)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_repository_holds_nothing_but_its_parts():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:  # an unpacked archive
        return
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert top <= {
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "docs",
        "polarctl",
        "pyproject.toml",
        "schemas",
        "stages",
        "tests",
    }
