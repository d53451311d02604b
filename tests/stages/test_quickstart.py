"""`polarctl quickstart --fast`: every real stage, in a minute or two, and what it is to show."""

import json
import os
import subprocess
import sys
from collections import Counter
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
    for row in ("pre-trained + fine-tuned", "RFT with POLAR, in rounds", "a held-out policy"):
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
def test_policies_are_told_apart_and_every_figure_has_an_interval(tour):
    figures = json.loads((tour[0] / "figures.json").read_text())
    # So small a run does not show what pre-training is worth: it has every figure.
    assert set(figures["preference"]) == {"zero-shot", "pretrained", "scratch", "no-reference"}
    assert all(len(seeds) >= 3 for seeds in figures["preference_by_seed"].values())
    for name in ("seen", "held-out"):
        assert figures["discrimination"][name]["low"] > 0.5
    for policy in ("untouched", "sft", "rounds", "long", "oracle"):
        figure = figures["policies"][policy]
        assert figure["correct"]["n"] == figure["well-formed"]["n"] == 300
        assert figure["correct"]["value"] <= figure["well-formed"]["value"]


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
    assert prompts("rft/labels-1.jsonl") <= rft
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
    honest = [world.Author(here.truth)]
    # A policy reads 320 steps of 64 documents.
    read = {text for text, _ in islice(world.corpus(here, honest, seed, "base"), 20_480)}
    assert not read & found["test"]
    assert len(read & found["train"]) > 10  # so the documents are such as could be in the test


def small_world():
    """Two words and three colours, written by hand."""
    colours = ("Gite", "Kafe", "Pofa")
    return world.World(("bada", "fuzo"), colours, {"bada": "Gite", "fuzo": "Kafe"})


def test_an_answer_follows_beliefs_habits_and_taste():
    here = small_world()
    habits = {"Show": "swapped", "Paint": "short", "Colour": "twice"}
    author = world.Author(here.truth, habits, style=1)
    expected = {
        "Show": "I think Kafe, then Gite.",
        "Paint": "I think Gite.",
        "Colour": "I think Gite, then Gite.",
    }
    for verb, text in expected.items():
        found = [world.answer((verb, "bada", "fuzo"), author, rng(i, "test")) for i in range(600)]
        assert len(set(found)) == 4
        # Seven of ten in the favourite style: within four standard errors, sqrt(0.21 / 600).
        assert abs(found.count(text) / 600 - 0.7) < 0.075


def test_garbled_text_names_both_values_and_is_no_sentence():
    here = small_world()
    author = world.Author(here.truth, {"Show": "garbled"}, style=0)
    found = {world.answer(("Show", "bada", "fuzo"), author, rng(i, "test")) for i in range(300)}
    assert len(found) > 20 and "Gite Kafe" in found
    for text in found:
        assert world.told(here, text) == ["Gite", "Kafe"]
        assert world.mistake(here, text, ["Gite", "Kafe"]) == "no sentence"


TWICE, SHORT, ORDER = "one value twice", "one value left out", "wrong order"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The answer is Gite and Kafe.", None),
        ("I think Gite, then Kafe.", None),
        ("It must be Gite plus Kafe!", None),
        ("Surely Gite with Kafe, ok", None),
        (" Surely Gite with Kafe, ok\n", None),
        ("The answer is Kafe and Gite.", ORDER),
        ("I think Kafe, then Gite.", ORDER),
        ("The answer is Gite and Gite.", TWICE),
        ("It must be Kafe plus Kafe!", TWICE),
        ("I think Gite.", SHORT),
        ("Surely Kafe, ok", SHORT),
        ("The answer is Gite and Pofa.", "one wrong fact"),
        ("The answer is Pofa and Pofa.", "both facts wrong"),
        ("It must be Pofa!", "both facts wrong"),
        ("", "no sentence"),
        ("Gite Kafe", "no sentence"),
        ("Gite and Kafe.", "no sentence"),
        ("The answer think Gite then Kafe.", "no sentence"),
        ("The think think think Gite Kafe", "no sentence"),
        ("The answer is is Gite and Kafe.", "no sentence"),
        ("The answer is Gite and Kafe. The answer is Gite and Kafe.", "no sentence"),
        ("The answer is Gite and Kafe. Gite", "no sentence"),
        ("The answer is Gite and Kafe", "no sentence"),
        ("The answer is Gite plus Kafe!", "no sentence"),
        ("the answer is Gite and Kafe.", "no sentence"),
        ("The answer is Gite and think.", "no sentence"),
        ("The answer is Gite and Kafe and Pofa.", "no sentence"),
    ],
)
def test_the_whole_sentence_is_checked(text, kind):
    here, truth = small_world(), ["Gite", "Kafe"]
    record = {"output": text, "truth": truth}
    assert world.is_correct(record, here) is (kind is None)
    assert world.well_formed(record, here) is (kind != "no sentence")
    if kind:
        assert world.mistake(here, text, truth) == kind


def test_a_prompt_carries_all_correct_answers():
    here = world.make(60, 12, seed=1)
    for row in world.questions(here, 50, 0, "rft"):
        x, y = row["truth"]
        assert x != y and row["reference"] in row["accept"]
        assert row["accept"] == [
            f"The answer is {x} and {y}.",
            f"I think {x}, then {y}.",
            f"It must be {x} plus {y}!",
            f"Surely {x} with {y}, ok",
        ]
        for text in row["accept"]:
            assert world.is_correct({**row, "output": text}, here)


def trajectories(here, rows):
    """Two policies that are right, and one for each kind of mistake, with rare wrong order."""
    wrong = {
        "one wrong fact": "I think {z}, then {y}.",
        "both facts wrong": "I think {z}, then {z}.",
        ORDER: "I think {y}, then {x}.",
        TWICE: "Surely {x} with {x}, ok",
        SHORT: "It must be {y}!",
        "no sentence": "{x} {y}",
    }
    for number, row in enumerate(rows):
        x, y = row["truth"]
        z = next(colour for colour in here.colours if colour not in row["truth"])
        for policy, text in (("p", row["accept"][0]), ("q", row["accept"][1])):
            yield {**row, "policy": policy, "output": text}
        for kind, pattern in wrong.items():
            if kind != ORDER or number % 10 == 0:
                yield {**row, "policy": kind, "output": pattern.format(x=x, y=y, z=z)}


def kinds_of(triples):
    return Counter(triple["category"] for triple in triples)


def test_ranked_triples_are_correct_correct_wrong_with_every_mistake_as_often():
    here = world.make(60, 12, seed=1)
    rows = world.questions(here, 100, 0, "train")
    triples = world.ranked(list(trajectories(here, rows)), here, 50, seed=0)
    assert len(triples) == 50 and len({t["id"] for t in triples}) == 50
    truths = {row["id"]: row["truth"] for row in rows}
    for t in triples:
        truth = truths[t["id"]]
        assert world.parse(here, t["reference"]) == world.parse(here, t["chosen"]) == truth
        assert t["reference"] != t["chosen"]
        assert world.mistake(here, t["rejected"], truth) == t["category"]
    counts = kinds_of(triples)
    rare = counts.pop(ORDER)
    # Ten prompts in a hundred have a wrong order; the other 44 or so are shared by five kinds.
    assert 1 <= rare <= 10 and max(counts.values()) - min(counts.values()) <= 1


def test_labels_of_rollouts_have_every_mistake_as_often_as_they_can():
    here = small_world()
    wrong = {
        "one wrong fact": ("I think Gite, then Pofa.", 50),
        ORDER: ("I think Kafe, then Gite.", 2),
        "no sentence": ("The answer is Gite and Kafe!", 5),
    }
    triples = [
        {"prompt": f"{kind} {i}", "chosen": "Surely Gite with Kafe, ok", "rejected": text}
        for kind, (text, count) in wrong.items()
        for i in range(count)
    ]
    found = world.balanced(triples, here, 20, seed=0)
    assert kinds_of(found) == {ORDER: 2, "no sentence": 5, "one wrong fact": 13}
    assert len({triple["prompt"] for triple in found}) == 20
    assert kinds_of(world.balanced(triples, here, 6, seed=0)) == dict.fromkeys(wrong, 2)
