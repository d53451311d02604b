"""Other programs at work on the files of a run: it never ends as if all were well.

The stage of these tests copies rows; every fifth row of the input is broken and set aside.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from polarctl import cli
from polarctl.config import Common
from polarctl.errors import PolarctlError, UsageError
from polarctl.storage import manifest, read
from polarctl.storage.windows import map_windows, reader_of
from polarctl.storage.write import Output


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without fsync: the machine does not crash here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(manifest, "environment", dict)


def make_input(folder: Path) -> Path:
    path = folder / "in.jsonl"
    rows = ("{broken" if n % 5 == 4 else json.dumps({"n": n, "text": "é" * 9}) for n in range(24))
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def run(source: Path, target: Path, harm=None, at: int = 3, **options) -> None:
    """Copy in units of 4 rows; `harm` is done to the file while unit `at` is in hand."""
    config = Common(
        input=(str(source),), output=str(target), rejects=str(target.parent / "bad"), **options
    )
    with Output("demo", config, read.sizes(config.input)) as out:
        reader = reader_of(config, list(config.input), None, on_bad=out.reject)

        def work(window):
            if harm is not None and out.units == at:
                harm()
            yield from window

        map_windows(out, reader, work, size=4, title="demo")


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replace(path: Path) -> None:
    """As editors do: another file of the same bytes and name."""
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def cut(path: Path) -> None:
    os.truncate(path, 10)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def add(path: Path) -> None:
    with open(path, "ab") as stream:
        stream.write(b"mine\n")


def change(path: Path) -> None:
    """One byte, and the times as they were."""
    before = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(8)
        stream.write(b"7")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def lose_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


HARMS = [remove, rename, replace, cut, empty, add, change, lose_folder, move_folder]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    ("name", "at"),
    [("out.jsonl", 3), ("out.jsonl", 5), ("bad", 3), ("out.jsonl.gz", 5)],  # 5: the last unit
)
def test_harm_to_a_file_ends_the_run_and_the_same_command_mends_it(
    tmp_path, monkeypatch, harm, name, at
):
    monkeypatch.setattr("polarctl.storage.write._BLOCK_BYTES", 1)  # small blocks, too, are written
    whole, folder, source = tmp_path / "whole", tmp_path / "run", make_input(tmp_path)
    whole.mkdir(), folder.mkdir()
    target = folder / ("out.jsonl" if name == "bad" else name)
    run(source, whole / target.name)
    with pytest.raises(PolarctlError, match="by another program during this run") as caught:
        run(source, target, lambda: harm(folder / name), at)
    assert caught.value.exit_status == 1
    assert str(folder / name) in str(caught.value) or harm in (lose_folder, move_folder)
    assert not (folder / f"{target.name}.manifest.json").exists()
    folder.mkdir(exist_ok=True)
    try:
        run(source, target)
    except UsageError:  # what it holds now could be somebody else's: it is kept
        assert harm in (cut, empty, change, replace) and (folder / name).exists()
        return
    for file in (target.name, "bad"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("harm", [remove, cut, add, change])
def test_harm_to_what_is_to_replace_an_old_file_leaves_the_old_one(tmp_path, harm):
    source, target = make_input(tmp_path), tmp_path / "out.jsonl"
    run(source, target)
    before = target.read_bytes()
    hidden = tmp_path / ".polarctl-next.out.jsonl"
    with pytest.raises(PolarctlError, match="out.jsonl: was .* by another program"):
        run(source, target, lambda: harm(hidden), force=True)
    assert target.read_bytes() == before


def test_a_folder_that_goes_away_is_one_line_in_the_program_too(tmp_path):
    """A real run whose input is a pipe, so that it waits while its folder is removed."""
    folder = tmp_path / "run"
    folder.mkdir()
    program = [str(Path(sys.executable).parent / "polarctl"), "convert", "-", "-o"]
    command = [*program, str(folder / "out.jsonl"), "--to", "native"]
    with subprocess.Popen(command, stdin=-1, stderr=-1, text=True) as running:
        row = json.dumps({"prompt": "a", "output": "b"}) + "\n"
        running.stdin.write(row * 2000)
        running.stdin.flush()
        while not (folder / "out.jsonl").exists():
            assert running.poll() is None
        shutil.rmtree(folder)
        _, err = running.communicate(row)
    assert running.returncode == 1, err
    assert "out.jsonl: was moved, removed or replaced by another program" in err
    assert "Traceback" not in err


def test_what_goes_away_at_any_other_time_is_one_line(tmp_path, monkeypatch, capfd):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "output": "b"}\n')

    def gone(path):
        raise FileNotFoundError(2, "No such file or directory", f"{tmp_path}/x")

    monkeypatch.setattr("polarctl.storage.atomic.sync_folder", gone)
    command = ["convert", str(path), "--to", "native", "-o", str(tmp_path / "out.jsonl")]
    assert cli.run(command) == 1
    assert f"polarctl: {tmp_path}/x: No such file or directory\nhint: " in capfd.readouterr().err
