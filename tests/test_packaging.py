"""The wheel: one top-level name, everything in it, and nothing of the user's in its way."""

import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ["polarctl", "stages", "schemas", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, without network."""
    copy = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / part)
    program = "import setuptools.build_meta as build; build.build_wheel('dist')"
    (copy / "dist").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def test_the_wheels_only_top_level_name_is_polarctl(wheel):
    top = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert len(top) == 2
    assert {name for name in top if not name.endswith(".dist-info")} == {"polarctl"}


def test_the_wheel_holds_every_source_file_schema_and_template(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("polarctl/")}
    expected = set()
    for folder, target in (("polarctl", ""), ("stages", "stages/"), ("schemas", "schemas/")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"polarctl/{target}{path.relative_to(ROOT / folder)}")
    assert held == expected


def test_the_wheel_says_its_license_and_program(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(info).decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    assert info.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    entry = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "polarctl = polarctl.cli:main" in entry


def test_a_users_own_folders_are_not_taken_for_ours(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    for name in ("schemas", "stages", "tests"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise SystemExit('not ours')")
    program = """
        import importlib, sys
        sys.path.insert(1, sys.argv[1])
        from polarctl import cli
        modules = [importlib.import_module(f"polarctl.stages.{stage}") for stage in cli.STAGES]
        modules += [importlib.import_module("polarctl.schemas"), cli]
        for module in modules:
            assert module.__file__.startswith(sys.argv[1]), module.__file__
        assert "schemas" not in sys.modules and "stages" not in sys.modules
        sys.exit(cli.run(["schema", "prompt"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(site)],
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert '"$id": "prompt.schema.json"' in result.stdout


def test_the_version_is_written_once_in_each_place():
    import polarctl

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{polarctl.__version__}"\n' in text
