"""Telling policies apart: figures against sums by hand, and against scipy."""

import json
import math

import numpy as np
import pytest

import polarctl
from polarctl.cli import run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def duel(prompt, own, other, rewards, chosen="a b", rejected="c d", **more):
    return {
        "prompt": prompt,
        "reference": "a b",
        "chosen": chosen,
        "rejected": rejected,
        "policy": own,
        "rejected_policy": other,
        "reference_policy": own,
        "rewards": rewards,
        **more,
    }


def figures(tmp_path, rows, *options):
    path = write(tmp_path / "scored.jsonl", rows)
    arguments = ["eval", path, "-o", str(tmp_path / "v.jsonl"), "--report", str(tmp_path / "r")]
    assert run([*arguments, *options, "-q"]) == 0
    return json.loads((tmp_path / "r" / "report.json").read_text())


def test_what_is_new_in_a_case_decides_where_it_counts(tmp_path):
    """Trained on prompts p, q and policies A, B.

    p: A over B, margin 2, right: nothing new. new: A over B, margin -1, wrong: the prompt is new.
    q: A over C, margin 0, a tie is wrong: a policy is new. new: C over B, margin 3: both are.
    The loss is ln(1 + e^-margin): 0.126928, 1.313262, 0.693147, 0.048587; their mean 0.545481.
    """
    trained = write(
        tmp_path / "train.jsonl", [duel("p", "A", "B", [0, 0]), duel("q", "B", "A", [0, 0])]
    )
    rows = [
        duel("p", "A", "B", [3, 1]),
        duel("new", "A", "B", [1, 2]),
        duel("q", "A", "C", [1, 1]),
        duel("new", "C", "B", [3, 0]),
        # A preference: its reference is by somebody else. It is no case between policies.
        duel("p", "A", "B", [0, 9], reference_policy="X"),
    ]
    found = figures(tmp_path, rows, "--trained-on", trained)["discrimination"]
    parts = {
        name: (part["accuracy"]["value"], round(part["loss"]["value"], 6), part["loss"]["n"])
        for name, part in found["parts"].items()
    }
    assert parts == {
        "all": (0.5, 0.545481, 4),
        "prompts and policies of training": (1.0, 0.126928, 1),
        "new prompts": (0.0, 1.313262, 1),
        "new policies": (0.0, 0.693147, 1),
        "new prompts and policies": (1.0, 0.048587, 1),
    }
    assert found["policies"] == ["A", "B", "C"]
    cells = {(c["policy"], c["rejected_policy"]): (c["accuracy"], c["n"]) for c in found["matrix"]}
    assert cells == {("A", "B"): (0.5, 2), ("A", "C"): (0.0, 1), ("C", "B"): (1.0, 1)}
    page = (tmp_path / "r" / "report.html").read_text()
    assert "new prompts and policies" in page and "Heat map of accuracy" in page
    assert (tmp_path / "r" / "policies.png").read_bytes().startswith(b"\x89PNG")


def test_the_distance_of_policies_is_taken_from_their_texts():
    """Words shared with the reference "a b": "a b" all (F1 1), "a d" half, "c d" none.

    A and B: 1 - 0.5 and 1 - 0 in the two cases, mean 0.75. A and C: 1 - 0.5. B and C: 0.
    Accuracies 1, 0.5, 0: the order of the distances, so the rank correlation is 1.
    """
    rows = [
        duel("p0", "A", "B", [1, 0], rejected="a d"),
        duel("p1", "B", "A", [1, 0]),
        duel("p2", "A", "C", [1, 0], rejected="a d"),
        duel("p3", "C", "A", [0, 1], rejected="a d"),
        duel("p4", "B", "C", [0, 1], chosen="c d"),
    ]
    distance = polarctl.evaluate(rows)["discrimination"]["distance"]
    pairs = [(pair["distance"], pair["accuracy"], pair["n"]) for pair in distance["pairs"]]
    assert pairs == [(0.75, 1.0, 2), (0.5, 0.5, 2), (0.0, 0.0, 1)]
    assert distance["correlation"] == pytest.approx(1)
    assert sum(entry["n"] for entry in distance["bins"]) == 5
    assert [entry["distance"] for entry in distance["bins"]] == sorted(
        entry["distance"] for entry in distance["bins"]
    )


def test_many_cases_agree_with_scipy_and_with_what_was_planted():
    """A policy's number is where it stands; the margin grows with the distance of two."""
    from scipy import stats

    draw = np.random.default_rng(3)
    words = [f"w{i}" for i in range(20)]
    rows, losses = [], []
    for i in range(1500):
        a, b = draw.choice(8, 2, replace=False)
        margin = float(draw.normal(abs(a - b) / 3, 1))
        losses.append(math.log1p(math.exp(-margin)))
        chosen, rejected = (" ".join(words[k : k + 8]) for k in (a, b))
        row = duel(f"p{i}", f"m{a}", f"m{b}", [margin, 0.0], chosen, rejected, reference=chosen)
        rows.append(row)
    found = polarctl.evaluate(rows)["discrimination"]
    loss = found["parts"]["all"]["loss"]
    assert loss["value"] == pytest.approx(np.mean(losses))
    # The normal interval of a mean of independent cases.
    reach = 1.96 * np.std(losses) / math.sqrt(len(losses))
    assert loss["high"] - loss["value"] == pytest.approx(reach, rel=0.1)
    pairs = found["distance"]["pairs"]
    assert len(pairs) == 28
    spearman = stats.spearmanr([p["distance"] for p in pairs], [p["accuracy"] for p in pairs])
    assert found["distance"]["correlation"] == pytest.approx(spearman.statistic)
    assert spearman.statistic > 0.8
    shares = [entry["value"] for entry in found["distance"]["bins"]]
    assert shares == sorted(shares)


def test_trained_on_is_for_cases_between_policies(tmp_path, capfd):
    rows = [duel("p", "A", "B", [1, 0])]
    trained = write(tmp_path / "train.jsonl", rows)
    path = write(tmp_path / "s.jsonl", [{**rows[0], "reference_policy": "people"}])
    out = tmp_path / "v.jsonl"
    assert run(["eval", path, "-o", str(out), "--trained-on", trained]) == 2
    assert "no case is between two policies" in capfd.readouterr().err
    assert not out.exists()
