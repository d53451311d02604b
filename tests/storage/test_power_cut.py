"""The power goes out: what was written and not synced is lost, though its name may be there.

A file has after the cut the bytes that it had at its last fsync, or none. Renames and removals are
on the disk at once, which is the hard case: a name without the bytes behind it.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from faults import count, draws

from polarctl import cli
from polarctl.config import Common
from polarctl.storage import checkpoint, manifest, read, write
from polarctl.storage.windows import map_windows, reader_of
from polarctl.storage.write import Output


class Disk:
    """What would be left of a folder if the power went out, at each fsync, rename and removal."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.synced, self.cuts = Path(folder), {}, []
        for name in ("fsync", "replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, real):
        def operation(*arguments, **options):
            self.cuts.append(self.left())
            gone = arguments[1] if name in ("replace", "rename") else arguments[0]
            before = None if name == "fsync" else _inode(gone)
            result = real(*arguments, **options)
            if name == "fsync":
                here = Path(f"/proc/self/fd/{arguments[0]}")
                if here.is_file():
                    self.synced[here.stat().st_ino] = here.read_bytes()
            else:
                self.synced.pop(before, None)  # the system may give the number to another file
            self.cuts.append(self.left())
            return result

        return operation

    def left(self):
        """{name: bytes} of every file after a cut now."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.folder)): self.synced.get(_inode(path), b"") for path in files
        }


def _inode(path):
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def put(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = ("{broken" if n % 5 == 4 else json.dumps({"n": n, "text": "é" * 9}) for n in range(24))
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def copy(source, target, **options):
    """Copy rows in units of 4; the broken ones are set aside."""
    rejects = str(target.parent / "bad")
    config = Common(input=(str(source),), output=str(target), rejects=rejects, **options)
    with Output("demo", config, read.sizes(config.input)) as out:
        reader = reader_of(config, list(config.input), None, on_bad=out.reject)
        map_windows(out, reader, lambda window: window, size=4, title="demo")


@pytest.mark.parametrize(
    ("name", "old"),
    [("out.jsonl", False), ("out.jsonl", True), ("out.jsonl.gz", False)]
    + [pytest.param("out.jsonl.gz", True, marks=pytest.mark.slow)],
)
def test_the_same_command_goes_on_after_a_cut_at_any_moment(
    name, old, source, tmp_path, monkeypatch
):
    """With an old output that is being replaced, too: the old one or the new, never a part."""
    monkeypatch.setattr(write, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(manifest, "environment", dict)
    folder, options = tmp_path / "run", {"force": True, "seed": 1} if old else {}
    folder.mkdir()
    if old:
        copy(source, folder / name, limit=3)
    before = (folder / name).read_bytes() if old else None
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        for path in folder.iterdir():  # the old files have been there for long
            disk.synced[path.stat().st_ino] = path.read_bytes()
        copy(source, folder / name, **options)
        disk.cuts.append(disk.left())
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(disk.cuts) > 30
    for number, files in enumerate(disk.cuts):
        shutil.rmtree(folder)  # a journal names files by their whole paths
        put(folder, files)
        left = files.get(name, b"")
        assert whole[name].startswith(left) or left == before, number
        copy(source, folder / name, **options)
        assert {path.name for path in folder.iterdir()} == whole.keys(), number
        for file in (name, "bad"):
            assert (folder / file).read_bytes() == whole[file], number


@pytest.mark.parametrize("again", [{}, {"resume": False}])
def test_a_second_cut_while_the_first_is_made_good_is_none_the_worse(
    again, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(manifest, "environment", dict)
    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patch:
        first = Disk(folder, patch)
        copy(source, folder / "out.jsonl")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    moments = draws("second cuts").sample(range(len(first.cuts)), count(3, 12))
    for files in [first.cuts[moment] for moment in moments]:
        shutil.rmtree(folder)
        put(folder, files)
        with monkeypatch.context() as patch:
            second = Disk(folder, patch)
            for path in folder.iterdir():
                second.synced[path.stat().st_ino] = path.read_bytes()
            copy(source, folder / "out.jsonl", **again)
        for left in second.cuts:
            shutil.rmtree(folder)
            put(folder, left)
            copy(source, folder / "out.jsonl")
            assert {path.name for path in folder.iterdir()} == whole.keys()
            for file in ("out.jsonl", "bad"):
                assert (folder / file).read_bytes() == whole[file]


def test_a_checkpoint_that_is_marked_is_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "run", patch)
        for step in (1, 2, 3):
            target = tmp_path / "run" / f"step-{step:08d}"
            target.mkdir(parents=True)
            (target / "model.safetensors").write_bytes(bytes([step]) * 5000)
            checkpoint.commit(target, step, {"seed": 1})
    reached = []
    for number, files in enumerate(disk.cuts):
        after = tmp_path / f"cut{number}"
        put(after, files)
        found = checkpoint.newest(after)
        reached.append(found[1]["step"] if found else 0)
        if found:
            assert (found[0] / "model.safetensors").read_bytes() == bytes([found[1]["step"]]) * 5000
    assert reached == sorted(reached) and set(reached) == {0, 1, 2, 3}


# -- runs that have ended well ---------------------------------------------------------------------


TRIPLES = [
    {
        "prompt": f"q{n}",
        "reference": "yes",
        "chosen": "yes",
        "rejected": "no",
        "rewards": [1.0, 0.5],
    }
    for n in range(12)
]
SAMPLES = [
    {"prompt": "q", "output": f"{policy} {n}", "policy": policy} for policy in "ab" for n in (1, 2)
]
TRAIN = "-m LM --device cpu --lr 1e-3 --batch-size 4 --max-steps 3 --save-steps 2"
COMMANDS = {
    "convert": "convert triples --to candidates --rejects bad -o OUT",
    "parquet": "convert triples --to verl -o OUT.parquet",
    "pair": "pair samples -o OUT",
    "eval": "eval triples -o OUT --report report",
    "score": "score triples -m RM --device cpu -o OUT.gz",
    "sample": "sample triples -m LM --device cpu --samples 1 --max-new-tokens 2 -o OUT.zst",
    "pretrain": f"pretrain triples {TRAIN} --val-fraction 0.3 --val-steps 1 -o OUT",
    "lora": f"pretrain triples {TRAIN} --lora-rank 2 -o OUT",
}


SLOW = {name: pytest.mark.slow for name in ("parquet", "eval", "sample", "lora")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in COMMANDS]
)
def test_what_a_run_has_left_when_it_ends_survives_a_cut(
    name, tiny_lm, tiny_rm, tmp_path, monkeypatch
):
    for file, rows in (("triples", TRIPLES), ("samples", SAMPLES)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{file}.jsonl").write_text(lines + "{\n" * (name == "convert"))
    folder = tmp_path / "run"
    folder.mkdir()
    places = {"LM": tiny_lm, "RM": tiny_rm, "report": folder / "report", "bad": folder / "bad"}
    places |= {file: tmp_path / f"{file}.jsonl" for file in ("triples", "samples")}
    words = [str(places.get(word, word)) for word in COMMANDS[name].split()]
    words = [word.replace("OUT", f"{folder}/out") for word in words]
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        assert cli.run([*words, "-q"]) == 0
        after = disk.left()
    lost = {file for file in after if after[file] != (folder / file).read_bytes()}
    assert not lost and after
    if name == "pretrain":  # while it ran, too: a checkpoint says that there is a best model
        best = [data for cut in disk.cuts for file, data in cut.items() if "out/best/" in file]
        assert best and all(best)
