"""Parquet shards: many of them, and columns whose type shows late. Read back by pyarrow alone."""

import json

import pyarrow.parquet
import pytest

from polarctl import cli
from polarctl.hub import shards

TRIPLE = {"prompt": "p", "reference": "r", "chosen": "c"}


def test_shards_hold_every_row_in_order_and_a_type_that_fits_all(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_ROWS", 4)
    monkeypatch.setattr(shards, "_GROUP_BYTES", 400)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1000)
    late = {"number": 1.5, "text": ["a"], "none": "now", "parts": {"b": [{}]}, "big": 0.5}
    early = {
        "number": 2,
        "text": "a",
        "none": None,
        "parts": {"a": 1},
        "big": 2**53 + 1,
        "empty": [],
    }
    rows = [{**TRIPLE, "rejected": f"x{n}", **(late if n > 20 else early)} for n in range(40)]
    source = tmp_path / "t.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, info = shards.write_config(tmp_path / "out", "triple", {"train": [str(source)]})
    files = made["train"].files
    assert len(files) > 2
    assert list(files) == [
        f"triple/train-{n:05d}-of-{len(files):05d}.parquet" for n in range(len(files))
    ]
    tables = [pyarrow.parquet.read_table(path) for path in files.values()]
    assert {str(table.schema) for table in tables} == {str(tables[0].schema)}
    assert sum(f.stat().st_size for f in files.values()) == info["download_size"]
    assert made["train"].records == 40 and info["splits"][0]["num_examples"] == 40
    assert pyarrow.parquet.ParquetFile(next(iter(files.values()))).num_row_groups > 1
    found = [row for table in tables for row in table.to_pylist()]
    for row in found:
        for name in ("text", "parts", "big"):  # of the type JSON
            row[name] = json.loads(row[name])
    assert found == [{"empty": None, **row} for row in rows]


def test_without_the_packages_the_hint_says_which_extra(tmp_path, monkeypatch, capfd):
    source = tmp_path / "t.jsonl"
    source.write_text(json.dumps({**TRIPLE, "rejected": "x"}) + "\n")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    command = ["push", str(source), "me/d", "--dry-run", "--force"]
    assert cli.run([*command, "--parquet"]) == 4
    assert "polarctl[data]" in capfd.readouterr().err
    assert cli.run(command) == 0


def test_parquet_files_are_for_data_sets_with_a_card_of_ours(tmp_path, capfd):
    source = tmp_path / "t.jsonl"
    source.write_text(json.dumps({**TRIPLE, "rejected": "x"}) + "\n")
    (tmp_path / "README.md").write_text("# Mine\n")
    command = ["push", str(tmp_path), "me/d", "--dry-run", "--force", "--parquet"]
    assert cli.run(command) == 2
    assert "`--parquet` has no effect here: README.md" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["held-out.jsonl"], ["train"]),  # the only one
        (["train.jsonl", "val.jsonl", "test-2.jsonl"], ["train", "validation", "test"]),
        (["triples.jsonl", "unseen.jsonl"], ["train", "validation"]),
        (["evaluated.jsonl", "latest.jsonl"], ["train", "train"]),  # parts of words say nothing
        (["val-a.jsonl", "val-b.jsonl"], ["train", "train"]),
    ],
)
def test_splits_follow_from_the_files_names(names, splits):
    from polarctl.hub.cards import DataFile
    from polarctl.hub.cards import splits as of
    from polarctl.hub.statistics import Statistics

    files = [DataFile(name, "triple", 1, 1, "", (), None, Statistics()) for name in names]
    found = of(files)["triple"]
    assert [next(s for s, there in found.items() if file in there) for file in files] == splits
