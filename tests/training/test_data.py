"""The data as a stream: every row once an epoch, in an order that only the seed decides."""

import gzip
import hashlib
import io as stdio
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest
import zstandard

from polarctl import console
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.records import Record, Triple, check
from polarctl.training import data
from polarctl.training.data import Source, on_disk, stream, survey


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.rows = []

    def reject(self, where, reason, raw=None):
        self.rows.append((where, reason, raw))


def triple(number, prompt=None):
    prompt = f"p{number}" if prompt is None else prompt
    return {"prompt": prompt, "reference": "r", "chosen": "c", "rejected": "d", "n": number}


def write(path, rows):
    """A file of triples by number; bytes stand for themselves."""
    lines = [row if isinstance(row, bytes) else orjson.dumps(triple(row)) for row in rows]
    text = b"".join(line + b"\n" for line in lines)
    if path.suffix == ".gz":
        text = gzip.compress(text)
    elif path.suffix == ".zst":
        text = zstandard.compress(text)
    path.write_bytes(text)
    return str(path)


def source(*paths, **options):
    return Source(paths=list(paths), verify=lambda record: check(record, Triple), **options)


def take(count, used, *, world=1, rank=0, skip=0):
    records = stream(used, world=world, rank=rank, skip=skip)
    return [record["n"] for record in itertools.islice(records, count)]


@pytest.fixture
def files(tmp_path):
    """23 triples in four files of two kinds of compression, one without a row."""
    return [
        write(tmp_path / "a.jsonl", range(7)),
        write(tmp_path / "b.jsonl.gz", range(7, 12)),
        write(tmp_path / "c.jsonl", []),
        write(tmp_path / "d.jsonl.zst", range(12, 23)),
    ]


# -- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5, 22, 23, 1000])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_holds_every_row_once(files, window, seed):
    order = take(3 * 23, source(*files, window=window, seed=seed))
    for epoch in range(3):
        assert sorted(order[23 * epoch : 23 * (epoch + 1)]) == list(range(23))


def test_epochs_and_seeds_differ_in_order_and_a_seed_repeats_it(files):
    first = take(46, source(*files, seed=1))
    assert first == take(46, source(*files, seed=1))
    assert first[:23] != first[23:]
    assert first != take(46, source(*files, seed=2))
    alone = take(14, source(files[0]))  # with one file the rows alone can differ
    assert alone[:7] != alone[7:]


def test_a_window_of_one_is_the_order_of_the_files(tmp_path):
    path = write(tmp_path / "a.jsonl", range(9))
    assert take(9, source(path, window=1)) == list(range(9))


def test_a_row_goes_forward_by_less_than_the_window(tmp_path):
    path = write(tmp_path / "a.jsonl", range(500))
    order = take(500, source(path, window=20))
    assert order != sorted(order)
    assert all(number <= place + 20 for place, number in enumerate(order))


def test_small_data_is_shuffled_as_a_whole(tmp_path):
    """Each of 3! orders comes as often: 60 seeds, 10 each expected, 6 standard deviations wide."""
    path = write(tmp_path / "a.jsonl", range(3))
    orders = Counter(tuple(take(3, source(path, seed=seed))) for seed in range(60))
    assert len(orders) == 6
    assert max(orders.values()) < 10 + 6 * (60 * 1 / 6 * 5 / 6) ** 0.5  # 27.3


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.3}, {"window": 4}])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_going_on_gives_what_was_to_come(files, world, options):
    used = source(*files, **options)
    for rank in {0, world - 1} if world <= 4 else {0}:  # more processes than files: no shares
        whole = take(70, used, world=world, rank=rank)
        for skip in (1, 10, 23, 24, 60):
            assert take(70 - skip, used, world=world, rank=rank, skip=skip) == whole[skip:]


def test_passed_over_rows_are_not_parsed(tmp_path):
    parsed = []

    def verify(record):
        parsed.append(record["n"])

    path = write(tmp_path / "a.jsonl", range(100))
    used = Source(paths=[path], verify=verify)
    assert len(take(5, used, skip=250)) == 5
    assert len(parsed) == 5


# -- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_with_few_files_all_processes_take_turns_in_the_order_of_one(tmp_path, world, capsys):
    path = write(tmp_path / "a.jsonl", range(10))
    used = source(path, window=4)
    parts = [take(12, used, world=world, rank=rank) for rank in range(world)]
    together = [number for turn in zip(*parts, strict=True) for number in turn]
    assert together == take(12 * world, used)
    assert console.choices()["data"]["value"] == "every row of all files, in turn"
    assert f"1 files for {world} processes" in capsys.readouterr().err


def test_with_enough_files_each_process_reads_its_own(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", range(10 * i, 10 * i + 10)) for i in range(4)]
    opened = []
    used = source(*paths)
    for rank in range(2):
        epoch = take(20, used, world=2, rank=rank)
        assert len({n // 10 for n in epoch}) == 2  # rows of two files and no more
        opened += epoch
    assert sorted(opened) == list(range(40))
    assert console.choices()["data"]["value"] == "its own files"


def test_the_files_of_a_process_change_with_the_epoch(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", [i]) for i in range(6)]
    parts = [take(3 * 8, source(*paths), world=2, rank=rank) for rank in range(2)]
    shares = set()
    for epoch in range(8):
        first, second = (part[3 * epoch : 3 * epoch + 3] for part in parts)
        assert sorted(first + second) == list(range(6))
        shares.add(frozenset(first))
    assert len(shares) > 1


def test_a_process_without_a_triple_is_an_error(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", []) for i in range(3)]
    paths.append(write(tmp_path / "3.jsonl", range(3)))
    errors = []
    for rank in range(4):
        try:
            take(1, source(*paths), world=4, rank=rank)
        except RecordError as error:
            errors.append(str(error))
    assert len(errors) == 3 and "no training triple for process" in errors[0]


def test_a_share_that_is_empty_in_a_later_epoch_is_passed_over(tmp_path):
    """With one of two files empty, a process has nothing to read in about every second epoch."""
    paths = [write(tmp_path / "a.jsonl", range(4)), write(tmp_path / "b.jsonl", [])]
    lucky = [rank for rank in range(2) if _reads(source(*paths), rank)]
    assert len(lucky) == 1
    order = take(40, source(*paths), world=2, rank=lucky[0])
    assert [sorted(order[i : i + 4]) for i in range(0, 40, 4)] == [[0, 1, 2, 3]] * 10


def _reads(used, rank):
    try:
        return bool(take(1, used, world=2, rank=rank))
    except RecordError:
        return False


def test_a_limit_is_the_first_rows_for_any_number_of_processes(files):
    used = source(*files, limit=9, window=4)
    assert sorted(take(9, used)) == list(range(9))
    parts = [take(9, used, world=2, rank=rank) for rank in range(2)]  # 4 files: would be split
    assert sorted(parts[0] + parts[1]) == sorted([*range(9), *range(9)])
    assert survey(used).triples == 9


# -- held out -------------------------------------------------------------------------------------


def is_held_out(text, fraction):
    """The rule again: blake2b of the prompt as a share of 2**64."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return int(digest, 16) / 2**64 < fraction


def test_the_prompt_alone_decides_what_is_held_out(tmp_path):
    rows = range(400)
    held = {n for n in rows if is_held_out(f"p{n}", 0.25)}
    assert 60 < len(held) < 140  # 100 expected, standard deviation 8.7
    paths = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", reversed(rows))]
    for path, seed in zip(paths, (0, 5), strict=True):
        used = source(path, val_fraction=0.25, seed=seed)
        found = survey(used)
        assert {record["n"] for record in found.held_out_records} == held
        assert (found.triples, found.held_out) == (400 - len(held), len(held))
        assert sorted(take(400 - len(held), used)) == sorted(set(rows) - held)


def test_a_prompt_is_the_same_as_string_and_as_message():
    used = source("x", val_fraction=0.5)
    for number in range(20):
        text = f"p{number}\nsecond"
        parts = [{"type": "text", "text": "sec"}, {"type": "text", "text": "ond"}]
        messages = [{"role": "a", "content": f"p{number}"}, {"role": "b", "content": parts}]
        expected = is_held_out(text, 0.5)
        assert used.holds_out(Record({"prompt": text})) == expected
        assert used.holds_out(Record({"prompt": messages})) == expected


def test_a_larger_share_holds_out_more_of_the_same(tmp_path):
    path = write(tmp_path / "a.jsonl", range(100))
    held = [
        {r["n"] for r in survey(source(path, val_fraction=share)).held_out_records}
        for share in (0.0, 0.1, 0.4)
    ]
    assert held[0] == set() and held[1] < held[2]


# -- survey ---------------------------------------------------------------------------------------


def test_a_survey_counts_everything_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", 8)
    monkeypatch.setattr(data, "VAL_TRIPLES", 5)
    path = write(tmp_path / "a.jsonl", range(300))
    used = source(path, val_fraction=0.5, seed=3)
    found = survey(used)
    assert found.triples + found.held_out == 300 and found.complete
    assert found.bytes == os.path.getsize(path)
    assert len(found.sample) == 8 and len({r["n"] for r in found.sample}) == 8
    assert not any(used.holds_out(r) for r in found.sample)
    held = [n for n in range(300) if is_held_out(f"p{n}", 0.5)]
    assert [r["n"] for r in found.held_out_records] == held[:5]
    assert [r["n"] for r in survey(used).sample] == [r["n"] for r in found.sample]


def test_every_triple_is_sampled_with_equal_chance(tmp_path, monkeypatch):
    """10 of 40 over 80 seeds: 20 times each expected, standard deviation 3.9."""
    monkeypatch.setattr(data, "SAMPLE", 10)
    path = write(tmp_path / "a.jsonl", range(40))
    times = Counter(r["n"] for seed in range(80) for r in survey(source(path, seed=seed)).sample)
    assert sum(times.values()) == 800
    assert all(4 < times[n] < 36 for n in range(40))


def test_a_survey_can_stop_early(tmp_path):
    path = write(tmp_path / "a.jsonl", [*range(20), b"{broken"])
    found = survey(source(path), stop_after=15)
    assert (found.triples, found.complete) == (15, False)
    whole = write(tmp_path / "b.jsonl", range(10))
    assert survey(source(whole), stop_after=11).complete


def test_an_early_stop_waits_for_validation_but_not_for_ever(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", range(400))
    monkeypatch.setattr(data, "VAL_TRIPLES", 12)
    used = source(path, val_fraction=0.1)
    found = survey(used, stop_after=3)
    assert found.held_out == 12 and not found.complete
    monkeypatch.setattr(data, "_LOOK_FOR_VAL", 20)
    found = survey(used, stop_after=3)
    assert found.triples == 23 and 0 < found.held_out < 12


def test_data_with_nothing_to_train_on_is_refused(tmp_path):
    empty = write(tmp_path / "a.jsonl", [])
    bad = write(tmp_path / "b.jsonl", [b"{", b"3"])
    with pytest.raises(RecordError, match="a.jsonl: no good record"):
        survey(source(empty))
    with pytest.raises(RecordError, match="b.jsonl: no good record"):
        survey(source(bad, on_bad=Kept().reject))


# -- bad rows -------------------------------------------------------------------------------------

BAD = b'{"prompt": 3}'


def test_a_bad_row_is_an_error_with_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [0, 1, BAD, 3])
    for read in (survey, lambda used: take(4, used)):
        with pytest.raises(RecordError, match="a.jsonl:3: ") as caught:
            read(source(path))
        assert "--rejects" in caught.value.hint


def test_bad_rows_are_set_aside_once_and_never_trained_on(tmp_path):
    path = write(tmp_path / "a.jsonl", [0, BAD, 2, b"[]", 4])
    kept = Kept()
    used = source(path, on_bad=kept.reject)
    found = survey(used)
    assert (found.triples, found.bad) == (3, 2)
    assert [where for where, _, _ in kept.rows] == [f"{path}:2", f"{path}:4"]
    order = take(9, used)
    assert [sorted(order[i : i + 3]) for i in (0, 3, 6)] == [[0, 2, 4]] * 3
    assert len(kept.rows) == 2


# -- pipes ----------------------------------------------------------------------------------------


def test_files_stay_where_they_are(files, tmp_path):
    assert on_disk(files, tmp_path / "none") == files


def test_stdin_is_copied_and_keeps_its_name_in_messages(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz", [0, 1, BAD])
    packed = Path(path).read_bytes()
    monkeypatch.setattr(sys, "stdin", stdio.TextIOWrapper(stdio.BytesIO(packed)))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    paths = on_disk([path, "-"], scratch)
    assert paths[0] == path and Path(paths[1]).read_bytes() == packed
    with pytest.raises(RecordError, match="^<stdin>:3: "):
        survey(source(paths[1]))


def test_named_pipes_are_copied_because_they_are_read_twice(tmp_path):
    names = [str(tmp_path / name) for name in "ab"]
    file = write(tmp_path / "c.jsonl", range(2))
    for name in names:
        os.mkfifo(name)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    rows = [orjson.dumps(triple(n)).decode() for n in (2, 3)]
    writers = "; ".join(f"echo '{row}' > {name}" for row, name in zip(rows, names, strict=True))
    with subprocess.Popen(["sh", "-c", writers]):
        paths = on_disk([names[0], file, names[1]], scratch)
    used = source(*paths)
    assert survey(used).triples == 4
    assert sorted(take(8, used)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_pipe_and_several_processes_do_not_go_together(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes cannot read one pipe"):
        on_disk(["-"], tmp_path)


def test_a_copy_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdio.TextIOWrapper(stdio.BytesIO(b"{}")))
    with pytest.raises(PolarctlError, match="<stdin>: cannot be written: No such file"):
        on_disk(["-"], tmp_path / "gone")
