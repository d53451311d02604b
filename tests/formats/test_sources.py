import csv
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polarctl import cli
from polarctl.errors import RecordError, UsageError
from polarctl.formats import sources

ROWS = [
    {"prompt": "Q1", "chosen": 'good, "very"\ngood', "rejected": "bad é", "note": "x"},
    {"prompt": "Q2", "chosen": "[ok]", "rejected": '{"a": 1}', "note": None},
]
WANTED = [
    {
        "prompt": row["prompt"],
        "candidates": [
            {"output": row["chosen"], "label": 1},
            {"output": row["rejected"], "label": 0},
        ],
    }
    for row in ROWS
]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(path, text):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    (gzip.open if path.endswith(".gz") else open)(path, "wb").write(data)
    return path


def rows_of(path, **options):
    return [json.loads(line) for _, line in sources.RowReader([path], None, **options).lines()]


def places(path):
    return [where for where, _ in sources.RowReader([path], None).lines()]


def converted(*arguments):
    """The records that `convert` writes, without the field that carries nothing."""
    assert cli.run(["convert", *arguments, "-o", "out.jsonl", "--force"]) == 0
    made = [json.loads(line) for line in open("out.jsonl", encoding="utf-8")]
    return [{k: v for k, v in record.items() if k != "note"} for record in made]


def table_file(path, rows=ROWS):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def csv_text(rows, delimiter=","):
    with open("cells", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return open("cells", newline="", encoding="utf-8").read()


def test_every_kind_of_file_gives_the_same_records():
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    files = [
        put("lines.jsonl", lines),
        put("array.json", json.dumps(ROWS, indent=2)),
        put("array.json.gz", json.dumps(ROWS)),
        put("array.jsonl", "\ufeff " + json.dumps(ROWS)),
        put("cells.csv", csv_text(ROWS)),
        put("cells.csv.gz", "\ufeff" + csv_text(ROWS)),
        put("cells.tsv", csv_text(ROWS, "\t")),
        table_file("rows.parquet"),
    ]
    for path in files:
        assert converted(path) == WANTED, path
    assert converted(*files) == WANTED * len(files)


def test_folders_of_data_sets_are_read():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk("saved")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk("parts")
    table_file("folder/data/train-00000-of-00001.parquet")
    table_file("folder/data/test-00000-of-00001.parquet", ROWS[1:])
    put("subsets/README.md", SUBSETS)
    table_file("subsets/one/train.parquet", ROWS[:1])
    table_file("subsets/two/train.parquet", ROWS[1:])
    assert converted("saved") == WANTED
    for folder in ("parts", "folder"):
        assert converted(folder) == WANTED
        assert converted(folder, "--source-split", "test") == WANTED[1:]
    assert converted("subsets", "--subset", "two") == WANTED[1:]


SUBSETS = """---
configs:
- config_name: one
  data_files: one/*.parquet
- config_name: two
  data_files: two/*.parquet
---
"""


def test_the_split_that_is_taken_is_said_and_a_wrong_one_refused(capfd):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk("parts")
    datasets.DatasetDict({"valid": data, "test": data}).save_to_disk("others")
    assert cli.run(["convert", "parts"]) == 0
    assert "source split: train (of train, test" in capfd.readouterr().err
    assert cli.run(["convert", "parts", "--source-split", "tset"]) == 2
    assert "hint: there is train, test" in capfd.readouterr().err
    assert cli.run(["convert", "others"]) == 2
    assert "hint: --source-split valid or test" in capfd.readouterr().err
    put("empty/README.md", "nothing")
    assert cli.run(["convert", "empty"]) == 2
    assert "polarctl: empty: no data set that can be read" in capfd.readouterr().err


def test_an_id_that_cannot_be_reached_fails_at_once_with_a_way_round(capfd, monkeypatch):
    # Port 9 of this machine: nothing listens there.
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert cli.run(["convert", "nobody/nothing"]) == 4
    assert time.monotonic() - start < 20
    err = capfd.readouterr().err
    assert "polarctl: nobody/nothing: no such file or folder here, and the Hub cannot be" in err
    assert "hint: hf download nobody/nothing --repo-type dataset --local-dir DIR" in err


@pytest.mark.parametrize("name", ["./nobody/nothing", "nobody/nothing.jsonl", "nothing", "a/b/c"])
def test_what_cannot_be_an_id_is_a_missing_file(name, capfd):
    assert cli.run(["convert", name]) == 2
    assert f"{name}: no such file" in capfd.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch, capfd):
    os.mkdir("folder")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert cli.run(["convert", "folder"]) == 4
    assert "pip install 'polarctl[data]'" in capfd.readouterr().err


# -- arrays ----------------------------------------------------------------------------------------


def test_an_array_is_read_entry_by_entry_with_its_lines(monkeypatch):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 7)  # every entry is cut many times
    rows = [{"a": "x" * n, "é": ["]", '"', {"b": -1.5e3}]} for n in range(20)]
    assert rows_of(put("a.json", json.dumps(rows))) == rows
    assert rows_of(put("b.json", json.dumps(rows, indent=1, ensure_ascii=False))) == rows
    assert places(put("c.json", '\n[\n{"a": 1},\n\n{"a":\n 2}, {"a": 3}\n]')) == [
        "c.json:3",
        "c.json:5",
        "c.json:6",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ]', "a.json:1: no JSON array: Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', "a.json:2: no JSON array: expected `,` or `]`, found `{`"),
        ('[{"a": 1},\n', "a.json:2: no JSON array: Expecting value"),
        ('[{"a": 1}', "no JSON array: expected `,` or `]`, it ends too early"),
        (b'[{"a": "\xff"}]', "a.json: is not UTF-8"),
        ("[1,\n" + "[" * 100_000 + "]" * 100_000 + "]", "a.json:2: nested deeper than 128 levels"),
    ],
)
def test_a_broken_array_says_where(text, message):
    with pytest.raises(RecordError) as caught:
        rows_of(put("a.json", text))
    assert message.replace("expected `,` or `]`, it", "it") in str(caught.value)


def test_an_entry_that_is_no_object_is_one_bad_row(capfd):
    # `[`, the first row in six lines, and then the number
    put("a.json", json.dumps([ROWS[0], 3, ROWS[1]], indent=0))
    assert cli.run(["convert", "a.json"]) == 3
    assert "a.json:8: not a JSON object" in capfd.readouterr().err
    assert len(converted("a.json", "--rejects", "bad.jsonl")) == 2


def test_a_number_of_thousands_of_digits_is_one_bad_row(capfd):
    put("a.json", f'[{{"prompt": {"9" * 5000}}}, {json.dumps(ROWS[1])}]')
    assert cli.run(["convert", "a.json"]) == 3
    assert "a.json:1: no JSON: number is infinity" in capfd.readouterr().err
    assert len(converted("a.json", "--rejects", "bad.jsonl")) == 1


def test_an_array_of_any_size_takes_no_memory():
    import tracemalloc

    one = json.dumps({"prompt": "Q", "text": "x" * 1000})
    put("a.json", "[" + ",\n".join([one] * 6_000) + "]")  # 6 MB
    tracemalloc.start()
    count = sum(1 for _ in sources.RowReader(["a.json"], None).lines())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6_000
    assert peak < 1 << 20


# -- CSV, Parquet ----------------------------------------------------------------------------------


def test_cells_are_texts_but_for_labels_and_messages():
    talk = json.dumps([{"role": "user", "content": "Q"}])
    cells = {"prompt": "42", "messages": talk, "label": "True", "output": "[1, 2]", "empty": ""}
    assert rows_of(put("a.csv", csv_text([cells]))) == [
        {
            "prompt": "42",
            "messages": [{"role": "user", "content": "Q"}],
            "label": True,
            "output": "[1, 2]",
        }
    ]
    assert rows_of(put("b.csv", "label,margin\n0.5,2\nhigh,x\nnull,{}\n")) == [
        {"label": 0.5, "margin": 2},
        {"label": "high", "margin": "x"},
        {"label": "null", "margin": "{}"},
    ]
    assert places(put("c.csv", 'a,b\n1,"x\ny"\n\n2,z\n')) == ["c.csv:2", "c.csv:5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "a.csv:3: 1 cells, and the header names 2"),
        ("a,a\n1,2\n", "a.csv:1: the header names a column twice"),
        ('a,b\n1,"2\n', "a.csv:2: no CSV: unexpected end of data"),
        (b"a,b\n1,\xff\n", "a.csv: is not UTF-8"),
    ],
)
def test_a_broken_table_says_where(text, message):
    with pytest.raises(RecordError) as caught:
        rows_of(put("a.csv", text))
    assert message in str(caught.value)


def test_a_column_that_no_record_can_hold_is_named():
    with pytest.raises(RecordError, match=r"a.parquet:1: .* a column holds bytes"):
        rows_of(table_file("a.parquet", [{"prompt": "Q", "image": b"\x00"}]))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    late = pyarrow.array([2**60], pyarrow.timestamp("ms"))  # beyond the years that Python has
    parquet.write_table(pyarrow.table({"prompt": ["Q"], "time": late}), "late.parquet")
    with pytest.raises(RecordError, match=r"late.parquet: no Parquet"):
        rows_of("late.parquet")
    put("b.parquet", b"PAR1 and nothing more")
    with pytest.raises(RecordError, match="b.parquet: no Parquet"):
        rows_of("b.parquet")


def test_a_run_that_was_stopped_goes_on_in_an_array(monkeypatch):
    from polarctl.stages import convert

    rows = [{**ROWS[0], "id": str(i)} for i in range(10)]
    put("a.json", json.dumps(rows))
    monkeypatch.setattr(convert, "WINDOW_ROWS", 3)
    arguments = ["convert", "a.json", "-o", "out.jsonl"]
    assert cli.run([*arguments, "-q"]) == 0
    whole = open("out.jsonl", "rb").read()
    os.unlink("out.jsonl")
    os.unlink("out.jsonl.manifest.json")
    read, calls = convert.to_native, []

    def stops(row, config):
        calls.append(row)
        if row["id"] == "8":
            raise KeyboardInterrupt
        return read(row, config)

    monkeypatch.setattr(convert, "to_native", stops)
    assert cli.run(arguments) == 130
    monkeypatch.setattr(convert, "to_native", read)
    assert 0 < len(open("out.jsonl", "rb").read()) < len(whole)
    assert cli.run(arguments) == 0
    assert open("out.jsonl", "rb").read() == whole
    assert json.load(open("out.jsonl.manifest.json"))["counts"]["read.group"] == 10


def test_hub_ids_are_told_from_paths():
    put("org/name", "a file")
    assert sources.hub_id("org/name") is None
    assert sources.hub_id("hf://datasets/org/name") == "org/name"
    assert sources.hub_id("nvidia/HelpSteer3") == "nvidia/HelpSteer3"
    assert sources.hub_id("-") is None
    with pytest.raises(UsageError, match="no such file"):
        sources.expand(["org/*.json"])


def test_a_data_set_of_the_hub_is_streamed(monkeypatch, capfd):
    """From a Hub on this machine: the split that is asked for, and an id that it does not have."""
    from huggingface_hub import constants

    from tests.download_hub import serving

    pytest.importorskip("datasets")
    table_file("repo/train.parquet")
    table_file("repo/test.parquet", ROWS[1:])
    with serving("org/name", Path("repo"), "datasets") as url:
        # USE_TORCH: datasets imports torch where it is there, which takes seconds.
        here = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": "cache", "USE_TORCH": "0"}
        found = subprocess.run(
            [sys.executable, "-m", "polarctl", "convert", "org/name", "--source-split", "test"],
            env={**os.environ, **here},
            capture_output=True,
            text=True,
            timeout=300,
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert cli.run(["convert", "org/missing"]) == 2
    assert found.returncode == 0, found.stderr
    (record,) = map(json.loads, found.stdout.splitlines())
    assert record["candidates"] == WANTED[1]["candidates"]
    said = "polarctl: org/missing: no such file or folder here, and no such data set on the Hub"
    assert said in capfd.readouterr().err
