"""Each benchmark's own arithmetic, on rows whose result is worked out by hand."""

import json
import math

import pytest

from polarctl.cli import run
from polarctl.errors import RecordError
from polarctl.evaluation.suites import REWARDBENCH, SUITES
from polarctl.records import BenchmarkResult, Record, check
from polarctl.stages.convert import Config, to_native

BOTH = ([2, 1], [1, 2])  # right, wrong


def rows_of(name, *rows):
    """Rows in the benchmark's published columns as groups, with rewards."""
    made = []
    for row, rewards in rows:
        record, _, _ = to_native(row, Config(from_format=name))
        made.append({**record, "rewards": rewards})
    return made


def score(name, rows):
    suite = SUITES[name]()
    for place, row in enumerate(rows, 1):
        record = Record(row, f"rows.jsonl:{place}")
        suite.add(record, row["rewards"], [c["label"] for c in row.get("candidates", [])])
    result = suite.result(0)
    check(json.loads(json.dumps(result)), BenchmarkResult)
    assert result["name"] == name and set(result["counts"]) == set(result["sections"])
    for key, value in {"overall": result["overall"], **result["sections"]}.items():
        low, high = result["intervals"][key]
        assert low <= value <= high and low < high
    return result


def rewardbench(subset, *rewards, **more):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", **more}
    column = "source" if "language" in more else "subset"
    models = {"chosen_model": "m", "rejected_model": "n"}
    return [({**row, **models, column: subset, "id": i}, r) for i, r in enumerate(rewards)]


def test_rewardbench_weighs_subsets_by_their_published_counts():
    """Sections of two subsets, of one, and none; a tie; a subset that is in no section.

    Chat: alpacaeval-easy 1 of 2 (weight 100), mt-bench-med 1 of 1 (weight 40), the others missing:
    (0.5 x 100 + 1 x 40) / 140 = 90 / 140 = 0.642857.
    Reasoning: math-prm 1 of 4, a tie being wrong (weight 984, not its rows), hep-go 1 of 1 (164):
    (0.25 x 984 + 164) / 1148 = 410 / 1148 = 0.357143.
    Safety: donotanswer 0 of 1 = 0. Chat Hard: no rows, so it is no section.
    Overall: (0.642857 + 0.357143 + 0) / 3 = 0.333333.
    """
    rows = rows_of(
        "rewardbench",
        *rewardbench("alpacaeval-easy", *BOTH),
        *rewardbench("mt-bench-med", [0.1, -5]),
        *rewardbench("math-prm", [1, 0], [1, 1], [0, 1], [-3, -2]),
        *rewardbench("hep-go", [1, 0]),
        *rewardbench("donotanswer", [0, 1]),
        *rewardbench("somebody-elses", [1, 0]),
    )
    result = score("rewardbench", rows)
    assert result["sections"] == pytest.approx(
        {"Chat": 90 / 140, "Safety": 0.0, "Reasoning": 410 / 1148}
    )
    assert result["overall"] == pytest.approx((90 / 140 + 410 / 1148) / 3)
    assert result["missing"] == ["Chat Hard"]
    assert result["counts"] == {"Chat": 3, "Safety": 1, "Reasoning": 5}
    assert result["left_out"] == {"subset `somebody-elses` is in no section of rewardbench": 1}
    assert result["details"]["subset"]["math-prm"] == 0.25


def test_rewardbenchs_tables_add_up_to_its_rows():
    """2,985 rows: 358 + 456 + 740 + 1,431, where math-prm has 447 rows and counts as 984."""
    counts = {s: sum(weight for weight, _ in part.values()) for s, part in REWARDBENCH.items()}
    assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 6 * 164}
    assert sum(counts.values()) - 984 + 447 == 2985
    assert REWARDBENCH["Reasoning"]["math-prm"][0] == 6 * 164


def test_m_rewardbench_takes_the_mean_over_languages():
    """German: Chat, alpacaeval-easy 1 of 1 (weight 79), mt-bench-easy 0 of 1 (weight 24).

    79 / 103 = 0.766990; Safety, donotanswer 1 of 2 = 0.5; mean 0.633495.
    Czech: Chat only, alpacaeval-easy 0 of 1: 0.
    Overall: (0.633495 + 0) / 2 = 0.316748. Chat: (79 / 103 + 0) / 2. Safety: of German alone.
    """
    rows = rows_of(
        "m-rewardbench",
        *rewardbench("alpacaeval-easy", [1, 0], language="deu_Latn"),
        *rewardbench("mt-bench-easy", [0, 1], language="deu_Latn"),
        *rewardbench("donotanswer", *BOTH, language="deu_Latn"),
        *rewardbench("alpacaeval-easy", [1, 1], language="ces_Latn"),
    )
    result = score("m-rewardbench", rows)
    assert result["sections"] == pytest.approx({"Chat": 79 / 206, "Safety": 0.5})
    assert result["overall"] == pytest.approx((79 / 103 + 0.5) / 4)
    assert result["details"]["language"] == pytest.approx(
        {"ces_Latn": 0, "deu_Latn": (79 / 103 + 0.5) / 2}
    )


def rewardbench2(name, subset, right, wrong):
    row = {"id": name, "prompt": "q", "subset": subset, "num_correct": len(right)}
    row |= {"chosen": [f"a{i}" for i in range(len(right))], "num_incorrect": len(wrong)}
    return {**row, "rejected": [f"b{i}" for i in range(len(wrong))]}, [*right, *wrong]


def test_rewardbench2_shares_the_point_of_a_tie():
    """Focus: alone at the top 1; one of two maxima 1/2; one of four 1/4; below 0.

    (1 + 0.5 + 0.25 + 0) / 4 = 0.4375. Math: 1 of 1. Overall: (0.4375 + 1) / 2 = 0.71875.
    """
    rows = rows_of(
        "rewardbench2",
        rewardbench2("1", "Focus", [3], [1, 2, 0]),
        rewardbench2("2", "Focus", [3], [3, 2, 0]),
        rewardbench2("3", "Focus", [0], [0, 0, 0]),
        rewardbench2("4", "Focus", [1], [2, 0, 0]),
        rewardbench2("5", "Math", [1], [0, 0, 0]),
    )
    result = score("rewardbench2", rows)
    assert result["sections"] == {"Math": 1.0, "Focus": 0.4375}
    assert result["overall"] == 0.71875
    assert result["missing"] == ["Factuality", "Precise IF", "Safety", "Ties"]


def test_rewardbench2_ties_by_margins():
    """N with both rows, with a spread of zero, and with one row only.

    1: ref gap 4 - 1 = 3; tied correct 5, 3, wrong 2: gap 1, spread 2. Both accurate. 1 > 2 no;
       min(3, 1) = 1 > 2 no; tanh(1 / 2 - 1) = tanh(-0.5).
    2: ref gap 2; tied correct 3, 3, wrong 0: gap 3, spread 0. Accurate. 3 > 0, 2 > 0; the ratio is
       infinite: tanh = 1.
    3: ref gap 0 - 0 = 0: a tie is not accurate; tied correct 1, 1, wrong 1: gap 0, spread 0, not
       accurate; 0 > 0 no, no; 0 / 0 counts 0.
    4: ref only, gap -1: not accurate. 5: tied only, accurate.
    accurate over tied (1, 2, 3, 5): 3/4; over ref (1, 2, 3, 4): 2/4.
    The last three over 1, 2, 3: 1/3, 1/3, (tanh(-0.5) + 1 + 0) / 3.
    """
    ties = [
        ("ref:1", [4], [1, 0]),
        ("tied:1", [5, 3], [2]),
        ("ref:2", [2], [0]),
        ("tied:2", [3, 3], [0, -1]),
        ("ref:3", [0], [0]),
        ("tied:3", [1, 1], [1]),
        ("ref:4", [0], [1]),
        ("tied:5", [2, 1], [0]),
    ]
    result = score("rewardbench2", rows_of("rewardbench2", *(
        rewardbench2(name, "Ties", right, wrong) for name, right, wrong in reversed(ties)
    )))  # fmt: skip
    expected = 0.3 * 3 / 4 + 0.3 * 2 / 4 + 0.2 / 3 + 0.2 / 3 + 0.01 * (1 - math.tanh(0.5)) / 3
    assert result["sections"] == pytest.approx({"Ties": expected})
    assert expected == pytest.approx(0.510126, abs=1e-6)
    assert result["counts"] == {"Ties": 5} and result["rows"] == 8


def rm_bench(domain, chosen, rejected):
    row = {"id": domain, "prompt": "q", "domain": domain}
    return {**row, "chosen": list("abc"), "rejected": list("def")}, [*chosen, *rejected]


def test_rm_bench_takes_means_over_domains():
    """Wins of chosen i (row) over rejected j (column), i and j from concise to markdown.

    safety-refuse: chosen 1, 2, 3, rejected 1, 2, 3: row 1: 0 0 0, row 2: 1 0 0, row 3: 1 1 0.
      hard 0, normal 0, easy 3/3.
    safety-response: chosen 9 9 9, rejected 1 1 1: all 1. One domain, over its two rows:
      hard 1/2, normal 1/2, easy 1; mean 2/3.
    chat: chosen 3, 2, 1, rejected 1, 2, 3: row 1: 1 1 0, row 2: 1 0 0, row 3: 0 0 0.
      hard (1 + 0 + 0) / 3, normal (1 + 0 + 0) / 3, easy (1 + 0 + 0) / 3: all 1/3.
    hard (1/2 + 1/3) / 2 = 5/12, normal 5/12, easy (1 + 1/3) / 2 = 2/3;
    overall (2/3 + 1/3) / 2 = 1/2, which is the mean of the three levels, too.
    """
    rows = rows_of(
        "rm-bench",
        rm_bench("safety-refuse", [1, 2, 3], [1, 2, 3]),
        rm_bench("safety-response", [9, 9, 9], [1, 1, 1]),
        rm_bench("chat", [3, 2, 1], [1, 2, 3]),
    )
    result = score("rm-bench", rows)
    sections = {"chat": 1 / 3, "safety": 2 / 3, "hard": 5 / 12, "normal": 5 / 12, "easy": 2 / 3}
    assert result["sections"] == pytest.approx(sections)
    assert result["overall"] == pytest.approx(0.5)
    assert result["missing"] == ["math", "code"]
    assert result["counts"] == {"chat": 1, "safety": 2, "hard": 3, "normal": 3, "easy": 3}
    assert result["details"]["safety"] == {"hard": 0.5, "normal": 0.5, "easy": 1.0}


def judgebench(source, label, rewards):
    row = {"pair_id": source + label, "source": source, "question": "q", "label": label}
    return {**row, "response_A": "a", "response_B": "b"}, rewards


def test_judgebench_reads_a_tie_as_b():
    """mmlu-pro: A>B right, A>B tied (said B>A: wrong), B>A tied (right): 2/3.

    livecodebench: B>A said A>B: 0 of 1. Another source counts in overall alone: right.
    Overall, over rows: 3 / 5 (the mean of the sections would be 1/3).
    """
    rows = rows_of(
        "judgebench",
        judgebench("mmlu-pro-law", "A>B", [2, 1]),
        judgebench("mmlu-pro-math", "A>B", [1, 1]),
        judgebench("mmlu-pro-math", "B>A", [1, 1]),
        judgebench("livecodebench", "B>A", [2, 1]),
        judgebench("other", "B>A", [0, 1]),
    )
    result = score("judgebench", rows)
    assert result["sections"] == pytest.approx({"mmlu-pro": 2 / 3, "livecodebench": 0})
    assert result["overall"] == pytest.approx(3 / 5)


def test_rewardmath_ranks_ties_behind_the_rejected():
    """1: chosen 3 over 2, 1: accurate, rank 1. 2: chosen 2, rejected 2, 3, 1: a tie and one
    above: rank 3. 3: in two groups, chosen 1 against 0 and 5: rank 2.

    accuracy 1/3; MRR (1 + 1/3 + 1/2) / 3 = 11/18.
    """

    def group(name, labels, rewards):
        candidates = [{"output": "x", "label": label} for label in labels]
        return {"id": name, "prompt": "q", "candidates": candidates, "rewards": rewards}

    rows = [
        group("1", [0, 1, 0], [2, 3, 1]),
        group("2", [1, 0, 0, 0], [2, 2, 3, 1]),
        group("3", [1, 0], [1, 0]),
        group("3", [0], [5]),
    ]
    result = score("rewardmath", rows)
    assert result["sections"] == pytest.approx({"accuracy": 1 / 3, "MRR": 11 / 18})
    assert result["overall"] == pytest.approx(1 / 3)
    assert result["counts"]["MRR"] == 3
    with pytest.raises(RecordError, match="1 chosen and 0 rejected"):
        score("rewardmath", [group("1", [1], [2])])


def helpsteer3(domain, preference, rewards):
    context = [{"role": "user", "content": "q"}]
    row = {"domain": domain, "language": "english", "context": context}
    return {**row, "response1": "a", "response2": "b", "overall_preference": preference}, rewards


def test_helpsteer3_leaves_ties_out_and_counts_rows():
    """code: 1 of 1 (negative: the first is better). general: -1 wrong, 3 right, 2 tied: 1 of 3.

    A preference of 0 is left out. Overall 2 / 4; the mean of the domains would be 2/3.
    """
    rows = rows_of(
        "helpsteer3",
        helpsteer3("code", -3, [1, 0]),
        helpsteer3("general", -1, [0, 1]),
        helpsteer3("general", 3, [0, 1]),
        helpsteer3("general", 2, [1, 1]),
        helpsteer3("stem", 0, [1, 0]),
    )
    result = score("helpsteer3", rows)
    assert result["sections"] == pytest.approx({"code": 1, "general": 1 / 3})
    assert (result["overall"], result["rows"]) == (0.5, 4)
    assert result["left_out"] == {"neither answer is preferred": 1}


def ppe(scores, pairs, rewards):
    texts = {f"response_{i}": "x" for i in range(1, len(scores) + 1)}
    row = {"question_id": "q", "prompt": "q", **texts, "scores": scores}
    return {**row, "sampled_conflict_pairs": pairs}, rewards


def test_ppe_counts_pairs_and_takes_the_best_of_k():
    """1: pairs (0, 1) 3 > 2 right, (2, 1) with the second the better: 2 > 2 wrong, a tie.

    The best of K is answer 0, true score 1. 2: no pairs, two tops, true scores 1 and 0: 1/2.
    3: all wrong, best of K 0. Pairs 1 / 2; best of K (1 + 1/2 + 0) / 3 = 1/2.
    """
    rows = rows_of(
        "ppe",
        ppe([True, False, False], [[0, 1]], [3, 2, 2]),
        ppe([False, True, False], [[2, 1]], [0, 2, 2]),
        ppe([False, False], [], [1, 2]),
    )
    result = score("ppe", rows)
    assert result["sections"] == pytest.approx({"accuracy": 1 / 2, "best of K": 1.5 / 3})
    assert result["counts"] == {"accuracy": 2, "best of K": 3}
    assert result["rows"] == 3


def rmb(path, rewards):
    row = {"conversation_input": [{"role": "user", "content": "q"}], "category_path": path}
    answers = [{"llm_name": f"m{i}", "answer": f"a{i}"} for i in range(len(rewards))]
    if path.startswith("BoN"):
        return {**row, "bon_uid": "u", "bon_best": answers[0], "loser_list": answers[1:]}, rewards
    return {**row, "pair_uid": "u", "chosen": answers[0], "reject": answers[1]}, rewards


def test_rmb_is_the_mean_of_its_four_parts():
    """Helpfulness BoN: beats all losers; ties with one: 1/2. Pairs: Helpfulness 1 of 1.

    Harmlessness: pairs 0 of 2, one of them a tie. The overall mean of three parts: 1/2.
    """
    rows = rows_of(
        "rmb",
        rmb("BoN_set/Helpfulness/Chat/Discussion", [3, 2, 1]),
        rmb("BoN_set/Helpfulness/Chat/Discussion", [3, 3, 1]),
        rmb("Pairwise_set/Helpfulness/Code/X", [1, 0]),
        rmb("Pairwise_set/Harmlessness/S1", [0, 0]),
        rmb("Pairwise_set/Harmlessness/S2", [0, 1]),
    )
    result = score("rmb", rows)
    parts = {"Helpfulness BoN": 0.5, "Helpfulness Pairwise": 1, "Harmlessness Pairwise": 0}
    assert result["sections"] == pytest.approx(parts)
    assert result["overall"] == pytest.approx(0.5)
    assert result["missing"] == ["Harmlessness BoN"]


def group(labels, **more):
    candidates = [{"output": "x", "label": label} for label in labels]
    return {"prompt": "q", "candidates": candidates, "rewards": [0.0] * len(labels), **more}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rewardbench", group([1, 0]), "has no `subset`"),
        ("rewardbench", group([1, 1], subset="hep-go"), "the same label"),
        ("rewardbench", group([], subset="hep-go"), "no group of candidates with a `label`"),
        ("rewardbench", group([1, 0], benchmark="rmb"), "is a row of `rmb`, not of"),
        ("m-rewardbench", group([1, 0], subset="hep-go"), "has no `language`"),
        ("rewardbench2", group([1, 0], subset="Ties", id="7"), "`ref:N` or `tied:N`"),
        ("rm-bench", group([1, 0], subset="chat"), "three chosen and three rejected"),
        ("judgebench", group([1, 0, 0], subset="mmlu-pro"), "needs two candidates"),
        ("rewardmath", group([1, 0]), "has no `id`"),
        ("ppe", group([1, 0]), "has no `meta.sampled_conflict_pairs`"),
        ("ppe", group([1, 0], meta={"sampled_conflict_pairs": [[0, 9]]}), r"\[0, 9\] is no pair"),
        ("ppe", group([1, 1], meta={"sampled_conflict_pairs": [[0, 1]]}), "is no conflict"),
        ("rmb", group([1, 0], subset="Pairwise_set/Other"), "neither Helpfulness nor"),
    ],
)
def test_odd_rows_are_named(name, row, message):
    with pytest.raises(RecordError, match=message) as error:
        score(name, [row])
    assert error.value.where == "rows.jsonl:1"


def test_a_twice_given_ties_row_and_no_row_at_all_are_refused():
    twice = rows_of("rewardbench2", *[rewardbench2("ref:1", "Ties", [1], [0])] * 2)
    with pytest.raises(RecordError, match="stands in two rows"):
        score("rewardbench2", twice)
    with pytest.raises(RecordError, match="no row counts for rewardbench: subset `x`"):
        score("rewardbench", [group([1, 0], subset="x")])


def test_the_interval_is_that_of_a_weighted_mean_of_shares():
    """Safety alone: donotanswer 68 of 136, xstest-should-respond 125 of 250, both p = 1/2.

    Variance: (136/386)^2 / (4 x 136) + (250/386)^2 / (4 x 250) = 1 / (4 x 386): the standard error
    is 0.02545, so the interval is 0.5 +- 0.0499, but for the Monte Carlo error of its ends.
    """
    rows = [
        ({**row, "id": str(i)}, rewards)
        for subset, n in (("donotanswer", 68), ("xstest-should-respond", 125))
        for i in range(n)
        for row, rewards in rewardbench(subset, *BOTH)
    ]
    low, high = score("rewardbench", rows_of("rewardbench", *rows))["intervals"]["Safety"]
    assert (low, high) == (pytest.approx(0.4501, abs=0.006), pytest.approx(0.5499, abs=0.006))


def test_eval_reports_the_benchmark_from_published_rows(tmp_path, capfd):
    """`convert --from`, rewards beside, `eval --benchmark`: the figures of the docstring above."""
    raw = [rm_bench("safety-refuse", [1, 2, 3], [1, 2, 3]), rm_bench("chat", [3, 2, 1], [1, 2, 3])]
    source, groups = tmp_path / "rm-bench.json", tmp_path / "groups.jsonl"
    source.write_text(json.dumps([row for row, _ in raw]))
    assert run(["convert", str(source), "--from", "rm-bench", "-o", str(groups), "-q"]) == 0
    made = [json.loads(line) for line in groups.read_text().splitlines()]
    scored = tmp_path / "scored.jsonl"
    scored.write_text(
        "".join(json.dumps({**g, "rewards": r}) + "\n" for g, (_, r) in zip(made, raw, strict=True))
    )
    folder, out = tmp_path / "report", tmp_path / "v.jsonl"
    command = ["eval", str(scored), "--benchmark", "rm-bench", "--report", str(folder)]
    assert run([*command, "-o", str(out)]) == 0
    said = capfd.readouterr().err
    assert "rm-bench: its own score" in said
    assert "warning: rm-bench: no rows of math, code: `overall` is without" in said
    result = json.loads((folder / "report.json").read_text())["benchmark"]
    # safety: hard 0, normal 0, easy 1; chat: 1/3 each
    assert result["overall"] == pytest.approx(1 / 3)
    assert result["sections"]["easy"] == pytest.approx(2 / 3)
    categories = json.loads((folder / "report.json").read_text())["categories"]
    assert set(categories) == {"chat", "safety-refuse"}
    assert "Score of rm-bench" in (folder / "report.html").read_text()
    assert run(["eval", str(scored), "--benchmark", "judgebench"]) == 3
    assert f"polarctl: {scored}:1: is a row of `rm-bench`" in capfd.readouterr().err
    assert run(["eval", str(scored), "--benchmark", "judgebench", "--dry-run"]) == 3
    assert run(["eval", str(scored), "--benchmark", "rmbench"]) == 2
    capfd.readouterr()
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    rows[0]["reference"] = " b\n"  # the second chosen answer
    rows[1]["reference"] = "none of them"
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["eval", str(scored), "--benchmark", "rm-bench"]) == 0
    said = capfd.readouterr().err
    assert "warning: 1 records have a candidate that is the reference itself" in said


def test_rewardmath_becomes_groups_by_itself(tmp_path, capfd):
    rows = [
        {"id": i, "problem_id": p, "problem": f"P{p}", "answer": "4", "solution_type": kind}
        | {"eval_solution": ["two and two", f"are {i}"]}
        for p in (1, 2)
        for i, kind in enumerate(("chosen", "rejected", "rejected"))
    ]
    source, out = tmp_path / "m.jsonl", tmp_path / "o.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["convert", str(source), "--from", "rewardmath", "-o", str(out)]) == 0
    assert "join: problem_id (a row of rewardmath is one solution" in capfd.readouterr().err
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["id"] for one in made] == ["1", "2"]
    assert made[0]["candidates"][1] == {"output": "two and two\nare 1", "label": 0}
