"""`polarctl eval` on rewards whose figures can be worked out by hand."""

import json
from pathlib import Path

import pytest

import polarctl
from polarctl.cli import run
from polarctl.records import Manifest, Report, Verdict, check


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def triple(i, rewards, **more):
    return {
        "prompt": f"q{i}",
        "reference": "a b",
        "chosen": "a b",
        "rejected": "a c d",
        "rewards": rewards,
        **more,
    }


@pytest.fixture
def scored(tmp_path):
    # right, right, tie (wrong), wrong; by category x: 1 of 2, y: 1 of 2
    rewards = [([2, 1], "x"), ([0, -3], "y"), ([1, 1], "x"), ([0, 4], "y")]
    rows = [triple(i, r, category=c) for i, (r, c) in enumerate(rewards)]
    return write(tmp_path / "scored.jsonl", rows)


def test_accuracy_margins_and_baselines(scored, tmp_path, capfd):
    out, folder = tmp_path / "verdicts.jsonl", tmp_path / "report"
    assert run(["eval", scored, "-o", str(out), "--report", str(folder)]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [v["correct"] for v in verdicts] == [True, True, False, False]
    assert [v["margin"] for v in verdicts] == [1, 3, 0, -4]
    # longer wins: the rejected has 5 characters, the chosen 3; overlap: F1 of chosen is 1,
    # of the rejected 2 * 1 / (3 + 2) = 0.4
    assert verdicts[0]["baselines"] == {"length": 0.0, "overlap": 1.0}
    report = json.loads((folder / "report.json").read_text())
    assert report["metric"] == "preference accuracy"
    assert report["overall"]["model"]["value"] == 0.5
    assert report["overall"]["length"]["value"] == 0.0
    assert report["overall"]["overlap"]["value"] == 1.0
    assert report["categories"]["x"]["model"]["n"] == 2
    assert report["margins"]["p50"] == 0.5  # median of -4, 0, 1, 3
    for verdict in verdicts:
        check(verdict, Verdict)
    check(report, Report)
    check(json.loads((tmp_path / "verdicts.jsonl.manifest.json").read_text()), Manifest)
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "report.json",
        *(f"{name}.{k}" for name in ("margins", "accuracy", "calibration") for k in ("png", "svg")),
        "report.md",
    }
    table = capfd.readouterr().err
    assert "preference accuracy" in table and "longer wins" in table


def test_triples_of_two_policies_are_discrimination(tmp_path):
    rows = [triple(0, [1, 0], reference_policy="p1", policy="p1", rejected_policy="p2")]
    folder = tmp_path / "r"
    path = write(tmp_path / "s.jsonl", rows)
    assert run(["eval", path, "-o", str(tmp_path / "v"), "--report", str(folder), "-q"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["metric"] == "discrimination accuracy"


def test_groups_give_every_pair_of_labels_and_best_of_n(tmp_path):
    labels, rewards = [1, 0, 1, 0], [0.5, 0.7, 0.9, 0.1]
    group = {
        "prompt": "q",
        "reference": "r",
        "candidates": [
            {"output": f"o{i}", "name": f"n{i}", "label": label} for i, label in enumerate(labels)
        ],
        "rewards": rewards,
    }
    path, folder = write(tmp_path / "s.jsonl", [group]), tmp_path / "r"
    out = tmp_path / "v.jsonl"
    assert run(["eval", path, "-o", str(out), "--report", str(folder), "-q"]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    # 0>1 wrong, 0>3 right, 2>1 right, 2>3 right
    assert [(v["better"], v["worse"], v["correct"]) for v in verdicts] == [
        ("n0", "n1", False),
        ("n0", "n3", True),
        ("n2", "n1", True),
        ("n2", "n3", True),
    ]
    best = json.loads((folder / "report.json").read_text())["best_of_n"]
    assert best["model"]["value"] == 1.0  # the highest reward is 0.9, of a good candidate
    assert best["random"]["value"] == 0.5 and best["oracle"]["value"] == 1.0


def test_a_check_that_fails_has_its_own_status(scored, tmp_path, capfd):
    command = ["eval", scored, "-q", "-o"]
    assert run([*command, str(tmp_path / "a"), "--min-accuracy", "0.5"]) == 0
    assert run([*command, str(tmp_path / "b"), "--min-accuracy", "0.6"]) == 5
    assert "accuracy 0.5000 is below 0.6" in capfd.readouterr().err


def test_records_without_rewards_or_comparison_are_told(tmp_path, capfd):
    plain = triple(0, [1, 0])
    del plain["rewards"]
    assert run(["eval", write(tmp_path / "a.jsonl", [plain]), "-o", str(tmp_path / "v")]) == 3
    assert "a.jsonl:1: has no reward" in capfd.readouterr().err
    single = {"prompt": "q", "reference": "r", "output": "o", "reward": 1.0}
    assert run(["eval", write(tmp_path / "b.jsonl", [single]), "-o", str(tmp_path / "w")]) == 3
    assert "nothing to compare" in capfd.readouterr().err
    short = triple(0, [1.0])
    assert run(["eval", write(tmp_path / "c.jsonl", [short]), "-o", str(tmp_path / "x")]) == 3
    assert "1 rewards for 2 candidates" in capfd.readouterr().err


def test_with_a_model_it_scores_first_and_agrees_with_score(tiny_rm, tmp_path):
    rows = [triple(i, [0, 0]) for i in range(5)]
    for row in rows:
        del row["rewards"]
    path, model = write(tmp_path / "t.jsonl", rows), str(tiny_rm)
    direct, piped, scores = (str(tmp_path / name) for name in ("v1", "v2", "s"))
    assert run(["eval", path, "-m", model, "-o", direct, "-q"]) == 0
    assert run(["score", path, "-m", model, "-o", scores, "-q"]) == 0
    assert run(["eval", scores, "-o", piped, "-q"]) == 0
    first, second = ([json.loads(line) for line in Path(p).open()] for p in (direct, piped))
    assert [v.pop("where") for v in first] == [f"{path}:{i}" for i in range(1, 6)]
    assert [v.pop("where") for v in second] == [f"{scores}:{i}" for i in range(1, 6)]
    assert first == second


def test_graded_groups_give_rank_agreement(tmp_path, capfd):
    def group(i, rewards, labels, **more):
        candidates = [{"output": "x" * (9 - k), "label": label} for k, label in enumerate(labels)]
        return {"prompt": f"q{i}", "candidates": candidates, "rewards": rewards, **more}

    rows = [
        group(0, [3, 2, 1], [3, 2, 1]),  # tau 1, NDCG 1; so does `longer`
        group(1, [1, 2, 3], [3, 2, 1]),  # tau -1
        group(2, [1, 0], [1, 0]),  # a pair ranks nothing
    ]
    folder = tmp_path / "report"
    out = str(tmp_path / "o")
    assert run(["eval", write(tmp_path / "s.jsonl", rows), "-o", out, "--report", str(folder)]) == 0
    report = json.loads((folder / "report.json").read_text())
    check(report, Report)
    tau = report["ranking"]["kendall_tau_b"]
    assert tau["model"]["value"] == 0 and tau["model"]["n"] == 2
    assert tau["length"]["value"] == 1
    # DCG of 1, 2, 3 over that of 3, 2, 1: (1 + 2 / log2(3) + 3 / 2) / (3 + 2 / log2(3) + 1 / 2)
    reversed_order = (1 + 2 / 1.5849625 + 1.5) / (3 + 2 / 1.5849625 + 0.5)
    assert report["ranking"]["ndcg"]["model"]["value"] == pytest.approx((1 + reversed_order) / 2)
    assert "Kendall tau-b" in (folder / "report.html").read_text()
    assert "0.000 [-1.000, 1.000]" in capfd.readouterr().err
    negative = [group(0, [3, 2, 1], [3, 2, -1])]
    assert run(["eval", write(tmp_path / "n.jsonl", negative), "-o", str(tmp_path / "n")]) == 0
    assert "NDCG" not in capfd.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_field_that_no_record_has_groups_nothing(more, tmp_path, capfd):
    source = tmp_path / "scored.jsonl"
    row = {"prompt": "q", "reference": "a", "chosen": "a", "rejected": "b", "rewards": [1, 0]}
    source.write_text(json.dumps({**row, "domain": "x"}) + "\n" + json.dumps(row) + "\n")
    out = tmp_path / "out.jsonl"
    command = ["eval", str(source), "-o", str(out), *more]
    assert run([*command, "--by", "domian"]) == 2
    assert capfd.readouterr().err.splitlines()[-2:] == [
        "polarctl: `--by domian`: no record has that field",
        "hint: there is `domain`",
    ]
    assert not out.exists()
    assert run([*command, "--by", "category"]) == 2  # asked for, and not there
    assert run([*command, "--by", "domain"]) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"rewards": [1e308, -1e308]},  # no difference that a float can hold
        {"rewards": [None, 1]},
        {"rewards": 1},
        {"rewards": [1, 2, 3]},
        {"chosen": None},
        {"rejected": ...},  # left out
    ],
)
def test_what_is_no_scored_record_is_named(tmp_path, capfd, fields):
    record = {"prompt": "a", "reference": "b", "chosen": "c", "rejected": "d", "rewards": [1, 0]}
    bad = {k: v for k, v in {**record, **fields}.items() if v is not ...}
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(bad) + "\n")
    assert run(["eval", str(path), "-q"]) == 3
    assert f"polarctl: {path}:2: " in capfd.readouterr().err


def groups(path, *rows):
    """Groups of candidates: (labels, rewards) each."""
    return write(
        path,
        [
            {
                "prompt": f"q{i}",
                "candidates": [
                    {"output": f"{'x' * k} {i}", "label": label} for k, label in enumerate(labels)
                ],
                "rewards": rewards,
            }
            for i, (labels, rewards) in enumerate(rows)
        ],
    )


def test_best_of_n_counts_groups_that_are_all_right_or_all_wrong(tmp_path, capfd):
    """The first of five groups: right, wrong, all right 1, all wrong 0, all wrong 0.

    Over all: 2 / 5. Over the two decided ones: 1 / 2. A random pick gives (1/2 + 1/3 + 1) / 5.
    """
    path = groups(
        tmp_path / "s.jsonl",
        ([1, 0], [2, 1]),
        ([1, 0, 0], [1, 2, 0]),
        ([1, 1], [5, 5]),
        ([0, 0], [1, 2]),
        ([0, 0, 0], [1, 2, 3]),
    )
    report = polarctl.evaluate(polarctl.read(path))
    best, decided = report["best_of_n"], report["best_of_n_decided"]
    assert (best["model"]["value"], best["model"]["n"]) == (pytest.approx(2 / 5), 5)
    assert (decided["model"]["value"], decided["model"]["n"]) == (1 / 2, 2)
    assert best["random"]["value"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 5)
    assert best["oracle"]["value"] == pytest.approx(3 / 5) and decided["oracle"]["value"] == 1
    assert report["skipped"] == {"no better and worse candidate": 3}
    assert run(["eval", path, "-o", str(tmp_path / "o")]) == 0
    said = capfd.readouterr().err
    assert "all 5 groups" in said and "2 decided groups" in said


def test_a_verdict_says_which_case_it_is(tmp_path):
    row = triple(7, [1, 0], policy="large", rejected_policy="small")
    path = write(tmp_path / "s.jsonl", [triple(6, [1, 0]), row])
    for more in ([], ["--no-text"]):
        out = tmp_path / f"v{len(more)}"
        assert run(["eval", path, "-o", str(out), "-q", *more]) == 0
        verdict = json.loads(out.read_text().splitlines()[1])
        check(verdict, Verdict)
        assert verdict["where"] == f"{path}:2"
        assert (verdict["better"], verdict["worse"]) == ("large", "small")
        if not more:
            texts = {"prompt": "q7", "reference": "a b", "better": "a b", "worse": "a c d"}
            assert verdict["texts"] == texts
            continue
        # `printf 'a c d' | b2sum -l 64`
        assert verdict["texts"]["worse"] == {"hash": "5419b981313df1f9", "length": 5}
        assert verdict["texts"]["better"] == verdict["texts"]["reference"]


def test_length_and_calibration_by_hand(tmp_path):
    """Margins 2, -1, 0, 3; lengths of better minus worse 2, -2, -2, 1.

    Correlation: (4 + 2 + 0 + 3) / sqrt((4 + 1 + 0 + 9) (4 + 4 + 4 + 1)) = 9 / sqrt(14 x 13).
    The worse is longer in cases 2 and 3, both wrong: 0 of 2; else 2 of 2.
    Confidence: sigmoid of 2, 1, 0, 3: 0.880797, 0.731059, 0.5, 0.952574: bins of width 0.05 from
    0.5 on: 7, 4, 0, 9: one case each. |1 - 0.880797| + |0 - 0.731059| + |0.5 - 0.5|, a tie being
    half right, + |1 - 0.952574| = 0.897688; over 4: 0.224422.
    """
    pairs = [("aaa", "a", [2, 0]), ("a", "aaa", [0, 1]), ("a", "bbb", [4, 4]), ("bb", "a", [0, -3])]
    rows = [
        {"prompt": f"q{i}", "chosen": c, "rejected": r, "rewards": rewards}
        for i, (c, r, rewards) in enumerate(pairs)
    ]
    report = polarctl.evaluate(rows)
    bias, calibration = report["length_bias"], report["calibration"]
    assert bias["correlation"] == pytest.approx(9 / (14 * 13) ** 0.5)
    assert (bias["longer_is_worse"]["value"], bias["longer_is_worse"]["n"]) == (0, 2)
    assert (bias["longer_is_better"]["value"], bias["longer_is_better"]["n"]) == (1, 2)
    assert calibration["ece"] == pytest.approx(0.224422, abs=1e-6)
    assert [entry["n"] for entry in calibration["bins"]] == [1, 1, 1, 1]
    # Whichever answer stands first: pairs turned round have the same correlation.
    turned = [{**row, "rewards": [-x for x in row["rewards"]]} for row in rows]
    assert polarctl.evaluate(turned)["length_bias"]["correlation"] == -bias["correlation"]
    equal = polarctl.evaluate([{**rows[0], "rejected": "bbb"}])["length_bias"]
    assert equal == {}  # no difference in length: nothing to correlate


def test_numbers_of_the_reference_are_a_baseline():
    """References with 1,200 and 3.50; the third has no number and counts one half."""

    def row(i, reference, chosen, rejected):
        texts = {"reference": reference, "chosen": chosen, "rejected": rejected}
        return {"prompt": f"q{i}", **texts, "rewards": [1, 0]}

    rows = [
        row(0, "It is 1,200.", "1200 it is", "that is 12"),
        row(1, "3.50 dollars", "3.6", "exactly 3.5"),
        row(2, "none", "a", "b"),
    ]
    report = polarctl.evaluate(rows)
    assert report["overall"]["numbers"]["value"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert "numbers" not in polarctl.evaluate(rows[2:])["overall"]


def test_the_page_shows_the_worst_cases_with_the_difference_marked(tmp_path):
    rows = [
        {
            "prompt": f"How much is {i}?",
            "reference": "It is so much",
            "chosen": f"It is {i} boats <b>",
            "rejected": f"It is {i} cats <b>",
            "rewards": [0, i - 5],
        }
        for i in range(30)
    ]
    path, folder = write(tmp_path / "s.jsonl", rows), tmp_path / "r"
    assert run(["eval", path, "-o", str(tmp_path / "v"), "--report", str(folder), "-q"]) == 0
    page = (folder / "report.html").read_text()
    shown = [i for i in range(30) if f">How much is {i}?<" in page]
    assert shown == list(range(10, 30))  # margin -(i - 5): the 20 lowest
    assert page.index("How much is 29?") < page.index("How much is 28?")
    assert "It is 29 <mark>boats</mark> &lt;b&gt;" in page
    assert "It is 29 <mark>cats</mark> &lt;b&gt;" in page
    assert "reward 24<" in page and f"{path}:30" in page


def pairs_right(path, right, wrong):
    rows = [triple(i, [1, 0] if i < right else [0, 1]) for i in range(right + wrong)]
    return write(path, rows)


def test_a_baseline_fails_what_is_worse_beyond_the_interval_every_time(tmp_path, capfd):
    """80 of 100 before. 76 of 100 is within the interval of the difference, 60 of 100 is not.

    Standard error of 0.60 - 0.80: sqrt(0.24 / 100 + 0.16 / 100) = 0.0632: 2 of them below 0.
    """
    folder = str(tmp_path / "main")
    before = pairs_right(tmp_path / "before.jsonl", 80, 20)
    assert run(["eval", before, "-o", str(tmp_path / "v"), "--report", folder, "-q"]) == 0
    near = pairs_right(tmp_path / "near.jsonl", 76, 24)
    out = str(tmp_path / "w")
    assert run(["eval", near, "-o", out, "--baseline", folder]) == 0
    assert "accuracy 0.7600, baseline 0.8000: -4.0 points [" in capfd.readouterr().err
    worse = pairs_right(tmp_path / "worse.jsonl", 60, 40)
    out = str(tmp_path / "x")
    for _ in range(3):
        assert run(["eval", worse, "-o", out, "--baseline", f"{folder}/report.json", "-q"]) == 5
        said = capfd.readouterr().err
        assert "worse than the baseline: accuracy 0.6000, baseline 0.8000: -20.0 points [" in said
    assert run(["eval", before, "-o", str(tmp_path / "u"), "--baseline", folder]) == 0
    few = pairs_right(tmp_path / "few.jsonl", 4, 1)
    assert run(["eval", few, "-o", str(tmp_path / "y"), "--baseline", folder, "-q"]) == 0
    assert "warning: the baseline is over 100 cases, this over 5" in capfd.readouterr().err
    for bad, message in (("missing.json", "No such file"), (before, "is no report of")):
        assert run(["eval", near, "-o", str(tmp_path / "z"), "--baseline", bad]) == 2
        assert message in capfd.readouterr().err


def test_verdicts_do_not_wait_in_memory_and_an_interrupted_run_begins_again(tmp_path):
    """The row after two windows of 512 is bad: their verdicts are on disk by then."""
    rows = [triple(i, [1, 0]) for i in range(1024)]
    path, out = write(tmp_path / "s.jsonl", [*rows, {"prompt": 3}]), tmp_path / "v.jsonl"
    assert run(["eval", path, "-o", str(out), "-q"]) == 3
    assert len(out.read_bytes().splitlines()) == 1024
    write(tmp_path / "s.jsonl", [triple(0, [0, 1]), *rows[1:], triple(7777, [1, 0])])
    assert run(["eval", path, "-o", str(out), "-q"]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(verdicts) == 1025 and not verdicts[0]["correct"]
    counts = json.loads((tmp_path / "v.jsonl.manifest.json").read_text())["counts"]
    assert counts["overall"]["model"]["n"] == counts["records"] == 1025
