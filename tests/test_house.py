"""The house rules that a linter does not know: layers, lazy imports, names, speed of help."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polarctl.cli import STAGES

ROOT = Path(__file__).parent.parent
MAX_LINES = 500
MAX_LOOSE_FILES = 12


def layers() -> dict[str, int]:
    """{folder: height} from the block of layers in docs/architecture.md, the top one first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- layers -->\n+```text\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no block of layers"
    lines = [line.partition(":")[0].split() for line in block[1].strip().splitlines()]
    return {name: height for height, names in enumerate(reversed(lines)) for name in names}


LAYER_OF = layers()
# Files that lie loose in polarctl/, by layer; what scripts import stands on what it opens.
LOOSE = {
    **dict.fromkeys(("config", "console", "errors", "records", "seeding"), "base"),
    **dict.fromkeys(("api", "encoding", "rewards", "verl_reward"), "public"),
    **dict.fromkeys(("cli", "__main__"), "cli"),
}
# They give the other stages' commands as a user would: through the command line.
UPWARD = {("stages.quickstart", "cli"), ("stages.eval", "cli")}

HEAVY = set("torch transformers accelerate trl vllm deepspeed peft datasets ray".split())
# Help must come at once: nothing of these is needed for it.
NOT_FOR_HELP = HEAVY | {"numpy", "matplotlib", "pydantic", "msgspec", "orjson", "yaml", "rich"}
# One file, or one for each of its uses, knows such a package.
ONLY_IN = {
    "vllm": ("scoring.vllm", "policies.vllm_writer"),
    "trl": ("rl.methods",),
    "ray": ("parallel.ray_driver", "parallel.ray_pool", "parallel.ray_data"),
}


def sources() -> list[tuple[str, Path]]:
    """(module name without `polarctl.`, file) of the whole package."""
    found = []
    for folder, prefix in (("polarctl", ""), ("stages", "stages."), ("schemas", "schemas.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found.append(
                (name.removesuffix(".__init__").removesuffix("__init__").rstrip("."), path)
            )
    return [(name, path) for name, path in found if name]


SOURCES = sources()
MODULES = {name for name, _ in SOURCES}
# Folders: their `__init__` holds a docstring and nothing else.
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


IMPORTS = {name: own_imports(ast.parse(path.read_bytes())) for name, path in SOURCES}


def room(name: str) -> str:
    """The folder of a module, or what a loose file counts as."""
    top = name.partition(".")[0]
    return LOOSE.get(top, top)


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of functions."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return Strip().visit(tree)


def test_every_folder_stands_on_a_layer():
    assert {room(name) for name in MODULES} == set(LAYER_OF)


def test_only_a_few_files_lie_loose():
    loose = {path.stem for path in (ROOT / "polarctl").glob("*.py")} - {"__init__"}
    assert loose == set(LOOSE)
    assert len(loose) + 1 <= MAX_LOOSE_FILES


@each_source
def test_imports_go_down_the_layers(name, path):
    for used in IMPORTS[name]:
        if (name, used) in UPWARD:
            continue
        if name.startswith("stages."):
            assert not used.startswith("stages."), f"{name} imports {used}: another stage"
        if room(used) != room(name):
            assert LAYER_OF[room(used)] < LAYER_OF[room(name)], f"{name} imports {used}"


def test_no_files_import_each_other_in_a_circle():
    open_, done = set(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in done or (path and (path[-1], name) in UPWARD):
            return
        assert name not in open_, " -> ".join((*path, name))
        open_.add(name)
        for used in sorted(IMPORTS.get(name, ())):
            visit(used, (*path, name))
        open_.discard(name)
        done.add(name)

    for name in sorted(MODULES):
        visit(name, ())


def test_no_two_files_have_one_name():
    """A name that stands in two folders is one that says too little."""
    names = [n.rpartition(".")[2] for n in MODULES - FOLDERS if not n.startswith("stages.")]
    twice = {name for name in names if names.count(name) > 1} - {"__main__"}
    assert not twice - SAME_NAME, twice


# Nouns that their folder makes plain: options of training and of scoring, a pool of policies ...
SAME_NAME = {"config", "options", "pool", "report"}


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
    used = {full.partition(".")[0] for full in imports(tree)}
    for package, where in ONLY_IN.items():
        assert package not in used or name in where


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
                    typed = any(ast.unparse(d) == "overload" for d in inner.decorator_list)
                    told = overrides or typed or ast.get_docstring(inner)
                    assert told, f"{node.name}.{inner.name}"


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
        ".dockerignore",
        ".gitignore",
        "CHANGELOG.md",
        "Dockerfile",
        "LICENSE",
        "Makefile",
        "README.md",
        "docs",
        "mkdocs.yml",
        "polarctl",
        "pyproject.toml",
        "schemas",
        "stages",
        "tests",
    }


def test_no_two_public_classes_have_one_name():
    """`Config` is every stage's; else a name that stands twice says too little."""
    names = [
        node.name
        for name, path in SOURCES
        if not name.startswith("stages.")
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not {name for name in names if names.count(name) > 1}
