import gzip
import json
import subprocess
import sys
from collections import Counter

import pytest

from polarctl import cli
from polarctl.stages.convert import Config, convert

GROUP = {
    "prompt": "Q",
    "reference": "R",
    "candidates": [{"output": "a", "label": 1}, {"output": "b", "label": 0}],
}
PREFERENCE = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(name, *rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (gzip.open if name.endswith(".gz") else open)(name, "wb").write(data)
    return name


def get(name):
    return [json.loads(line) for line in open(name, encoding="utf-8")]


def test_the_pure_function_reads_expands_and_counts():
    counts = Counter()
    same = {**GROUP, "candidates": [{"output": "a", "label": 1}]}
    made = list(convert([GROUP, same], Config(to_format="triples"), counts))
    assert made == [{"prompt": "Q", "reference": "R", "chosen": "a", "rejected": "b"}]
    assert +counts == {"rows": 2, "no_pair": 1, "format.native": 2, "read.group": 2}


def test_fields_are_renamed_first_and_may_be_swapped():
    row = {"prompt": "Q", "winner": "good", "loser": "bad", "human": "R", "chosen": "old"}
    config = Config(map=("chosen=winner", "rejected=loser", "reference=human"))
    assert list(convert([row], config)) == [
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "reference": "R"}
    ]
    swapped = Config(map=("chosen=rejected", "rejected=chosen"), to_format="trl")
    assert list(convert([PREFERENCE], swapped)) == [
        {"prompt": "Q", "chosen": "bad", "rejected": "good"}
    ]


def test_exported_nulls_and_numeric_ids_are_put_right():
    row = {**PREFERENCE, "id": 7, "reference": None, "category": None, "note": None}
    (made,) = convert([row], Config())
    assert made["id"] == "7" and made["note"] is None and "candidates" in made
    assert "category" not in made and "reference" not in made


def test_train_and_test_share_no_prompt_and_lose_none():
    rows = [{**GROUP, "prompt": f"question {i // 2}", "n": i} for i in range(60)]
    train = list(convert(rows, Config(split="train", test_share=0.4)))
    test = list(convert(rows, Config(split="test", test_share=0.4)))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert sorted(r["n"] for r in train + test) == list(range(60))
    assert train and test


def test_auto_says_its_choice_once_and_the_manifest_keeps_it(capfd):
    put("in.jsonl.gz", PREFERENCE, PREFERENCE, {"prompt": "Q", "reference": "R"})
    assert cli.run(["convert", "in.jsonl.gz", "-o", "out.jsonl"]) == 0
    err = capfd.readouterr().err
    assert err.count("format: trl (rows have `chosen` and `rejected`)") == 1
    assert "3 rows gave 3 records" in err
    manifest = json.load(open("out.jsonl.manifest.json"))
    assert manifest["choices"]["format"]["value"] == "trl, native"
    assert manifest["counts"]["rows"] == 3
    assert get("out.jsonl")[0]["candidates"][0] == {"output": "good", "label": 1}


def test_a_pipe_gives_what_a_file_gives():
    put("in.jsonl", GROUP, GROUP)
    assert cli.run(["convert", "in.jsonl", "--to", "trl", "-o", "out.jsonl"]) == 0
    command = f"{sys.executable} -c 'from polarctl.cli import main; main()' convert"
    piped = subprocess.run(
        f"{command} --to triples < in.jsonl | {command} - --to trl",
        shell=True,
        capture_output=True,
        check=True,
    )
    assert piped.stdout == open("out.jsonl", "rb").read()


def test_a_bad_row_stops_with_its_line_or_is_set_aside(capfd):
    put("in.jsonl", PREFERENCE, {"prompt": "Q", "chosen": "a"}, GROUP)
    arguments = ["convert", "in.jsonl", "--from", "trl", "-o", "out.jsonl"]
    assert cli.run(arguments) == 3
    assert "polarctl: in.jsonl:2: missing field `rejected`" in capfd.readouterr().err
    assert cli.run([*arguments, "--rejects", "bad.jsonl", "--force"]) == 0
    (bad,) = get("bad.jsonl")
    assert (bad["where"], bad["reason"]) == ("in.jsonl:2", "missing field `rejected`")
    assert len(get("out.jsonl")) == 2


def test_what_the_target_cannot_carry_stops_with_the_line_too(capfd):
    put("in.jsonl", {"prompt": "Q", "reference": "R"}, GROUP)
    assert cli.run(["convert", "in.jsonl", "--to", "openai", "-o", "out.jsonl"]) == 3
    err = capfd.readouterr().err
    assert "in.jsonl:2: `openai` has no place for candidates" in err
    assert "hint: --to trl" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "openia"], "did you mean `openai`?"),
        (["--to", "triple"], "did you mean `triples`?"),
        (["--map", "chosen"], "not of the form OURS=THEIRS"),
        (["-o", "x.parquet"], "only `--to verl` writes Parquet"),
    ],
)
def test_a_wrong_option_is_a_usage_error_with_the_way_out(options, message, capfd):
    put("in.jsonl", GROUP)
    assert cli.run(["convert", "in.jsonl", *options]) == 2
    assert message in capfd.readouterr().err


def test_a_mapped_field_that_is_missing_is_said(capfd):
    put("in.jsonl", PREFERENCE)
    assert cli.run(["convert", "in.jsonl", "--map", "reference=answr"]) == 3
    assert "in.jsonl:1: no field `answr` to rename" in capfd.readouterr().err


def test_a_dry_run_checks_the_rows_and_writes_nothing(tmp_path, capfd):
    put("in.jsonl", PREFERENCE)
    assert cli.run(["convert", "in.jsonl", "-o", "out.jsonl", "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert "1 records" in capfd.readouterr().err
    assert cli.run(["convert", "in.jsonl", "--to", "triples", "--dry-run"]) == 3


def test_verl_rows_as_parquet(capfd):
    parquet = pytest.importorskip("pyarrow.parquet")
    put("in.jsonl", GROUP, {"prompt": "no reference"}, {**GROUP, "category": "maths", "x": 1})
    arguments = ["convert", "in.jsonl", "--to", "verl", "-o", "out.parquet"]
    assert cli.run(arguments) == 3
    assert "in.jsonl:2: missing field `reference`" in capfd.readouterr().err
    assert cli.run([*arguments, "--rejects", "bad.jsonl", "--force"]) == 0
    rows = parquet.read_table("out.parquet").to_pylist()
    assert [row["data_source"] for row in rows] == ["polarctl", "maths"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Q"}]
    assert rows[0]["reward_model"] == {"style": "polar", "ground_truth": "R"}
    manifest = json.load(open("out.parquet.manifest.json"))
    assert manifest["outputs"]["out.parquet"]["records"] == 2
    assert manifest["counts"]["rejects"] == 1
    # The same rows as JSON lines, for a pipe.
    put("good.jsonl", GROUP, {**GROUP, "category": "maths", "x": 1})
    assert cli.run(["convert", "good.jsonl", "--to", "verl", "-o", "out.jsonl"]) == 0
    assert get("out.jsonl") == rows
    assert cli.run(arguments) == 2  # the finished file is not replaced


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    put("in.jsonl", GROUP)
    assert cli.run(["convert", "in.jsonl", "--to", "verl", "-o", "out.parquet"]) == 4
    assert "pip install 'polarctl[verl]'" in capfd.readouterr().err


def test_triples_whose_chosen_text_is_the_reference_are_counted_and_dropped_on_request(capfd):
    three = [{"output": f" R{space}R", "label": 2 - i} for i, space in enumerate((" ", "\n"))]
    three.append({"output": "other", "label": 0})
    rows = [
        {"prompt": "Q", "reference": "R R", "candidates": three},  # 2 > 1 > 0: three pairs
        {"prompt": "P", "reference": [{"role": "assistant", "content": "x"}], "chosen": "x "}
        | {"rejected": "y"},
        GROUP,
    ]
    source = put("in.jsonl", *rows)
    # Chosen is a copy in all three pairs of the group and in the triple of messages.
    for choice, left in (("keep", 5), ("drop", 1)):
        options = ["--to", "triples", "--equal-chosen", choice, "-o", f"{choice}.jsonl"]
        assert cli.run(["convert", source, *options]) == 0
        assert len(get(f"{choice}.jsonl")) == left
        assert "in 4 triples the chosen text is the reference" in capfd.readouterr().err
    assert get("drop.jsonl")[0]["chosen"] == "a"
    assert cli.run(["convert", source, "--to", "trl", "--equal-chosen", "drop"]) == 2
    assert "`--equal-chosen` is for `--to triples`" in capfd.readouterr().err
