"""How far the references of one prompt agree, by hand."""

import json

import pytest

from polarctl.cli import run
from polarctl.evaluation.reference_agreement import mean_tau, same_order

A, B, C = [3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 1.0, 0.0]


def test_two_references_agree_on_pairs_and_on_the_order():
    """A and B put the last two candidates the other way round, and the first above both."""
    assert same_order([A, A]) == 1 and mean_tau([A, A]) == 1
    assert same_order([A, A[::-1]]) == 0 and mean_tau([A, A[::-1]]) == -1
    assert same_order([A, B]) == pytest.approx(2 / 3)
    assert mean_tau([A, B]) == pytest.approx((2 - 1) / 3)


def test_three_references_are_compared_two_by_two():
    """C ties the first two, which counts half with A and with B, and puts the last one last.

    Pairs of candidates (0,1), (0,2), (1,2). A with B: 1, 1, 0. A with C: 1/2, 1, 1. B with C: 1/2,
    1, 0. Together 6 of 9. Tau-b of A with C: 2 / sqrt(3 * 2); of B with C: (1 - 1) / ... = 0.
    """
    assert same_order([A, B, C]) == pytest.approx(6 / 9)
    assert mean_tau([A, B, C]) == pytest.approx((1 / 3 + 2 / 6**0.5 + 0) / 3)


def test_a_candidate_that_one_has_not_judged_is_left_out():
    """Of A without its last candidate and B reversed two are common, in opposite order."""
    assert same_order([[3.0, 2.0, None], [1.0, 2.0, 5.0]]) == 0
    assert mean_tau([[3.0, 2.0, None], [1.0, 2.0, 5.0]]) is None
    assert same_order([[3.0, None, None], [1.0, 2.0, None]]) is None
    assert same_order([A]) is None and same_order([]) is None and mean_tau([A]) is None
    assert mean_tau([A, [1.0, 1.0, 1.0]]) == 0  # equal rewards order nothing


def group(name, *rows, labels=(1, 0, 0)):
    rewards = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return {
        "id": name,
        "prompt": name,
        "references": [f"reference {i}" for i in range(len(rows))],
        "candidates": [{"output": f"answer {i}", "label": label} for i, label in enumerate(labels)],
        "rewards": rewards,
        "reference_rewards": [list(row) for row in rows],
    }


def judged(rows, tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "verdicts.jsonl")
    status = run(["eval", str(path), "-o", out, "--report", str(tmp_path / "report"), "-q"])
    return status, tmp_path / "report"


def test_eval_says_how_far_the_references_agree(tmp_path):
    """Two prompts with 2/3 and 1, tau 1/3 and 1.

    Two draws of two prompts: both the first (1/4), one each, both the second (1/4). So the 95 %
    interval goes from the lower one to the higher one. What has no label counts here too.
    """
    plain = {key: value for key, value in group("r", A).items() if key != "reference_rewards"}
    rows = [group("p", A, B), group("q", A, A, labels=(1, 1, 1)), plain]
    status, report = judged(rows, tmp_path)
    assert status == 0
    found = json.loads((report / "report.json").read_bytes())["reference_agreement"]
    assert found["same_order"] == pytest.approx(
        {"value": 5 / 6, "low": 2 / 3, "high": 1, "n": 2, "clusters": 2}
    )
    assert found["kendall_tau_b"] == pytest.approx(
        {"value": 2 / 3, "low": 1 / 3, "high": 1, "n": 2, "clusters": 2}
    )
    text = (report / "report.md").read_text()
    assert "pairs of candidates in the same order | 2 | 83.3 % \\[66.7, 100.0\\]" in text


def test_one_reference_has_nobody_to_agree_with(tmp_path):
    status, report = judged([group("p", A)], tmp_path)
    assert status == 0
    assert "reference_agreement" not in json.loads((report / "report.json").read_bytes())
    assert "Agreement" not in (report / "report.md").read_text()


def test_rewards_that_do_not_fit_the_candidates_are_refused(tmp_path, capfd):
    status, _ = judged([group("p", A, B) | {"reference_rewards": [A, B[:2]]}], tmp_path)
    assert status == 3
    assert "scored.jsonl:1: `reference_rewards`: each row must have 3" in capfd.readouterr().err
