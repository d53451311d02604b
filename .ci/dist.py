"""Build sdist and wheel with a README that also reads right on PyPI: `make dist REPOSITORY=URL`.

The README's links are relative, as they have to be in a clone and on GitHub. PyPI shows the same
text elsewhere, so in the distribution they lead to the files of this version in the repository.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What a distribution is built from.
PARTS = ("polarctl", "stages", "schemas", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")

LINK = re.compile(r"(?P<image>!?)(?P<text>\[[^]]*\])\((?P<target>(?![a-z]+:|#)[^)\s]+)\)")


def absolute(text: str, repository: str, version: str) -> str:
    """Markdown whose relative links lead to the files of a version in a repository.

    Args:
        text: Markdown of a file at the top of the repository.
        repository: Address of the repository, as `https://github.com/OWNER/polarctl`.
        version: The version, without the `v` of its tag.
    """

    def replace(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        address = f"{repository}/{kind}/v{version}/{match['target']}"
        return f"{match['image']}{match['text']}({address})"

    return LINK.sub(replace, text).replace("<this repository>", repository)


def prepare(folder: Path, repository: str) -> str:
    """Copy what a distribution is built from, with the address of the repository in it.

    Args:
        folder: An empty folder.
        repository: As for `absolute`.

    Returns:
        The version.
    """
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder / part)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    version = re.findall(r'^version = "(.*)"$', text, re.M)[0]
    changes = f"{repository}/blob/v{version}/CHANGELOG.md"
    urls = f'[project.urls]\nSource = "{repository}"\nChangelog = "{changes}"\n'
    project.write_text(text.replace("[project.urls]\n", urls), encoding="utf-8")
    readme = folder / "README.md"
    readme.write_text(
        absolute(readme.read_text(encoding="utf-8"), repository, version), encoding="utf-8"
    )
    return version


def main() -> None:
    """Build into dist/, and have twine check both files."""
    if len(sys.argv) != 2 or not re.fullmatch(r"https://\S+[^/\s]", sys.argv[1]):
        sys.exit("usage: make dist REPOSITORY=https://github.com/OWNER/polarctl")
    target = ROOT / "dist"
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), sys.argv[1])
        subprocess.run([sys.executable, "-m", "build", "--outdir", target, folder], check=True)
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *sorted(target.iterdir())], check=True
    )


if __name__ == "__main__":
    main()
