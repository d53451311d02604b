"""`rate`: figures of policies against enumeration and against sums by hand."""

import json
from itertools import combinations
from statistics import fmean

import pytest

from polarctl.cli import run
from polarctl.evaluation.policy_figures import best_of, pass_at_k, steps_to
from polarctl.records import Score, check


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rated(tmp_path, rows, *options):
    out, folder = tmp_path / "out.jsonl", tmp_path / "r"
    path = write(tmp_path / "in.jsonl", rows)
    assert run(["rate", path, "-o", str(out), "--report", str(folder), "-q", *options]) == 0
    report = json.loads((folder / "report.json").read_text())
    return report, [json.loads(line) for line in out.read_text().splitlines()]


def answer(prompt, policy, output, sample=0, **more):
    return {"prompt": prompt, "policy": policy, "output": output, "sample": sample, **more}


def value(figure):
    return round(figure["value"], 12)


def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [place < c for place in range(n)]
            for k in range(1, n + 1):
                expected = fmean(any(draw) for draw in combinations(samples, k))
                assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), (n, c, k)
    assert pass_at_k(20_000, 1, 1000) == pytest.approx(0.05)
    with pytest.raises(ValueError):
        pass_at_k(3, 1, 4)


def test_best_of_n_is_the_mean_over_all_draws():
    values = [1.0, 0.0, 0.5, 0.0, 1.0, 0.25, 0.0]
    for rewards in ([3, 1, 4, 1, 5, 9, 2], [2, 2, 2, 1, 1, 0, 0], [0] * 7):
        for n in range(1, 8):
            drawn = []
            for places in combinations(range(7), n):
                top = max(rewards[i] for i in places)
                drawn.append(fmean(values[i] for i in places if rewards[i] == top))
            assert best_of(values, rewards, n) == pytest.approx(fmean(drawn), abs=1e-12)


def test_steps_are_powers_of_two_and_the_last():
    assert [steps_to(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_verifier_and_rewards_rate_two_policies(tmp_path):
    """Right answers: 4 and 9.

    A: p 4, 5 (c = 1 of 2); q 9, 9 (2 of 2): accuracy 3/4, pass@2 1.
    B: p 5, 5 (0 of 2); q 9, 1 (1 of 2): accuracy 1/4, pass@2 1/2. B minus A: -1/2.
    Best of 2 by reward. A: p the wrong one has the higher reward, 0; q 1: mean 1/2. B: p 0; q right
    and wrong tie, 1/2: mean 1/4.
    Wins of A over B. p: A 1, 2; B 0, 1: 1>0, 1=1, 2>0, 2>1: 3.5 of 4. q: A 5, 5; B 7, 7: 0.
    Mean 7/16; one tie in eight.
    """
    told = {"p": "4", "q": "9"}
    rows = [
        answer(prompt, policy, output, sample, reward=reward, reference=told[prompt])
        for prompt, policy, output, sample, reward in [
            ("p", "A", "4", 0, 1), ("p", "A", "5", 1, 2),
            ("q", "A", "9", 0, 5), ("q", "A", "9", 1, 5),
            ("p", "B", "5", 0, 0), ("p", "B", "5", 1, 1),
            ("q", "B", "9", 0, 7), ("q", "B", "1", 1, 7),
        ]
    ]  # fmt: skip
    report, out = rated(tmp_path, rows, "--verifier", "exact:reference")
    a, b = report["policies"]["A"], report["policies"]["B"]
    assert (a["prompts"], a["answers"]) == (2, 4)
    assert (value(a["accuracy"]), value(b["accuracy"])) == (0.75, 0.25)
    assert [value(a["pass_at_k"][k]) for k in "12"] == [0.75, 1.0]
    assert [value(b["pass_at_k"][k]) for k in "12"] == [0.25, 0.5]
    assert [value(b["best_of_n"][k]) for k in "12"] == [0.25, 0.25]
    assert value(a["best_of_n"]["2"]) == 0.5
    assert value(report["accuracy_differences"]["B"]) == -0.5
    (win,) = report["wins"]
    assert (win["policy"], win["other"], value(win), win["ties"]) == ("A", "B", 7 / 16, 1 / 8)
    assert [row["label"] for row in out] == [1, 0, 1, 1, 0, 0, 1, 0]
    for row in out:
        check(row, Score)
    assert {"pass_at_k.png", "best_of_n.png", "wins.png", "report.html", "report.md"} <= {
        path.name for path in (tmp_path / "r").iterdir()
    }
    page = (tmp_path / "r" / "report.md").read_text()
    assert "cannot be told apart" in page and "a tie is half a win" in page


def test_groups_of_a_judge_and_labels_that_are_there(tmp_path):
    """A judge's rewards of three named policies; the label of one answer is not known."""
    rows = [
        {
            "prompt": f"p{i}",
            "candidates": [
                {"name": "A", "output": "x", "label": 1},
                {"name": "B", "output": "y", "label": i % 2},
                {"name": "C", "output": "z"},
            ],
            "rewards": [2, 2 + i % 2, 1],
        }
        for i in range(40)
    ]
    report, _ = rated(tmp_path, rows)
    wins = {(w["policy"], w["other"]): (value(w), w["ties"]) for w in report["wins"]}
    # B ties with A in half of the prompts and wins the others.
    assert wins == {("A", "B"): (0.25, 0.5), ("A", "C"): (1.0, 0.0), ("B", "C"): (1.0, 0.0)}
    assert "accuracy" not in report["policies"]["C"]
    assert value(report["accuracy_differences"]["B"]) == -0.5
    text = (tmp_path / "r" / "report.md").read_text()
    assert "B is right less often than A: -50.0 points" in " ".join(text.split())
    rows[0]["candidates"][0]["label"] = 5
    assert run(["rate", write(tmp_path / "b.jsonl", rows), "-o", str(tmp_path / "b.out")]) == 3


def test_the_same_seed_gives_the_same_intervals(tmp_path):
    rows = [answer(f"p{i}", "A", str(i % 3), label=i * 7 % 10 / 10) for i in range(30)]
    figures = [
        rated(tmp_path, rows, "--force", *seed)[0]["policies"]["A"]["accuracy"]
        for seed in ((), (), ("--seed", "1"))
    ]
    assert figures[0] == figures[1] != figures[2]
    # Mean 0.45, standard deviation 0.287 (of 0, 0.1, ... 0.9): 1.96 x 0.287 / sqrt(30) = 0.103.
    assert figures[0]["low"] == pytest.approx(0.347, abs=0.01)
    assert figures[0]["high"] == pytest.approx(0.553, abs=0.01)


def test_without_a_policy_a_record_is_refused(tmp_path, capfd):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "output": "o"}])
    assert run(["rate", path]) == 3
    group = {"prompt": "p", "candidates": [{"output": "o"}]}
    assert run(["rate", write(tmp_path / "b.jsonl", [group])]) == 3
    assert "has no `name`: which policy wrote it" in capfd.readouterr().err
