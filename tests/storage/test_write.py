"""Crash-safe output: whatever happens to FILE and its journal, the end is the same or is refused.

The stage of these tests numbers rows; every third row of the input is broken and set aside.
"""

import gzip
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import zstandard

from polarctl.config import Common
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.storage import manifest, read, write
from polarctl.storage.windows import map_windows, reader_of
from polarctl.storage.write import Output

ROWS = 22
WINDOW_ROWS = 4  # 6 units of work, the last of 2 rows


class Stop(Exception):
    """Stands for whatever ends a run in the middle."""


def make_input(folder: Path, rows: int = ROWS) -> Path:
    path = folder / "in.jsonl"
    lines = [
        "{broken" if number % 3 == 2 else json.dumps({"n": number, "text": "é" * 3})
        for number in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(source: Path, target: Path, *, stop_at: int | None = None, **options: object) -> Output:
    """The stage: writes `{n, text, twice}`; `stop_at` ends it in the middle of that unit."""
    values = {"rejects": str(target.parent / "bad.jsonl"), **options}
    config = Common(input=(str(source),), output=str(target), **values)  # type: ignore[arg-type]
    with Output("demo", config, read.sizes(config.input)) as out:

        def work(window):
            for record in window:
                yield {**record, "twice": 2 * record["n"]}
            if stop_at is not None and out.units == stop_at:
                raise Stop

        map_windows(
            out,
            reader_of(config, list(config.input), None, on_bad=out.reject),
            work,
            size=WINDOW_ROWS,
            title="demo",
        )
    return out


@pytest.fixture
def quick(monkeypatch):
    """Without fsync: these tests cut files by hand, the machine does not crash."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(manifest, "environment", dict)


@pytest.fixture
def whole(tmp_path):
    """Input, and the bytes of an uninterrupted run: (input, output, rejects)."""
    folder = tmp_path / "whole"
    folder.mkdir()
    source = make_input(tmp_path)
    run(source, folder / "out.jsonl")
    return source, (folder / "out.jsonl").read_bytes(), (folder / "bad.jsonl").read_bytes()


def interrupted(folder: Path, source: Path, stop_at: int = 4) -> dict[str, bytes]:
    """The files that a run leaves when it stops in the middle of a unit."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(Stop):
        run(source, folder / "out.jsonl", stop_at=stop_at)
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def first_unit(files: dict[str, bytes]) -> dict[str, int]:
    """Bytes of output and rejects of the first unit, as the journal says."""
    entry = json.loads(files["out.jsonl.journal"].splitlines()[1])
    return {"out.jsonl": entry["file"][0], "bad.jsonl": entry["rejects"][0]}


def resumes_or_refuses(source: Path, folder: Path) -> bool:
    """Run; True when it ran, False when it refused and left every byte as it was."""
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    try:
        run(source, folder / "out.jsonl")
    except UsageError as error:
        assert "is not replaced" in str(error) or "bad.jsonl: exists" in str(error)
        after = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
        for name in ("out.jsonl", "bad.jsonl"):
            assert after.get(name) == before.get(name)
        return False
    return True


def test_a_whole_run_leaves_output_rejects_and_manifest_and_no_journal(whole, tmp_path):
    source, data, rejects = whole
    rows = [json.loads(line) for line in data.splitlines()]
    assert [row["n"] for row in rows] == [n for n in range(ROWS) if n % 3 != 2]
    assert rows[1] == {"n": 1, "text": "ééé", "twice": 2}
    assert [json.loads(line)["where"] for line in rejects.splitlines()] == [
        f"{source}:{n + 1}" for n in range(ROWS) if n % 3 == 2
    ]
    assert sorted(os.listdir(tmp_path / "whole")) == [
        "bad.jsonl",
        "out.jsonl",
        "out.jsonl.manifest.json",
    ]
    record = json.loads((tmp_path / "whole" / "out.jsonl.manifest.json").read_bytes())
    assert record["counts"] == {"records": 15, "rejects": 7}  # 22 rows, 7 with n % 3 == 2
    assert record["outputs"]["out.jsonl"]["bytes"] == len(data)
    assert record["inputs"][0]["bytes"] == source.stat().st_size
    assert len(record["inputs"][0]["sha256"]) == 64


@pytest.mark.parametrize("name", ["out.jsonl", "bad.jsonl", "out.jsonl.journal"])
def test_a_file_cut_at_any_byte_resumes_to_the_same_bytes(quick, whole, tmp_path, name):
    source, data, rejects = whole
    folder = tmp_path / "cut"
    files = interrupted(folder, source, stop_at=2)
    refused = 0
    for size in range(len(files[name]) + 1):
        restore(folder, {**files, name: files[name][:size]})
        if not resumes_or_refuses(source, folder):
            refused += 1
            continue
        assert (folder / "out.jsonl").read_bytes() == data, (name, size)
        assert (folder / "bad.jsonl").read_bytes() == rejects, (name, size)
        assert not (folder / "out.jsonl.journal").exists()
    # What no line of the journal vouches for could be anybody's: it is not cut.
    known = sum(map(len, files["out.jsonl.journal"].splitlines(keepends=True)[:2]))
    wanted = {**first_unit(files), "out.jsonl.journal": known}[name]
    assert refused == wanted - (name != "out.jsonl.journal")  # an empty file is nobody's


@pytest.mark.parametrize("garbage", [b"\0" * 50, b'{"n": 1', b"\xff\xfe", b"{}\n", b"7\n", b"\n"])
@pytest.mark.parametrize("name", ["out.jsonl", "bad.jsonl", "out.jsonl.journal"])
def test_garbage_at_the_end_is_cut_off(quick, whole, tmp_path, name, garbage):
    source, data, rejects = whole
    folder = tmp_path / "cut"
    files = interrupted(folder, source)
    restore(folder, {**files, name: files[name] + garbage})
    out = run(source, folder / "out.jsonl")
    assert out.units == 6
    assert (folder / "out.jsonl").read_bytes() == data
    assert (folder / "bad.jsonl").read_bytes() == rejects


def test_a_changed_byte_in_the_middle_is_found_and_done_again(quick, whole, tmp_path):
    source, data, rejects = whole
    folder = tmp_path / "cut"
    files = interrupted(folder, source)
    for position in range(0, len(files["out.jsonl"]), 7):
        broken = bytearray(files["out.jsonl"])
        broken[position] ^= 1
        restore(folder, {**files, "out.jsonl": bytes(broken)})
        ran = resumes_or_refuses(source, folder)
        assert ran == (position >= first_unit(files)["out.jsonl"])
        if not ran:
            continue
        assert (folder / "out.jsonl").read_bytes() == data
        assert (folder / "bad.jsonl").read_bytes() == rejects


def test_a_resume_passes_over_what_is_done(whole, tmp_path):
    source, data, _ = whole
    folder = tmp_path / "cut"
    interrupted(folder, source, stop_at=4)
    seen = []
    values = {"rejects": str(folder / "bad.jsonl")}
    config = Common(input=(str(source),), output=str(folder / "out.jsonl"), **values)
    with Output("demo", config, read.sizes(config.input)) as out:
        assert out.done == 4
        reader = reader_of(config, list(config.input), None, on_bad=out.reject)
        for window in reader.windows(WINDOW_ROWS, done=out.done, digest=out.digest):
            seen.append(window.index)
            for record in window.records:
                out.write({**record, "twice": 2 * record["n"]})
            out.commit(out.units + 1, window.digest)
    assert seen == [4, 5]
    assert (folder / "out.jsonl").read_bytes() == data
    record = json.loads((folder / "out.jsonl.manifest.json").read_bytes())
    assert record["counts"] == {"records": 15, "rejects": 7}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_output_resumes_to_the_same_bytes(quick, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(write, "_BLOCK_BYTES", 150)  # a block every second unit or so
    source = make_input(tmp_path)
    target = tmp_path / "whole" / f"out.jsonl{suffix}"
    target.parent.mkdir()
    run(source, target)
    data = target.read_bytes()
    plain = (
        gzip.decompress(data)
        if suffix == ".gz"
        else zstandard.ZstdDecompressor()
        .stream_reader(data, read_across_frames=True, closefd=False)
        .read()
    )
    assert len(plain.splitlines()) == 15
    assert [r["n"] for r in read.Reader([str(target)], None)][:3] == [0, 1, 3]
    folder = tmp_path / "cut"
    folder.mkdir()
    torn = folder / target.name
    for stop_at in range(6):
        with pytest.raises(Stop):
            run(source, torn, stop_at=stop_at)
        if torn.exists():  # not when nothing at all was finished
            left = torn.read_bytes()
            assert data.startswith(left)
            torn.write_bytes(left + b"\x1f\x8b torn")
    run(source, torn)
    assert torn.read_bytes() == data


KILL_LOOP = """
    import os, random, signal, sys, time
    from pathlib import Path
    from polarctl import console
    from polarctl.config import Common
    from polarctl.storage import read, write
    from polarctl.storage.windows import map_windows, reader_of

    folder, kills, suffix = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    write._BLOCK_BYTES = 2000
    console.configure(quiet=True, verbose=False, color=False, json_lines=False)

    def run(target, pause_s):
        config = Common(input=(str(folder / "in.jsonl"),), output=str(target),
                        rejects=str(target) + ".bad", quiet=True)
        def work(window):
            time.sleep(pause_s)
            return ({**record, "twice": 2 * record["n"]} for record in window)
        with write.Output("demo", config, read.sizes(config.input)) as out:
            map_windows(out, reader_of(config, list(config.input), None, on_bad=out.reject), work,
                        size=5, title="demo")

    whole = folder / f"whole.jsonl{suffix}"
    run(whole, 0)
    expected = whole.read_bytes(), Path(str(whole) + ".bad").read_bytes()
    chance, done, finished = random.Random(20), 0, 0
    while done < kills:
        target = folder / f"out{finished}.jsonl{suffix}"
        while True:
            child = os.fork()
            if child == 0:
                run(target, 0.001)
                os._exit(0)
            time.sleep(chance.uniform(0, 0.04))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            left = target.read_bytes() if target.exists() else b""
            if status == 0 or Path(str(target) + ".manifest.json").exists():
                assert left == expected[0], "a finished file differs"
                break
            done += 1
            assert expected[0].startswith(left), "a torn file is no prefix"
        run(target, 0)
        assert target.read_bytes() == expected[0]
        assert Path(str(target) + ".bad").read_bytes() == expected[1]
        finished += 1
    print(done, finished)
"""


@pytest.mark.parametrize(("suffix", "kills"), [("", 25), (".gz", 15), (".zst", 15)])
def test_sigkill_at_random_times_changes_nothing(tmp_path, suffix, kills):
    make_input(tmp_path, rows=200)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL_LOOP), str(tmp_path), str(kills), suffix],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    done, finished = map(int, result.stdout.split())
    assert done >= kills and finished >= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [({"seed": 7}, "seed"), ({"limit": 20}, "limit"), ({"rejects": "other.jsonl"}, "rejects")],
)
def test_a_resume_with_other_options_is_refused_and_touches_nothing(
    whole, tmp_path, options, named, monkeypatch
):
    source, *_ = whole
    folder = tmp_path / "cut"
    files = interrupted(folder, source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"cannot resume .*`{named}` was .* and is now"):
        run(source, folder / "out.jsonl", **options)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files
    assert not (tmp_path / "other.jsonl").exists()


def test_a_resume_with_another_version_of_the_records_is_refused(whole, tmp_path, monkeypatch):
    source, *_ = whole
    folder = tmp_path / "cut"
    files = interrupted(folder, source)
    monkeypatch.setattr("polarctl.storage.fingerprint.SCHEMA_VERSION", 2)
    with pytest.raises(UsageError, match="`schema_version` was 1 and is now 2"):
        run(source, folder / "out.jsonl")
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files


def test_a_resume_with_another_input_is_refused(whole, tmp_path):
    source, *_ = whole
    folder = tmp_path / "cut"
    interrupted(folder, source)
    before = (folder / "out.jsonl").read_bytes()
    text = source.read_text(encoding="utf-8")
    source.write_text(text + '{"n": 99}\n', encoding="utf-8")  # another size: seen at once
    with pytest.raises(UsageError, match="`input_bytes` was"):
        run(source, folder / "out.jsonl")
    source.write_text(text.replace('"n": 1,', '"n": 7,'), encoding="utf-8")  # same size
    with pytest.raises(UsageError, match="the input is not the one"):
        run(source, folder / "out.jsonl")
    assert (folder / "out.jsonl").read_bytes() == before


def test_a_run_that_finished_nothing_leaves_nothing(whole, tmp_path):
    source, data, _ = whole
    folder = tmp_path / "cut"
    assert interrupted(folder, source, stop_at=0) == {}
    run(source, folder / "out.jsonl", seed=9)  # so other options are no obstacle
    assert (folder / "out.jsonl").read_bytes() == data


def test_no_resume_starts_again(quick, whole, tmp_path):
    source, data, rejects = whole
    folder = tmp_path / "cut"
    interrupted(folder, source)
    run(source, folder / "out.jsonl", resume=False)
    assert (folder / "out.jsonl").read_bytes() == data
    assert (folder / "bad.jsonl").read_bytes() == rejects


def test_a_complete_output_is_left_alone(whole, tmp_path):
    source, data, _ = whole
    target = tmp_path / "whole" / "out.jsonl"
    before = {p.name: p.stat().st_mtime_ns for p in target.parent.iterdir()}
    os.utime(source)  # only touched: the bytes are the same
    assert run(source, target).complete
    assert {p.name: p.stat().st_mtime_ns for p in target.parent.iterdir()} == before


def test_a_complete_output_of_something_else_is_refused(whole, tmp_path):
    source, data, _ = whole
    target = tmp_path / "whole" / "out.jsonl"
    with pytest.raises(UsageError, match="complete already, `seed` was 0 and is now 3"):
        run(source, target, seed=3)
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace('"n": 1,', '"n": 7,'), encoding="utf-8")
    with pytest.raises(UsageError, match="has changed since"):
        run(source, target)
    source.write_text(text, encoding="utf-8")
    target.write_bytes(data[:-1])
    with pytest.raises(UsageError, match="its size is not the one in its manifest"):
        run(source, target)
    target.with_name("out.jsonl.manifest.json").write_text("{")
    with pytest.raises(UsageError, match="is not its manifest"):
        run(source, target)
    assert target.read_bytes() == data[:-1]


def test_somebody_elses_file_is_never_replaced(whole, tmp_path):
    source, data, rejects = whole
    target = tmp_path / "mine.jsonl"
    target.write_text("precious\n")
    with pytest.raises(UsageError, match="exists and is not an interrupted output") as caught:
        run(source, target)
    assert caught.value.hint == "name another output"
    with pytest.raises(UsageError, match="mine.jsonl: is not replaced: no .* says that polarctl"):
        run(source, target, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "mine.jsonl", "whole"}
    assert target.read_text() == "precious\n"


@pytest.mark.parametrize("target", ["out.jsonl", "-"])
def test_somebody_elses_rejects_file_is_never_replaced(whole, tmp_path, target, capfd):
    source, *_ = whole
    mine = tmp_path / "bad.jsonl"
    mine.write_text("precious\n")
    where = tmp_path / target if target != "-" else Path("-")
    for force in (False, True):
        with pytest.raises(UsageError, match="bad.jsonl: is not replaced: it holds no rejected"):
            run(source, where, rejects=str(mine), force=force)
    assert mine.read_text() == "precious\n"


def test_force_replaces_a_complete_output(whole, tmp_path):
    source, data, rejects = whole
    target = tmp_path / "whole" / "out.jsonl"
    run(source, target, seed=3, force=True)
    assert target.read_bytes() == data
    assert json.loads(target.with_name("out.jsonl.manifest.json").read_bytes())["config"]["seed"]
    assert (tmp_path / "whole" / "bad.jsonl").read_bytes() == rejects


def test_a_stale_manifest_does_not_call_an_unfinished_output_complete(whole, tmp_path):
    source, *_ = whole
    target = tmp_path / "whole" / "out.jsonl"
    target.unlink()
    (tmp_path / "whole" / "bad.jsonl").unlink()
    with pytest.raises(Stop):
        run(source, target, stop_at=2)
    assert not target.with_name("out.jsonl.manifest.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_second_writer_is_refused_at_once(whole, tmp_path, force):
    source, *_ = whole
    target = tmp_path / "out.jsonl"
    config = Common(input=(str(source),), output=str(target))
    with Output("demo", config, read.sizes(config.input)) as first:
        first.write({"n": 1})
        first.commit(1)
        start = time.monotonic()
        with pytest.raises(UsageError, match="another process is writing it"):
            run(source, target, rejects=None, force=force)
        assert time.monotonic() - start < 1
        assert target.read_bytes() == b'{"n":1}\n'


def test_output_that_is_the_input_is_refused(whole, tmp_path):
    source, *_ = whole
    before = source.read_bytes()
    (tmp_path / "symbolic.jsonl").symlink_to(source)
    os.link(source, tmp_path / "hard.jsonl")
    aside = tmp_path / "whole" / ".." / "in.jsonl"
    for same in (source, tmp_path / "symbolic.jsonl", tmp_path / "hard.jsonl", aside):
        for options in ({}, {"force": True}):
            with pytest.raises(UsageError, match="is both input and output"):
                run(source, same, **options)
    with pytest.raises(UsageError, match="is both input and output"):
        run(source, tmp_path / "new.jsonl", rejects=str(source))
    assert source.read_bytes() == before


def test_folders_of_outputs_are_made_and_an_empty_one_does_not_stay(whole, tmp_path):
    source, wanted, *_ = whole
    target = tmp_path / "a" / "b" / "out.jsonl"
    more = {"rejects": str(tmp_path / "c/r.jsonl"), "manifest": str(tmp_path / "d/m.json")}
    run(source, target, **more)
    assert (
        target.exists() and (tmp_path / "c/r.jsonl").exists() and (tmp_path / "d/m.json").exists()
    )
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"{\n")
    with pytest.raises(RecordError):
        run(bad, tmp_path / "e" / "f" / "out.jsonl", rejects=None)
    assert not (tmp_path / "e").exists()


def test_one_path_for_two_outputs_is_refused(whole, tmp_path):
    source, *_ = whole
    target = tmp_path / "out.jsonl"
    with pytest.raises(UsageError, match="is named for two outputs"):
        run(source, target, rejects=str(target))
    with pytest.raises(UsageError, match="is named for two outputs"):
        run(source, target, manifest=str(tmp_path / "bad.jsonl"))


def test_an_output_that_cannot_be_written_is_a_usage_error(whole, tmp_path):
    source, *_ = whole
    with pytest.raises(UsageError, match="is not a folder"):
        run(source, source / "out.jsonl", rejects=None)  # under a file
    with pytest.raises(UsageError, match="is not a regular file"):
        run(source, tmp_path / "whole", rejects=None)
    with pytest.raises(UsageError, match="is not a regular file"):
        run(source, Path("/dev/null"), rejects=None)
    with pytest.raises(UsageError, match="cannot be written: File name too long"):
        run(source, tmp_path / ("x" * 250), rejects=None)


def test_a_full_disk_keeps_the_prefix_and_resumes(tmp_path):
    make_input(tmp_path, rows=2000)
    program = textwrap.dedent(KILL_LOOP).partition("whole = ")[0]
    program += "\nrun(folder / 'out.jsonl', 0)\n"
    arguments = [sys.executable, "-c", program, str(tmp_path), "0", ""]
    limit = 20_000

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=small_disk)
    assert "File too large" in full.stderr
    left = (tmp_path / "out.jsonl").read_bytes()
    assert 0 < len(left) <= limit
    assert not (tmp_path / "out.jsonl.manifest.json").exists()
    assert subprocess.run(arguments).returncode == 0
    data = (tmp_path / "out.jsonl").read_bytes()
    assert data.startswith(left[: left.rindex(b"\n")])
    assert [json.loads(line)["n"] for line in data.splitlines()] == [
        n for n in range(2000) if n % 3 != 2
    ]


def test_without_a_rejects_file_a_rejected_record_is_an_error(tmp_path):
    config = Common(input=("-",), output=str(tmp_path / "out.jsonl"))
    with pytest.raises(RecordError, match="in.jsonl:3: too long"):
        with Output("demo", config, []) as out:
            out.reject("in.jsonl:3", "too long")


def test_a_record_that_json_cannot_hold_is_named(tmp_path):
    config = Common(input=("-",), output=str(tmp_path / "out.jsonl"))
    with pytest.raises(PolarctlError, match="cannot be written as JSON"):
        with Output("demo", config, []) as out:
            out.write({"reward": object()})


def test_one_compressed_block_bounds_the_rejects_kept_in_memory(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_BLOCK_BYTES", 1000)
    config = Common(
        input=("-",), output=str(tmp_path / "out.jsonl.gz"), rejects=str(tmp_path / "bad.jsonl")
    )
    with Output("demo", config, []) as out:
        for number in range(30):
            out.reject("-", "x" * 100)
            out.commit(number + 1)
        assert (tmp_path / "bad.jsonl").stat().st_size > 2000


def test_the_input_is_said_not_to_be_the_same_when_it_became_shorter(tmp_path):
    """A pipe has no size; only its bytes can tell."""
    source = make_input(tmp_path)
    reader = read.Reader([str(source)], None, on_bad=lambda *row: None)
    windows = list(reader.windows(WINDOW_ROWS))
    source.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:6]))
    shorter = read.Reader([str(source)], None, on_bad=lambda *row: None)
    with pytest.raises(UsageError, match="the input is not the one"):
        list(shorter.windows(WINDOW_ROWS, done=4, digest=windows[3].digest))


def test_random_damage_never_passes_silently(quick, whole, tmp_path):
    """Any two of the three files cut at random: the same bytes or a clear refusal."""
    source, data, rejects = whole
    folder = tmp_path / "cut"
    files = interrupted(folder, source, stop_at=5)
    chance = random.Random(5)
    for _ in range(100):
        damaged = dict(files)
        for name in chance.sample(sorted(files), 2):
            damaged[name] = files[name][: chance.randrange(len(files[name]) + 1)]
        restore(folder, damaged)
        if not resumes_or_refuses(source, folder):
            continue
        assert (folder / "out.jsonl").read_bytes() == data
        assert (folder / "bad.jsonl").read_bytes() == rejects
