"""The studies under docs/studies run, and their verifiers tell right from wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

STUDIES = Path(__file__).parent.parent / "docs" / "studies"


def load(name: str) -> ModuleType:
    """A file of docs/studies as a module; one imports the other by its bare name."""
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


for shared in ("study", "additions"):  # the others import them
    load(shared)
additions, arithmetic = sys.modules["additions"], load("arithmetic")

# 37 + 48: the ones are 15, the tens 3 + 4 + 1 = 8, the total is 85.
ANSWERS = {
    "Ones 15, tens 8, so 85.": (True, ""),
    "First 15 and then 8: 85!": (True, ""),
    "I get 15 plus 8 tens, total 85": (True, ""),
    "We add 15, carry on to 8, answer 85.": (True, ""),
    "Ones 15, tens 7, so 75.": (True, "carry"),
    "Ones 8, tens 15, so 85.": (True, "order"),
    "Ones 15, tens 15, so 85.": (True, "twice"),
    "Ones 15, tens 8, so 58.": (True, "total"),
    "Ones 14, tens 8, so 84.": (True, "sum"),
    "Ones 15, so 85.": (False, "short"),
    "Ones 15, Ones 15, tens 8, so 85.": (False, "long"),
    "Ones 15, tens 8, so 85. so so": (False, "form"),
    "Ones 15, tens 8, so 85": (False, "form"),
    "First 15, tens 8, so 85.": (False, "form"),
    "Ones 015, tens 8, so 85.": (False, "form"),
    "": (False, "short"),
}


@pytest.mark.parametrize("text", ANSWERS)
def test_the_verifier_reads_the_whole_answer(text):
    form, mistake = ANSWERS[text]
    found = additions.checked({"truth": [15, 8, 85], "output": text})
    assert found == {"form": form, "correct": form and not mistake, "mistake": mistake}


def test_labels_of_rollouts_have_every_mistake_as_often_as_they_can():
    prompts = [{"prompt": "37+48", "truth": [15, 8, 85]}]
    wrong = ["Ones 15, tens 8, so 58.", "Ones 15, tens 8, so 95.", "Ones 15, so 85.", "Ones 1 2"]
    triples = [{"prompt": "37+48", "rejected": text} for text in wrong * 5]
    found = arithmetic.balanced(triples, prompts, 9, seed=0)
    kinds = [additions.checked({"truth": [15, 8, 85], "output": t["rejected"]}) for t in found]
    # 10 of each kind: two texts have a wrong total, two are too short.
    assert sorted(kind["mistake"] for kind in kinds) == ["short"] * 5 + ["total"] * 4
    assert arithmetic.balanced(triples, prompts, 99, seed=0) != triples
    assert len(arithmetic.balanced(triples, prompts, 99, seed=0)) == 20


@pytest.mark.slow
def test_the_study_of_additions_runs_from_policies_to_tables(tmp_path):
    result = subprocess.run(
        [sys.executable, str(STUDIES / "arithmetic.py"), "--smallest", "-o", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    for row in ("untouched", "SFT on the references", "RFT with POLAR, in rounds"):
        assert f"| {row}" in result.stdout
    assert result.stdout.endswith((tmp_path / "tables.md").read_text())
    folder = tmp_path / "seed-0"

    def rows(name):
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    test = {row["prompt"] for row in rows("prompts-test.jsonl")}
    assert len(test) == 40
    for name in ("prompts-train.jsonl", "prompts-rft.jsonl", "round2/rollouts.jsonl"):
        assert not test & {row["prompt"] for row in rows(name)}


def test_the_gsm8k_study_makes_triples_of_solutions_that_nobody_ranked():
    gsm8k = load("gsm8k")
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"We add 1 to {i}.\nSo {i} + 1.\n#### {i + 1}"}
        for i in range(10, 30)
    ]
    triples = list(gsm8k.made(rows))
    assert [row["prompt"] for row in triples] == [row["question"] for row in rows]
    for i, row in enumerate(triples, 10):
        assert row["reference"] == f"We add 1 to {i}.\nSo {i} + 1.\nA: {i + 1}"
        assert row["chosen"] in (f"We add 1 to {i}.\nA: {i + 1}", f"So {i} + 1.\nA: {i + 1}")
        kept, _, result = row["rejected"].partition("\nA: ")
        assert row["chosen"].startswith(kept) and result not in ("", str(i + 1))
    assert triples == list(gsm8k.made(rows))  # the same again


@pytest.mark.slow
@pytest.mark.parametrize("world", ["world", "text"])
def test_the_scaling_study_runs_from_policies_to_laws_and_resumes(tmp_path, world):
    command = [sys.executable, str(STUDIES / "scaling.py"), "--smallest", "--only", world]
    for _ in range(2):  # the second time everything is there
        result = subprocess.run(
            [*command, "-o", str(tmp_path)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / world / "laws" / "scaling.json").read_bytes())
    # Three sizes, two numbers of steps: the weights of three layers are 39 w^2 and some norms.
    sizes = sorted({run["parameters"] for run in found["runs"]})
    assert len(found["runs"]) == 6 and len(sizes) == 3
    for width, size in zip((16, 32, 48), sizes, strict=True):
        assert 39 * width**2 < size < 42 * width**2
    assert {run["triples"] for run in found["runs"]} == {16, 32}
    assert found["laws"]["N"]["fits"]


@pytest.mark.slow
def test_the_study_of_ablations_runs_to_its_tables_and_resumes(tmp_path):
    command = [sys.executable, str(STUDIES / "ablations.py"), "--smallest", "--seed", "0", "1"]
    for more in ([], ["--only", "temperature"]):  # the second time everything is there
        result = subprocess.run(
            [*command, *more, "-o", str(tmp_path)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in (tmp_path / "tables.md").read_text().splitlines()]
    label = {row[0].removeprefix("| "): row[1:] for row in rows}
    assert set(label) >= {"with everything", "without both", "3 references", "temperature 1.5"}
    few = (tmp_path / "tables-temperature.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in few[2:5]] == [
        "| with everything",
        "| temperature 0.5",
        "| temperature 1.5",
    ]
    # What was not measured has an empty cell; the figure is over the prompts of both seeds.
    assert label["without pre-training"][:3] == ["", "", ""]
    mean, _, rest = label["with everything"][3].partition(" [")
    seeds = [float(one) for one in rest.partition("(")[2].rstrip(" |)").split(", ")]
    assert len(seeds) == 2 and min(seeds) <= float(mean) <= max(seeds)
    policies = {
        row["policy"]
        for line in (tmp_path / "seed-0/arms/policies-few/triples.jsonl").read_text().splitlines()
        for row in [json.loads(line)]
    }
    assert len(policies) == 2 and not any(name.startswith("h-") for name in policies)


def test_three_seeds_have_an_interval_over_seeds_and_two_one_over_prompts():
    """Mean .3, deviation .1; 4.303 is Student's quantile: 4.303 * .1 / sqrt(3) = .2484.

    Two seeds of one prompt each, 0 and 1: half of the draws have both, a quarter each only one.
    """
    ablations = load("ablations")
    three = [{"a": 0.2}, {"a": 0.3}, {"a": 0.4}]
    assert ablations.figure(three) == pytest.approx((0.3, 0.3 - 0.2484, 0.3 + 0.2484), abs=1e-4)
    assert ablations.figure([{"a": 0.0}, {"a": 1.0}]) == pytest.approx((0.5, 0, 1))
    assert ablations.told([{"a": -1.0, "b": 0.0}], "+.1f") == "-50.0 [-100.0, +0.0]"
