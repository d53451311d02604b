"""`polarctl quickstart --fast`: every real stage, in a minute or two, and what it is to show."""

import json
import os
import subprocess
import sys
from itertools import islice

import pytest

from polarctl.quickstart import world
from polarctl.seeding import rng


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour") / "out"
    result = subprocess.run(
        [sys.executable, "-m", "polarctl", "quickstart", "--fast", "-o", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.mark.slow
def test_it_prints_each_command_and_ends_with_table_report_and_a_line_to_try(tour):
    folder, result = tour
    assert result.stdout == f"{folder}/report.html\n"
    for stage in ("sample", "pair", "pretrain", "score", "eval", "finetune", "rft"):
        assert f"$ polarctl {stage} " in result.stderr
    for row in ("pre-trained + fine-tuned", "RFT with POLAR", "a held-out policy"):
        assert row in result.stderr
    assert "<html" in (folder / "report.html").read_text()
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    tried = subprocess.run(
        ["bash", "-c", result.stderr.strip().splitlines()[-1]],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert tried.returncode == 0, tried.stderr
    assert len(json.loads(tried.stdout)["rewards"]) == 2


@pytest.mark.slow
def test_pretraining_shows_its_worth(tour):
    figures = json.loads((tour[0] / "figures.json").read_text())
    preference = figures["preference"]
    assert preference["pretrained"]["low"] > preference["scratch"]["high"]
    assert preference["pretrained"]["low"] > preference["no-reference"]["high"]
    assert all(len(seeds) >= 3 for seeds in figures["preference_by_seed"].values())
    for name in ("seen", "held-out"):
        assert figures["discrimination"][name]["low"] > 0.5
    assert set(figures["policies"]) == {"untouched", "sft", "rft"}


@pytest.mark.slow
def test_no_training_sees_a_test_prompt(tour):
    folder, _ = tour

    def prompts(name):
        return {json.loads(line)["prompt"] for line in (folder / name).read_text().splitlines()}

    test, train = prompts("prompts-test.jsonl"), prompts("prompts-train.jsonl")
    rft = prompts("prompts-rft.jsonl")  # of the supervised run too
    assert len(test) == 300 and len(train) == 500 and len(rft) == 48
    assert not test & train and not test & rft and not train & rft
    for name in ("triples.jsonl", "ranked-train.jsonl", "samples-train.jsonl"):
        assert prompts(name) <= train
    for name in ("test-seen.jsonl", "test-held-out.jsonl", "ranked-test.jsonl"):
        assert prompts(name) <= test


@pytest.mark.slow
def test_the_same_command_again_finds_everything_done(tour):
    folder, _ = tour
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    result = subprocess.run(
        [sys.executable, "-m", "polarctl", "quickstart", "--fast", "-o", str(folder)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


# -- the world ------------------------------------------------------------------------------------


def test_beliefs_are_wrong_in_exactly_their_share_and_use_every_colour_as_often():
    here = world.make(100, 20, seed=1)
    table = world.beliefs(here, 0.6, seed=2)
    assert sum(table[word] == here.truth[word] for word in here.words) == 60
    assert sorted(table.values()) == sorted(here.truth.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("words", "colours"), [(640, 64), (96, 24)])
def test_no_two_parts_share_a_prompt_and_no_corpus_has_one_of_the_test(words, colours, seed):
    here = world.make(words, colours, seed)
    counts = {"train": 2000, "test": 1000, "rft": 2560}
    found = {
        part: {row["prompt"] for row in world.questions(here, count, seed, part)}
        for part, count in counts.items()
    }
    assert {part: len(prompts) for part, prompts in found.items()} == counts
    assert not found["train"] & found["test"]
    assert not found["train"] & found["rft"]
    assert not found["test"] & found["rft"]
    honest = [world.Author(here.truth, {})]
    # A policy reads 320 steps of 64 documents.
    read = {text for text, _ in islice(world.corpus(here, honest, seed, "base"), 20_480)}
    assert not read & found["test"]
    assert len(read & found["train"]) > 10  # so the documents are such as could be in the test


def test_an_answer_follows_beliefs_and_habits():
    here = world.make(10, 5, seed=1)
    a, b = here.words[:2]
    author = world.Author(here.truth, {"Show": "swapped", "Paint": "short", "Colour": "twice"})
    x, y = here.truth[a], here.truth[b]
    expected = {"Show": [y, x], "Paint": [x], "Colour": [x, x]}
    for verb, values in expected.items():
        text = world.answer((verb, a, b), author, rng(0, "test"))
        assert world.told(here, text) == values


def test_only_the_true_colours_in_their_order_are_correct():
    here = world.make(10, 5, seed=1)
    (row,) = world.questions(here, 1, 0, "train")
    first, second = row["truth"]
    for text, right in (
        (row["reference"], True),
        (f"I think {first}, then {second}.", True),
        (f"I think {second}, then {first}.", first == second),
        (f"I think {first}.", False),
        (f"It must be {first} plus {second}! {first}", False),
    ):
        assert world.is_correct({**row, "output": text}, here) is right


def test_a_mistake_has_a_name():
    here = world.make(10, 5, seed=1)
    x, y, z = here.colours[:3]
    for named, name in (
        ((y, x), "wrong order"),
        ((x, x), "one value twice"),
        ((y,), "one value left out"),
        ((x, z), "wrong fact"),
    ):
        assert world.mistake(here, " ".join(named), [x, y]) == name


def test_ranked_triples_are_correct_correct_wrong():
    here = world.make(10, 5, seed=1)
    rows = world.questions(here, 20, 0, "train")
    honest = world.Author(here.truth, {})
    wrong = world.Author(world.beliefs(here, 0.0, 3), {})
    samples = []
    for row in rows:
        question = (row["prompt"].split()[0], *row["prompt"].replace(" and ", " ").split()[1:])
        for policy, author in (("x", honest), ("y", honest), ("z", wrong)):
            text = world.answer(question, author, rng(0, policy, row["id"]))
            samples.append({**row, "policy": policy, "output": text})
    triples = world.ranked(samples, here, 10, seed=0)
    assert len(triples) == 10 and len({t["id"] for t in triples}) == 10
    truths = {row["id"]: row["truth"] for row in rows}
    for t in triples:
        assert world.told(here, t["reference"]) == world.told(here, t["chosen"]) == truths[t["id"]]
        assert world.told(here, t["rejected"]) != truths[t["id"]]
