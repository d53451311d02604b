"""Mistakes of a first day: each is one line that says what is wrong, and one with the remedy."""

import json

import pytest
from tiny import build_lm

from polarctl import cli

ROW = {"prompt": "Why?", "reference": "So.", "chosen": "So it is.", "rejected": "No."}
TRAIN = "-m lm -o made --device cpu --max-steps 1"
# What is typed: exit status, what is said, the remedy.
MISTAKES = {
    "pretrian rows.jsonl": (2, "no stage `pretrian`", "did you mean `pretrain`?"),
    f"finetune rows.jsonl {TRAIN} --learning-rate 1e-4": (
        2,
        "no such option: --learning-rate",
        "did you mean `--lr`?",
    ),
    f"finetune rows.jsonl {TRAIN} --config hf.yaml": (
        2,
        "hf.yaml: unknown key `learning_rate`",
        "did you mean `lr`?",
    ),
    f"finetune row.jsonl {TRAIN}": (2, "row.jsonl: no such file", "did you mean `rows.jsonl`?"),
    "score rows.jsonl -m ./nope": (4, "./nope: no such folder", "a folder with config.json"),
    "score rows.jsonl -m internlm/POLAR-7X": (
        4,
        "internlm/POLAR-7X: no such folder, not in the cache",
        "look at the network and HF_ENDPOINT",
    ),
    "score rows.jsonl -m lm": (4, "lm: has no reward head", "`finetune` make one"),
    f"finetune rows.csv {TRAIN}": (3, "rows.csv:1: no JSON", "polarctl convert FILE"),
    f"finetune rows.json {TRAIN}": (3, "rows.json:1: one JSON array", "polarctl convert FILE"),
    f"finetune asked.jsonl {TRAIN}": (
        3,
        "asked.jsonl:1: missing field `prompt`",
        "polarctl convert --map prompt=question",
    ),
    f"finetune plain.jsonl {TRAIN}": (
        3,
        "plain.jsonl:1: missing field `reference`",
        "--no-reference does without",
    ),
    "finetune rows.jsonl -m lm": (2, "a training stage writes a folder", "-o DIR"),
    "finetune rows.jsonl -o made --device cpu": (2, "pass either `--model`", "-m FOLDER"),
    f"finetune rows.jsonl {TRAIN.replace('cpu', 'cuda:99')}": (4, "GPUs found", "--device cpu"),
    "score rows.jsonl -m lm -o rows.jsonl": (2, "is both input and output", "another -o"),
    "eval rows.jsonl": (3, "rows.jsonl:1: has no reward", "`polarctl score` first"),
    "score rows.jsonl -m lm --server localhost:8000": (2, "no address", "http://127.0.0.1:8000"),
    "finetune lm -m lm -o made": (2, "lm: is a folder, not a file", "lm/*.jsonl"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    build_lm(folder / "lm")
    asked = {("question" if k == "prompt" else k): v for k, v in ROW.items()}
    plain = {k: v for k, v in ROW.items() if k != "reference"}
    for name, row in (("rows", ROW), ("asked", asked), ("plain", plain)):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "rows.json").write_text(f"[{json.dumps(ROW)}]\n")
    (folder / "rows.csv").write_text("prompt,reference,chosen,rejected\na,b,c,d\n")
    (folder / "hf.yaml").write_text("learning_rate: 1e-4\n")
    return folder


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(typed, world, monkeypatch, capfd):
    status, said, remedy = MISTAKES[typed]
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert cli.run(typed.split()) == status
    told = capfd.readouterr()
    lines = told.err.splitlines()
    error = next(i for i, line in enumerate(lines) if line.startswith("polarctl: "))
    assert len(lines) == error + 2, told.err  # the error, its hint, and nothing after them
    assert said in lines[error] and lines[error + 1].startswith("hint: ")
    assert remedy in lines[error + 1]
    assert told.out == "" and "Traceback" not in told.err
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
