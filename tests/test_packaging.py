"""The wheel: one top-level name, everything in it, and nothing of the user's in its way."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
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


# -- what `make dist` and the Dockerfile do --------------------------------------------------------


def dist():
    """`.ci/dist.py`, which is no package."""
    spec = importlib.util.spec_from_file_location("dist", ROOT / ".ci" / "dist.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_links_are_made_absolute_for_pypi():
    text = (
        "[a](docs/b.md#c) ![a\nb](docs/p.svg) [d](https://d.org) [e](#e) "
        "git clone <this repository>"
    )
    assert dist().absolute(text, "https://h.org/o/polarctl", "1.2.3") == (
        "[a](https://h.org/o/polarctl/blob/v1.2.3/docs/b.md#c) "
        "![a\nb](https://h.org/o/polarctl/raw/v1.2.3/docs/p.svg) "
        "[d](https://d.org) [e](#e) git clone https://h.org/o/polarctl"
    )


@pytest.mark.slow
def test_a_distribution_works_in_a_clean_environment(tmp_path):
    """sdist, from it the wheel, from it an environment in which only the dependencies are ours."""
    folders = {name: tmp_path / name for name in ("tree", "dist", "elsewhere")}
    for folder in folders.values():
        folder.mkdir()
    dist().prepare(folders["tree"], "https://h.org/o/polarctl")

    def call(*words, cwd):
        result = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    build = (
        "import setuptools.build_meta as b, sys as s; getattr(b, f'build_{s.argv[1]}')(s.argv[2])"
    )
    call(sys.executable, "-c", build, "sdist", str(folders["dist"]), cwd=folders["tree"])
    (source,) = folders["dist"].glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    call(sys.executable, "-c", build, "wheel", str(folders["dist"]), cwd=unpacked)
    (built,) = folders["dist"].glob("*.whl")
    metadata = next(
        zipfile.ZipFile(built).read(name).decode()
        for name in zipfile.ZipFile(built).namelist()
        if name.endswith("METADATA")
    )
    assert "Project-URL: Source, https://h.org/o/polarctl\n" in metadata
    links = re.findall(r"\]\(([^)\s]+)\)", metadata)
    assert len(links) > 10
    assert not [link for link in links if not re.match(r"https://|#", link)]

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(built).extractall(packages)  # as an installer without `data` to place
    # The dependencies; not the editable polarctl, which is an import hook and no folder.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(ours))
    said = call(python, "-c", "import polarctl; print(polarctl.__file__)", cwd=folders["elsewhere"])
    assert said.startswith(str(packages))
    program = [python, "-c", "import sys; from polarctl.cli import main; sys.exit(main())"]
    assert "polarctl" in call(*program, "--version", cwd=folders["elsewhere"])
    (folders["elsewhere"] / "p.jsonl").write_text('{"prompt": "a"}\n')
    call(*program, "validate", "p.jsonl", "--kind", "prompt", cwd=folders["elsewhere"])


def test_the_image_is_built_from_files_that_docker_may_see():
    """Each file that the Dockerfile copies is there, and .dockerignore lets it pass."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M)
        for name in line.split()[:-1]
    ]
    assert set(copied) == set(PARTS)  # what the wheel of these tests is built from
    assert all((ROOT / name).exists() and f"!{name}" in allowed for name in copied)
    stages = re.findall(r"^FROM .* AS (\w+)$", text, re.M)
    assert stages == ["wheel", "base", "cpu", "cuda"]
    for stage in ("cpu", "cuda"):  # nothing runs as root
        body = text.partition(f" AS {stage}\n")[2].partition("\nFROM ")[0]
        assert body.rstrip().splitlines()[-1] == "USER polar" or "\nUSER polar\n" in body
