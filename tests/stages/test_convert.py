import gzip
import json
import subprocess
import sys
from collections import Counter

import pytest

from polarctl import cli
from polarctl.errors import RecordError
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


# -- what was read, what is left -----------------------------------------------------------------


def test_it_says_what_the_rows_were_and_what_nothing_reads(capfd):
    orca = {"system": "S", "question": "Q", "chosen": "The a", "rejected": "The b", "n": 1}
    put("in.jsonl", orca, orca, {"prompt": "P", "completion": "bad", "label": False, "from": "me"})
    assert cli.run(["convert", "in.jsonl", "-o", "out.jsonl"]) == 0
    err = capfd.readouterr().err
    assert "format: trl (rows have `chosen` and `rejected`; `question` is the prompt)" in err
    assert "3 rows gave 3 records; read as trl: 2 groups of candidates, 1 candidates" in err
    assert "left unused, but kept: `n`, `from`" in err
    counts = json.load(open("out.jsonl.manifest.json"))["counts"]
    assert (counts["unused.n"], counts["read.group"], counts["read.single"]) == (2, 2, 1)
    assert [record["prompt"] for record in get("out.jsonl")[:2]] == [
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    ] * 2


def test_what_is_left_out_is_said(capfd):
    unlabelled = {**GROUP, "candidates": [*GROUP["candidates"], {"output": "c"}]}
    put("in.jsonl", unlabelled)
    assert cli.run(["convert", "in.jsonl", "--to", "trl"]) == 0
    assert "; 1 candidates without a label are left out" in capfd.readouterr().err
    put(
        "in.jsonl",
        {**GROUP, "candidates": [{"output": w, "label": n} for n, w in enumerate("abc")]},
    )
    for target in ("trl", "nemo", "triples"):
        assert cli.run(["convert", "in.jsonl", "--to", target]) == 0
        assert "; 1 groups have grades, of which only the order" in capfd.readouterr().err
    talk = [{"role": "assistant", "content": "a"}]
    put("in.jsonl", {**PREFERENCE, "chosen": talk, "reference": talk, "rejected": "b"})
    for target in ("llama-factory", "verl"):
        assert cli.run(["convert", "in.jsonl", "--to", target, "--from", "native"]) == 0
        assert "; 1 rows have answers as messages" in capfd.readouterr().err
    for target in ("prompts", "verl"):
        assert cli.run(["convert", "in.jsonl", "--to", target]) == 0
        assert "; 1 rows had candidates, which are left out" in capfd.readouterr().err


def test_answers_that_would_go_unused_stop_the_run_unless_prompts_are_asked_for(capfd):
    put("in.jsonl", {"prompt": "Q", "response_x": 1, "responses": ["a", "b"]})
    assert cli.run(["convert", "in.jsonl", "-o", "out.jsonl"]) == 3
    err = capfd.readouterr().err
    assert "in.jsonl:1: `responses` looks like an answer and would go unused" in err
    assert "hint: --map candidates=responses reads a list of texts; --to prompts" in err
    assert cli.run(["convert", "in.jsonl", "--map", "candidates=responses", "-o", "c.jsonl"]) == 0
    assert get("c.jsonl")[0]["candidates"] == [{"output": "a"}, {"output": "b"}]
    assert cli.run(["convert", "in.jsonl", "--to", "prompts", "-o", "p.jsonl"]) == 0
    assert get("p.jsonl")[0]["prompt"] == "Q"


def test_pairs_without_a_reference_name_the_ways_out(capfd):
    put("in.jsonl", PREFERENCE)
    assert cli.run(["convert", "in.jsonl", "--to", "triples"]) == 3
    err = capfd.readouterr().err
    assert "in.jsonl:1: no `reference`" in err
    for way in ("--map reference=FIELD", "--to trl", "finetune --no-reference"):
        assert way in err


def test_the_same_fault_is_named_once_with_its_number(capfd):
    put("in.jsonl", *[{"prompt": "Q", "chosen": "a"}] * 150, {"prompt": 3, "candidates": []})
    assert cli.run(["convert", "in.jsonl", "--from", "trl", "--dry-run"]) == 3
    err = capfd.readouterr().err
    assert err.count("missing field `rejected`") == 2
    assert "warning: in.jsonl:1: missing field `rejected`\n" in err
    assert "missing field `rejected`: 149 more such rows, the last is in.jsonl:150" in err
    assert "151 of 151 records are bad" in err
    options = ["--from", "trl", "-o", "out.jsonl", "--rejects", "bad.jsonl"]
    assert cli.run(["convert", "in.jsonl", *options]) == 0
    err = capfd.readouterr().err
    assert "151 records set aside in bad.jsonl" in err
    assert "  150 of them: missing field `rejected`" in err
    assert len(get("bad.jsonl")) == 151
    assert cli.run(["validate", "in.jsonl", "--kind", "triple"]) == 3
    assert capfd.readouterr().err.count("missing field `reference`") == 2


def test_fields_inside_others_are_mapped():
    row = {"prompt": "Q", "out": [{"text": "a"}], "meta": {"gold": {"text": "R"}, "n": 1}}
    config = Config(map=("reference=meta.gold.text", "output=out.0.text"), to_format="native")
    assert list(convert([row], config)) == [
        {"reference": "R", "output": "a", "prompt": "Q", "out": [{"text": "a"}], "meta": {"n": 1}}
    ]
    # A field whose name has a dot comes first.
    dotted = {"prompt": "Q", "a.b": "R", "a": {"b": "x"}}
    assert list(convert([dotted], Config(map=("reference=a.b",)))) == [
        {"reference": "R", "prompt": "Q", "a": {"b": "x"}}
    ]
    with pytest.raises(RecordError, match="no field `meta.silver` to rename"):
        list(convert([row], Config(map=("reference=meta.silver",))))


def test_verl_rows_carry_their_part_and_ability():
    rows = [{**GROUP, "prompt": f"Q{i}", "ability": "math"} for i in range(9)]
    made = list(convert(rows, Config(to_format="verl", split="test", test_share=0.5)))
    assert made and {row["extra_info"]["split"] for row in made} == {"test"}
    assert {row["ability"] for row in made} == {"math"}
    own = {**GROUP, "split": "validation"}
    (row,) = convert([own], Config(to_format="verl"))
    assert row["extra_info"]["split"] == "validation"


# -- by reward -------------------------------------------------------------------------------------

SCORED = {
    "prompt": "Q",
    "reference": "R",
    "candidates": [
        {"output": "a", "name": "m1"},
        {"output": "b", "name": "m2"},
        {"output": "c"},
    ],
    "rewards": [-1.5, 2.0, -3.0],
    "normalized": [0.1, 0.9, 0.0],
    "id": "q",
}


def test_the_best_and_the_worst_by_reward_are_a_pair():
    (pair,) = convert([SCORED], Config(to_format="trl", by="reward"))
    assert pair == {
        "prompt": "Q",
        "reference": "R",
        "chosen": "b",
        "rejected": "c",
        "policy": "m2",
        "score_chosen": 2.0,
        "score_rejected": -3.0,
        "id": "q",
    }
    (triple,) = convert([SCORED], Config(to_format="triples", by="reward"))
    assert (triple["reference"], triple["chosen"], triple["rejected"]) == ("R", "b", "c")
    # 2.0 - -3.0 = 5.0
    assert list(convert([SCORED], Config(to_format="trl", by="reward", min_margin=5.0))) == [pair]
    assert not list(convert([SCORED], Config(to_format="trl", by="reward", min_margin=5.1)))
    equal = {**SCORED, "rewards": [1.0, 1.0, 1.0]}
    assert not list(convert([equal], Config(to_format="trl", by="reward")))
    # A label that contradicts the reward counts for `--by label` alone.
    known = [{"output": "a", "label": 1}, {"output": "b", "label": 0}]
    both = {"prompt": "Q", "candidates": known, "rewards": [0.0, 1.0]}
    assert [
        next(iter(convert([both], Config(to_format="trl", by=by))))["chosen"]
        for by in ("label", "reward")
    ] == ["a", "b"]


def test_the_best_of_a_group_is_an_answer_for_sft():
    (row,) = convert([SCORED], Config(to_format="openai", by="reward", best_of_n=True))
    assert row == {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}],
        "reference": "R",
        "policy": "m2",
        "reward": 2.0,
        "id": "q",
    }
    (row,) = convert([GROUP], Config(to_format="trl", best_of_n=True))
    assert row == {"prompt": "Q", "reference": "R", "completion": "a"}


@pytest.mark.parametrize("target", ["trl", "sharegpt", "nemo", "llama-factory", "triples"])
def test_a_group_without_labels_does_not_vanish(target, capfd):
    put("in.jsonl", SCORED)
    assert cli.run(["convert", "in.jsonl", "--to", target]) == 3
    err = capfd.readouterr().err
    assert "in.jsonl:1: no candidate has a `label` to compare by" in err
    assert "hint: --by reward" in err
    put("bare.jsonl", {**GROUP, "candidates": [{"output": "a"}, {"output": "b"}]})
    assert cli.run(["convert", "bare.jsonl", "--to", target, "--by", "reward"]) == 3
    assert "hint: `polarctl score` adds them" in capfd.readouterr().err


def test_pairs_that_do_not_differ_enough_are_counted(capfd):
    put("in.jsonl", SCORED, {**SCORED, "rewards": [0.0, 0.1, 0.2]})
    options = ["--to", "trl", "--by", "reward", "--min-margin", "1", "-o", "out.jsonl"]
    assert cli.run(["convert", "in.jsonl", *options]) == 0
    assert "1 rows have no candidates that differ enough" in capfd.readouterr().err
    assert len(get("out.jsonl")) == 1


# -- neighbouring rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "1.5", True, [1.0], {}])
def test_a_reward_that_is_no_number_is_a_bad_record(value, tmp_path, capfd):
    path = tmp_path / "in.jsonl"
    group = {"prompt": "q", "candidates": [{"output": "a"}, {"output": "b"}], "rewards": [value, 1]}
    path.write_text(json.dumps(group))
    for more in (["--to", "trl"], ["--best-of-n"]):
        assert cli.run(["convert", str(path), "--by", "reward", *more]) == 3
        assert f"{path}:1: field `rewards" in capfd.readouterr().err


def test_neighbouring_rows_of_one_prompt_become_a_group(capfd):
    rating = {"prompt": "Q", "response": "a", "helpfulness": 3, "verbosity": 1}
    put(
        "ratings.jsonl",
        rating,
        {**rating, "response": "b", "helpfulness": 1},
        {**rating, "prompt": "P", "response": "c"},
        {**rating, "response": "d"},  # the same prompt, but no neighbour
    )
    assert cli.run(["convert", "ratings.jsonl", "--join", "prompt", "-o", "out.jsonl"]) == 0
    assert "3 rows gave 3 records; read as helpsteer: groups" in capfd.readouterr().err
    first, second, third = get("out.jsonl")
    assert first == {
        "prompt": "Q",
        "verbosity": 1,
        "candidates": [{"output": "a", "label": 3}, {"output": "b", "label": 1}],
    }
    assert [len(record["candidates"]) for record in (second, third)] == [1, 1]
    assert cli.run(["convert", "ratings.jsonl", "--join", "prompt", "--limit", "1"]) == 0
    assert json.loads(capfd.readouterr().out) == first


def test_rollouts_become_pairs_by_their_rewards():
    rows = [
        {"prompt": p, "reference": "R", "id": p, "output": f"{p}{s}", "policy": "me"}
        | {"sample": s, "step": 1, "reward": reward}
        for p in "QP"
        for s, reward in enumerate([0.5, -1.0, 2.0])
    ]
    put("rollouts.jsonl", *rows)
    options = ["--join", "id", "--by", "reward", "--to", "trl", "-o", "dpo.jsonl"]
    assert cli.run(["convert", "rollouts.jsonl", *options]) == 0
    assert get("dpo.jsonl")[1] == {
        "prompt": "P",
        "reference": "R",
        "chosen": "P2",
        "rejected": "P1",
        "policy": "me",
        "rejected_policy": "me",
        "score_chosen": 2.0,
        "score_rejected": -1.0,
        "id": "P",
        "step": 1,
    }


@pytest.mark.parametrize(
    ("rows", "status", "message"),
    [
        ([{"prompt": "Q", "output": "a"}], 3, "in.jsonl:1: no field `key` (--join key)"),
        ([{"prompt": "Q", "reference": "a", "key": 1}], 3, "has no single answer"),
        (
            [{"prompt": p, "output": "a", "key": 1} for p in "QP"],
            3,
            "in.jsonl:1: rows to join differ in their `prompt`",
        ),
        ([[1]], 3, "in.jsonl:1: not a JSON object"),
    ],
)
def test_rows_that_cannot_be_joined_are_refused(rows, status, message, capfd):
    assert cli.run(["convert", put("in.jsonl", *rows), "--join", "key"]) == status
    assert message in capfd.readouterr().err
