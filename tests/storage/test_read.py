"""Reading: every odd input has its outcome, with file and line, in bounded memory."""

import gzip
import io as stdio
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.storage import read
from polarctl.storage.read import Reader, decode, expand, sizes


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, object]] = []

    def reject(self, where, reason, raw=None):
        self.rows.append((where, reason, raw))


def write(path: Path, data: bytes | str | Iterable[object]) -> str:
    if isinstance(data, str):
        data = data.encode()
    elif not isinstance(data, bytes):
        data = b"".join(json.dumps(row).encode() + b"\n" for row in data)
    path.write_bytes(data)
    return str(path)


def numbers(reader: Iterable[dict]) -> list[int]:
    return [record["n"] for record in reader]


ROWS = [{"n": number} for number in range(23)]


def test_lines_are_records_with_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"n":1}\n\n  \t \r\n{"n":2}')
    records = list(Reader([path], None))
    assert records == [{"n": 1}, {"n": 2}]
    assert [record.where for record in records] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'\xef\xbb\xbf{"n":1}\n{"n":2}\n', [1, 2]),  # BOM
        (b'{"n":1}\r\n{"n":2}\r\n', [1, 2]),
        ('{"n":"a\u2028b\u2029c\u0085d"}\n'.encode(), ["a\u2028b\u2029c\u0085d"]),
        (b'{"n":1}', [1]),  # no final newline
        (b'\n\n{"n":1}\n\n\n', [1]),
        (b' {"n" : 1} \n', [1]),
        (b'{"n":18446744073709551615}\n', [2**64 - 1]),
        (b'{"n":-9223372036854775808}\n', [-(2**63)]),
        (b'{"n":1e30}\n', [1e30]),
        ('{"n":"\U0001f600"}'.encode(), ["\U0001f600"]),
        (b'{"n":"\\ud83d\\ude00"}', ["\U0001f600"]),
    ],
)
def test_odd_but_sound_input_is_read(tmp_path, data, expected):
    assert numbers(Reader([write(tmp_path / "a.jsonl", data)], None)) == expected


DEEP = b'{"n":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
UNSOUND = [
    (b'{"n": NaN}', "no JSON"),
    (b'{"n": Infinity}', "no JSON"),
    (b'{"n": 1e400}', "infinity"),
    (b'{"n": "\\ud800"}', "surrogate"),
    (b'{"n": "\xff"}', "UTF-8"),
    (b'{"n": "\xc3"}', "UTF-8"),
    (b'{"n": "\xed\xa0\x80"}', "UTF-8"),  # a surrogate in UTF-8
    (b'{"n": "a\x00b"}', "no JSON"),
    (b'\xff\xfe{\x00"\x00', "UTF-8"),  # UTF-16
    (DEEP, "nested deeper than 128 levels"),
    (b'{"n": 1, "n": 2}', "`n` is there twice"),
    (b"[1]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"3", "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b'{"n": 1} {"n": 2}', "no JSON"),
    (b'{"n": 1', "no JSON"),
    (b"{'n': 1}", "no JSON"),
    (b'{"n": 18446744073709551616}', "more than 64 bits: 18446744073709551616"),
    (b'{"n": -9223372036854775809}', "more than 64 bits"),
    (b'{"x": [{"y": 123456789012345678901234567890}]}', "more than 64 bits: 1234567890123456"),
    (b'{"n": ' + b"9" * 5000 + b"}", "infinity"),
]


@pytest.mark.parametrize(("line", "named"), UNSOUND)
def test_an_unsound_line_is_refused_with_its_place(tmp_path, line, named):
    path = write(tmp_path / "a.jsonl", b'{"n": 0}\n' + line + b'\n{"n": 2}\n')
    with pytest.raises(RecordError) as caught:
        list(Reader([path], None, hint="what helps"))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert caught.value.exit_status == 3
    assert caught.value.hint and ("what helps" in caught.value.hint or "bits" in named)


@pytest.mark.parametrize(("line", "named"), UNSOUND)
def test_an_unsound_line_is_set_aside_when_asked_for(tmp_path, line, named):
    path = write(tmp_path / "a.jsonl", b'{"n": 0}\n' + line + b'\n{"n": 2}\n')
    kept = Kept()
    reader = Reader([path], None, on_bad=kept.reject)
    assert numbers(reader) == [0, 2]
    assert (reader.rows, reader.bad) == (3, 1)
    ((where, reason, raw),) = kept.rows
    assert where == f"{path}:2" and named in reason
    assert raw == line.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_a_record_or_a_record_error(data):
    try:
        assert isinstance(decode(data, "a:1", None), dict)
    except RecordError as error:
        assert str(error).startswith("a:1: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "output", "chosen", "policy", "id"]), JSON))
def test_random_json_is_a_prompt_or_a_record_error(fields):
    line = json.dumps(fields).encode()
    try:
        assert isinstance(decode(line, "a:1", "prompt")["prompt"], str | list)
    except RecordError as error:
        assert str(error).startswith("a:1: ")


@pytest.mark.parametrize("data", [b"", b"\n\n \r\n"])
def test_an_input_without_a_row_is_refused(tmp_path, data):
    path = write(tmp_path / "a.jsonl", data)
    with pytest.raises(RecordError) as caught:
        list(Reader([path], None, on_bad=Kept().reject))
    assert str(caught.value) == f"{path}: no records"


def test_the_schema_is_checked_and_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": 1}])
    with pytest.raises(RecordError, match=r"a.jsonl:2: field `prompt`: expected"):
        list(Reader([path], "prompt"))
    with pytest.raises(UsageError, match="no schema named `promt`"):
        list(Reader([path], "promt"))
    kinds = []
    reader = Reader([path], lambda fields: kinds.append(fields["prompt"]) or "prompt")
    with pytest.raises(RecordError, match="a.jsonl:2"):
        list(reader)
    assert kinds == ["a", 1]


def test_verify_refuses_what_does_not_fit_the_run(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)

    def only_even(record):
        if record["n"] % 2:
            raise RecordError("is odd", hint="filter it")

    with pytest.raises(RecordError, match="a.jsonl:2: is odd") as caught:
        list(Reader([path], None, verify=only_even))
    assert caught.value.hint == "filter it"
    kept = Kept()
    assert numbers(Reader([path], None, on_bad=kept.reject, verify=only_even)) == list(
        range(0, 23, 2)
    )
    assert [reason for _, reason, _ in kept.rows] == ["is odd"] * 11


# -- lines without end ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "gz", "zst"])
def test_an_over_long_line_is_refused_in_bounded_memory(tmp_path, kind):
    """A 240 MiB line (from a small file where it is compressed) within 300 MiB of memory."""
    path = tmp_path / "long.jsonl"
    blank = b" " * (1 << 20)
    if kind == "gz":
        with gzip.open(path, "wb", compresslevel=1) as stream:
            stream.writelines([b'{"n":0}\n', *[blank] * 240, b'\n{"n":1}\n'])
    elif kind == "zst":
        with zstandard.open(path, "wb") as stream:
            stream.write(b'{"n":0}\n')
            for _ in range(240):
                stream.write(blank)
            stream.write(b'\n{"n":1}\n')
    else:
        with open(path, "wb") as stream:
            stream.write(b'{"n":0}\n')
            stream.truncate(240 << 20)  # zeros, as a hole in the file
            stream.seek(0, os.SEEK_END)
            stream.write(b'\n{"n":1}\n')
    program = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
        from polarctl.storage.read import Reader
        class Sink:
            def reject(self, where, reason, raw=None):
                print(where, reason, len(raw))
        print([record["n"] for record in Reader(sys.argv[1:], None, on_bad=Sink().reject)])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{path}:2 line is longer than 64 MiB 0\n[0, 1]\n"


# -- compression ----------------------------------------------------------------------------------


def packed(data: bytes, kind: str) -> bytes:
    if kind == "gz":
        return gzip.compress(data)
    return zstandard.compress(data)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compression_is_told_by_the_first_bytes_not_by_the_name(tmp_path, kind):
    plain = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    path = write(tmp_path / "a.txt", packed(plain, kind))
    assert numbers(Reader([path], None)) == list(range(23))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_joined_members_are_one_stream(tmp_path, kind):
    whole = packed(b'{"n":0}\n{"n"', kind) + packed(b"", kind) + packed(b':1}\n{"n":2}', kind)
    assert numbers(Reader([write(tmp_path / "a", whole)], None)) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compression_on_stdin_is_found_too(kind):
    program = (
        "from polarctl.storage.read import Reader; print(sum(r['n'] for r in Reader(['-'], None)))"
    )
    plain = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    out = subprocess.run(
        [sys.executable, "-c", program], input=packed(plain, kind), capture_output=True
    )
    assert out.stdout == b"253\n", out.stderr  # 22 * 23 / 2


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_torn_compressed_file_is_refused_at_every_byte(tmp_path, kind):
    plain = b"".join(
        json.dumps({"n": row, "t": os.urandom(9).hex()}).encode() + b"\n" for row in range(40)
    )
    whole = packed(plain, kind)
    path = tmp_path / "torn"
    for size in range(5, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(RecordError, match="torn: cannot read on: "):
            list(Reader([str(path)], None, on_bad=Kept().reject))
    path.write_bytes(whole)
    assert len(list(Reader([str(path)], None))) == 40


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_damaged_compressed_file_never_gives_a_traceback(tmp_path, kind):
    plain = b"".join(json.dumps({"n": row, "t": "abc" * row}).encode() + b"\n" for row in range(40))
    whole = packed(plain, kind)
    path = tmp_path / "damaged"
    for position in range(4, len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        try:
            list(Reader([str(path)], None, on_bad=Kept().reject))
        except RecordError as error:
            assert "cannot read on" in str(error)


def test_rows_are_counted_beforehand_where_they_can_be(tmp_path):
    rows = b'{"prompt": "q"}\n\n' * 5  # blank lines are no rows, broken ones are
    plain = write(tmp_path / "a.jsonl", rows + b"{\n")
    small = write(tmp_path / "b.jsonl.gz", gzip.compress(rows))
    assert Reader([plain, small], "Prompt").total() == 11
    assert Reader([plain, small], "Prompt", limit=7).total() == 7
    assert Reader([plain, "-"], "Prompt").total() is None
    torn = write(tmp_path / "c.jsonl.gz", gzip.compress(rows)[:-4])
    assert Reader([torn], "Prompt").total() is None  # it is read as far as it goes when it is due


def test_files_are_closed_when_they_are_read(tmp_path):
    opened = []
    for kind in ("gz", "zst"):
        stream = read.open_bytes(write(tmp_path / kind, packed(b'{"n":0}\n', kind)))
        opened.append(stream)
        below = stream.fileobj if kind == "gz" else stream.raw.raw
        stream.close()
        assert below.closed


# -- which files ----------------------------------------------------------------------------------


def test_globs_are_sorted_and_files_keep_their_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[x].jsonl"):
        write(tmp_path / name, ROWS)
    (tmp_path / "d.jsonl").mkdir()
    at = lambda name: str(tmp_path / name)  # noqa: E731
    assert expand([at("*.jsonl")]) == [at("[x].jsonl"), at("a.jsonl"), at("b.jsonl")]
    assert expand([at("b.jsonl"), "-", at("a*")]) == [at("b.jsonl"), "-", at("a.jsonl")]
    assert expand([at("[x].jsonl")]) == [at("[x].jsonl")]  # a file of that very name
    assert expand([str(tmp_path / "**" / "c.*")]) == [at("c.txt")]


def test_a_folder_and_a_missing_file_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="is a folder, not a file") as caught:
        expand([str(tmp_path)])
    assert caught.value.hint == f"name files: '{tmp_path}/*.jsonl'"
    for pattern in ("none.jsonl", "*.none"):
        with pytest.raises(UsageError, match="no such file"):
            expand([str(tmp_path / pattern)])


def test_a_named_pipe_is_read_as_a_file_of_unknown_size(tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    assert expand([pipe]) == [pipe]
    assert sizes([pipe, "-"]) == [{"path": pipe, "bytes": None}, {"path": "-", "bytes": None}]
    with subprocess.Popen(["sh", "-c", f"echo '{{\"n\": 5}}' > {pipe}"]):
        assert numbers(Reader([pipe], None)) == [5]


def test_a_file_that_cannot_be_opened_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="gone.jsonl: No such file"):
        list(Reader([str(tmp_path / "gone.jsonl")], None))


def test_stdin_is_missing_when_it_is_a_terminal_or_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert read.stdin_is_missing(["-"]) and not read.stdin_is_missing(["a"])
    monkeypatch.setattr(sys, "stdin", stdio.StringIO())
    assert not read.stdin_is_missing(["-"])


# -- windows, shards, limit -----------------------------------------------------------------------


def three_files(folder: Path) -> list[str]:
    """23 rows over three files, with blank lines and an empty file between."""
    return [
        write(folder / "a.jsonl", ROWS[:5]),
        write(folder / "b.jsonl", b"\n"),
        write(folder / "c.jsonl", b"\n\n".join(json.dumps(r).encode() for r in ROWS[5:])),
    ]


def test_windows_have_a_fixed_number_of_rows_over_all_files(tmp_path):
    windows = list(Reader(three_files(tmp_path), None).windows(4))
    assert [window.index for window in windows] == [0, 1, 2, 3, 4, 5]
    assert [numbers(window.records) for window in windows] == [
        list(range(start, min(start + 4, 23))) for start in range(0, 23, 4)
    ]


def test_bad_rows_count_so_windows_do_not_shift(tmp_path):
    lines = [b"{" if n in (1, 4, 5, 6, 7) else json.dumps({"n": n}).encode() for n in range(10)]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    windows = list(Reader([path], None, on_bad=Kept().reject).windows(4))
    assert [numbers(window.records) for window in windows] == [[0, 2, 3], [], [8, 9]]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_all_shards_together_are_the_whole_with_the_same_windows(tmp_path, count, size):
    paths = three_files(tmp_path)
    whole = {w.index: (w.records, w.digest) for w in Reader(paths, None).windows(size)}
    parts: dict = {}
    for shard in range(count):
        for window in Reader(paths, None, shard=(shard, count)).windows(size):
            assert window.index % count == shard
            parts[window.index] = (window.records, window.digest)
    assert parts == whole


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 22, 23, 24])
def test_limit_counts_rows_over_all_files(tmp_path, limit):
    reader = Reader(three_files(tmp_path), None, limit=limit)
    assert numbers(reader) == list(range(min(limit, 23)))
    assert reader.rows == min(limit, 23)


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"n":0}\n{broken\n')
    assert numbers(Reader([path], None, limit=1)) == [0]


@pytest.mark.parametrize("done", range(7))
def test_a_resume_hands_out_the_rest_and_checks_what_it_passes_over(tmp_path, done):
    paths = three_files(tmp_path)
    whole = list(Reader(paths, None).windows(4))
    digest = whole[done - 1].digest if done else None
    rest = list(Reader(paths, None).windows(4, done=done, digest=digest))
    assert rest == whole[done:]
    if done:
        with pytest.raises(UsageError, match="cannot resume: the input is not the one"):
            list(Reader(paths, None).windows(4, done=done, digest="0" * 32))


def test_rows_that_are_passed_over_are_not_parsed_again(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"n":0}\n{bad\n{"n":2}\n{"n":3}\n')
    kept = Kept()
    first, second = Reader([path], None, on_bad=kept.reject).windows(2)
    assert len(kept.rows) == 1
    again = Reader([path], None, on_bad=kept.reject)
    assert list(again.windows(2, done=1, digest=first.digest)) == [second]
    assert len(kept.rows) == 1


def test_every_error_of_this_module_is_one_of_ours():
    assert issubclass(RecordError, PolarctlError) and issubclass(UsageError, PolarctlError)


def test_files_that_are_not_json_lines_name_the_command_that_reads_them(tmp_path):
    path = tmp_path / "rows"
    for data, kind in (
        (b'[\n {"prompt": "Q"}\n]', "one JSON array"),
        (b'\xef\xbb\xbf[{"prompt": "Q"}]', "one JSON array"),
        (b"PAR1\x15\x04\x15", "a Parquet file"),
    ):
        path.write_bytes(data)
        with pytest.raises(RecordError, match=f"rows:1: {kind}.* `polarctl convert` reads it"):
            list(Reader([str(path)], None))
