"""Input that is hard to read: deep, large, in other encodings, with a key twice. On the program."""

import gzip
import json
import os
import subprocess
import sys
import threading

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from polarctl import cli
from polarctl.errors import RecordError
from polarctl.storage import compression, read
from polarctl.storage.read import Reader, decode

TRIPLE = {"prompt": "a", "reference": "b", "chosen": "c", "rejected": "d", "rewards": [1, 0]}
WRITTEN = {"prompt": "a", "output": "b", "policy": "c"}


def nested(levels: int, record: dict = TRIPLE) -> bytes:
    """A record with so many levels, itself the first."""
    inside = b"[" * (levels - 1) + b"]" * (levels - 1)
    return json.dumps(record).encode()[:-1] + b', "more": ' + inside + b"}\n"


# -- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "convert", "eval", "pair"])
@pytest.mark.parametrize("levels", [129, 254, 500, 1023, 20_000])
def test_a_deep_field_is_a_bad_record_in_every_stage(tmp_path, capfd, stage, levels):
    path = tmp_path / "deep.jsonl"
    record = WRITTEN if stage == "pair" else TRIPLE
    path.write_bytes(nested(2, record) + nested(levels, record))
    more = ["--to", "candidates"] if stage == "convert" else []
    assert cli.run([stage, str(path), *more]) == 3
    assert f"{path}:2: nested deeper than 128 levels\n" in capfd.readouterr().err


def test_the_deepest_record_that_is_read_is_written_by_every_conversion(tmp_path, capfd):
    path = tmp_path / "deep.jsonl"
    path.write_bytes(nested(128))
    for to in ("native", "candidates", "triples", "trl", "nemo", "sharegpt"):
        assert cli.run(["convert", str(path), "--to", to, "-q"]) == 0, to
    assert capfd.readouterr().out.count("[" * 120) == 6


def test_deep_rows_are_set_aside_when_asked_for(tmp_path):
    path, rejects = tmp_path / "deep.jsonl", tmp_path / "bad.jsonl"
    path.write_bytes(nested(2) + nested(600) + nested(3))
    out = tmp_path / "out.jsonl"
    command = ["convert", str(path), "--to", "native", "--rejects", str(rejects), "-o", str(out)]
    assert cli.run(command) == 0
    assert len(out.read_bytes().splitlines()) == 2
    (bad,) = map(json.loads, rejects.read_bytes().splitlines())
    assert bad["where"] == f"{path}:2" and bad["record"] == nested(600).decode().rstrip("\n")


# -- keys that are there twice --------------------------------------------------------------------

NAMES = st.sampled_from(["n", ":", '"', "\\", '":', "\\\\", 'a\\"', " ", "é"])
VALUES = st.recursive(
    NAMES | st.integers(0, 3) | st.just(1e30),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(NAMES, inner), max_size=3),
    max_leaves=8,
)
SPACE = st.sampled_from(["", " ", "\t", " \r "])


def is_pairs(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(one, tuple) for one in value)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=4), SPACE, SPACE)
def test_a_key_is_found_twice_exactly_where_it_is(pairs, before, after):
    """Lines are put together by hand here, so what is twice is known without a parser."""
    twice = False

    def text(value):
        nonlocal twice
        if is_pairs(value):
            names = [name for name, _ in value]
            twice = twice or len(set(names)) < len(names)
            inside = (f"{json.dumps(name)}{before}:{after}{text(v)}" for name, v in value)
            return "{" + ",".join(inside) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(text, value)) + "]"
        return json.dumps(value)

    line = text(pairs).encode()
    if twice:
        with pytest.raises(RecordError, match=r"a:1: `.*` is there twice"):
            decode(line, "a:1", None)
    else:
        assert decode(line, "a:1", None) == json.loads(line)


# -- encodings and line ends ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ('{"prompt": "a"}\n'.encode("utf-16"), "is UTF-16 or UTF-32, not UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-16-le"), "is UTF-16 or UTF-32, not UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-16-be"), "is UTF-16 or UTF-32, not UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-32"), "is UTF-16 or UTF-32, not UTF-8"),
        (b'{"prompt": "a"}\r{"prompt": "b"}\r', "its lines end in CR alone"),
        (b'{"prompt": "a"}\r\r{"prompt": "b"}', "its lines end in CR alone"),
    ],
)
def test_a_file_that_is_no_jsonl_at_all_is_refused_as_a_whole(tmp_path, capfd, data, told):
    """Also with --rejects: every row of it would be set aside, and nothing be left."""
    path = tmp_path / "other.jsonl"
    path.write_bytes(data)
    assert cli.run(["convert", str(path), "--rejects", str(tmp_path / "bad.jsonl")]) == 3
    assert f"polarctl: {path}: {told}\nhint: " in capfd.readouterr().err


# -- large rows -----------------------------------------------------------------------------------


def test_windows_end_before_a_number_of_bytes_the_same_for_every_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_WINDOW_BYTES", 30)
    path = tmp_path / "a.jsonl"
    # Lines of 8 bytes, but for two of 40: windows by hand.
    rows = [0, 1, 2, 3, 10**32, 4, 5, 10**32 + 1, 6, 7, 8, 9]
    path.write_text("".join(json.dumps({"n": str(row)}) + "\n" for row in rows))
    sizes = [len(json.dumps({"n": str(row)})) + 1 for row in rows]
    assert sizes == [11, 11, 11, 11, 43, 11, 11, 43, 11, 11, 11, 11]
    expected = [[0, 1], [2, 3], [10**32], [4, 5], [10**32 + 1], [6, 7], [8, 9]]

    def numbers(window):
        return [int(record["n"]) for record in window.records]

    whole = list(Reader([str(path)], None).windows(3))
    assert [numbers(window) for window in whole] == expected
    parts = [w for i in (0, 1) for w in Reader([str(path)], None, shard=(i, 2)).windows(3)]
    assert sorted((w.index, w.digest) for w in parts) == [(w.index, w.digest) for w in whole]
    rest = Reader([str(path)], None).windows(3, done=4, digest=whole[3].digest)
    assert [numbers(window) for window in rest] == expected[4:]
    by_rows = list(Reader([str(path)], None, limit=2).windows(1))
    assert [numbers(window) for window in by_rows] == [[0], [1]]


@pytest.mark.parametrize("stage", ["validate", "convert"])
def test_large_rows_are_read_in_bounded_memory(tmp_path, stage):
    """450 MiB in rows of 3 MiB, from a small file, in 500 MiB of address space; all are good."""
    path = tmp_path / "large.jsonl.gz"
    row = b'{"prompt": "a", "output": "' + b"x" * (3 << 20) + b'"}\n'
    path.write_bytes(gzip.compress(row, 1) * 150)
    more = ["--to", "native"] if stage == "convert" else []
    limit = 500 << 20
    program = f"import resource as r; r.setrlimit(r.RLIMIT_AS, ({limit}, {limit}));"
    program += "from polarctl.cli import main; main()"
    command = [sys.executable, "-c", program, stage, str(path), *more]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stderr
    assert "150 records, all good" in result.stderr or "150 rows gave 150 records" in result.stderr


# -- damage in compressed files that we have written ----------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_no_flipped_bit_reads_as_other_content(tmp_path, suffix):
    text = json.dumps({"text": "the sea was calm that day, " * 4 + suffix, "n": 0.123456}).encode()
    whole = compression.block(text + b"\n", "a" + suffix)
    path, found = tmp_path / f"a{suffix}", 0
    for place in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            assert list(Reader([str(path)], None)) == [json.loads(text)], place
        except RecordError:
            found += 1
    assert found > len(whole) * 6  # some bits of a header mean nothing


# -- files that are no plain files ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["first", "between", "last"])
def test_a_skippable_frame_in_a_zstandard_file_is_skipped(tmp_path, where):
    skipped = b"\x51\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    one, two = (zstandard.compress(b'{"n":%d}\n' % n) for n in (1, 2))
    parts = {"first": [skipped, one, two], "between": [one, skipped, two]}
    path = tmp_path / "a.zst"
    path.write_bytes(b"".join(parts.get(where, [one, two, skipped])))
    assert [record["n"] for record in Reader([str(path)], None)] == [1, 2]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="not on Linux: no such file")
@pytest.mark.parametrize("stage", ["validate", "convert"])
def test_a_file_that_cannot_be_read_is_said_to_be_one(capfd, stage):
    """Linux gives EIO for this file; nothing about it has to do with room on a disk."""
    assert cli.run([stage, "/proc/self/mem"]) in (2, 3)
    err = capfd.readouterr().err
    assert "/proc/self/mem: cannot be read: " in err and "room" not in err


def test_a_named_pipe_is_read_once_by_a_training_stage(tmp_path, tiny_lm, capfd):
    pipe, rows = tmp_path / "pipe", [{**TRIPLE, "prompt": str(n)} for n in range(4)]
    os.mkfifo(pipe)
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True)
    writer.start()
    command = ["finetune", str(pipe), "-m", str(tiny_lm), "-o", str(tmp_path / "rm")]
    command += ["--max-steps", "1", "--device", "cpu", "--val-fraction", "0"]
    assert cli.run(command) == 0, capfd.readouterr().err
    assert (tmp_path / "rm" / "model.safetensors").exists()
