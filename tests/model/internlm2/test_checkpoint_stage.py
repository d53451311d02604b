"""Published checkpoints through the program: score, convert there and back, fine-tune."""

import json

import pytest
from model.internlm2.official import build_official
from safetensors.torch import load_file

from polarctl.cli import run

GROUP = {
    "prompt": "What is the sum of 3 and 4?",
    "reference": "The sum is 7.",
    "candidates": [{"output": "It is 7."}, {"output": "Paris."}, {"output": ""}],
}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return build_official(tmp_path_factory.mktemp("official") / "polar-tiny")


@pytest.fixture(scope="module")
def llama(official, tmp_path_factory):
    target = tmp_path_factory.mktemp("llama") / "polar-tiny"
    assert run(["convert", "checkpoint", str(official), "-o", str(target), "-q"]) == 0
    return target


def rewards_of(model, folder):
    source, out = folder / "group.jsonl", folder / f"{model.parent.name}.jsonl"
    source.write_text(json.dumps(GROUP) + "\n")
    arguments = ["score", str(source), "-m", str(model), "-o", str(out), "--dtype", "float32"]
    assert run([*arguments, "--device", "cpu", "-q"]) == 0
    return json.loads(out.read_text())["rewards"]


def test_the_published_folder_and_the_converted_one_score_the_same(official, llama, tmp_path):
    first, second = rewards_of(official, tmp_path), rewards_of(llama, tmp_path)
    assert first == pytest.approx(second, abs=1e-6) and len(set(first)) == 3


def test_converting_prints_the_folder_and_says_where_it_comes_from(official, tmp_path, capfd):
    target = tmp_path / "polar"
    assert run(["convert", "checkpoint", str(official), "-o", str(target)]) == 0
    assert capfd.readouterr().out == f"{target}\n"
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["inputs"][0]["path"] == str(official)
    assert "model.safetensors" in manifest["outputs"]


def test_there_and_back_keeps_every_bit(official, llama, tmp_path):
    back, again = tmp_path / "back", tmp_path / "again"
    arguments = ["convert", "checkpoint", str(llama), "--to", "internlm2", "-o", str(back), "-q"]
    assert run(arguments) == 0
    assert json.loads((back / "config.json").read_text())["model_type"] == "internlm2"
    assert run(["convert", "checkpoint", str(back), "-o", str(again), "-q"]) == 0
    first, second = (load_file(path / "model.safetensors") for path in (llama, again))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_a_published_checkpoint_can_be_fine_tuned(official, tmp_path):
    rows = [
        {"prompt": f"q{i}", "reference": "7", "chosen": "7", "rejected": "Paris"} for i in range(8)
    ]
    data, out = tmp_path / "ranked.jsonl", tmp_path / "tuned"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["finetune", str(data), "-m", str(official), "-o", str(out), "--device", "cpu"]
    assert run([*arguments, "--lr", "1e-3", "--batch-size", "4", "--epochs", "6", "-q"]) == 0
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert len(rewards_of(out, tmp_path)) == 3


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["checkpoint"], 2),
        (["checkpoint", "nowhere-at-all"], 2),
        (["checkpoint", "SRC", "-o", "DST", "--to", "trl"], 2),
        (["checkpoint", "SRC", "-o", "SRC"], 2),
        (["checkpoint", "./nowhere", "-o", "DST"], 4),
    ],
)
def test_what_cannot_be_converted_is_refused(arguments, status, official, tmp_path, capfd):
    names = {"SRC": str(official), "DST": str(tmp_path / "new")}
    before = {path.name for path in official.iterdir()}
    assert run(["convert", *(names.get(word, word) for word in arguments)]) == status
    assert "hint: " in capfd.readouterr().err
    assert not (tmp_path / "new").exists()
    assert {path.name for path in official.iterdir()} == before
