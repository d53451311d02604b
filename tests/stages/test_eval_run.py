"""`polarctl eval run NAME`: a whole benchmark in one command, with a model of random weights."""

import json
import re
from statistics import fmean

import pytest
from tiny import build_lm

from polarctl import RewardModel, __version__
from polarctl.cli import run
from polarctl.evaluation.suites import SUITES
from polarctl.records import Record, Report, check


@pytest.fixture
def data(tmp_path):
    rows = [
        {
            "id": i,
            "prompt": f"question {i}",
            "chosen": [f"yes {i}", f"yes it is {i}", f"* yes {i}"],
            "rejected": [f"no {i}", f"no it is not {i}", f"* no {i}"],
            "domain": ("chat", "math", "code", "safety-refuse")[i % 4],
            "answer": f"it is {i}",
        }
        for i in range(8)
    ]
    path = tmp_path / "rm-bench.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_a_benchmark_in_one_command_goes_on_and_is_checked_each_time(
    tiny_rm, data, tmp_path, capfd
):
    folder = tmp_path / "made"
    command = ["eval", "run", "rm-bench", "-m", str(tiny_rm), "--data", data, "-o", str(folder)]
    command += ["--reference-field", "answer", "--device", "cpu"]
    assert run([*command, "--dry-run"]) == 0
    said = capfd.readouterr().err
    assert f"polarctl convert {data} --from rm-bench" in said and not folder.exists()
    assert run(command) == 0
    said = capfd.readouterr().err
    assert f"polarctl score {folder}/groups.jsonl" in said
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert scores[3]["reference"] == "it is 3" and len(scores[3]["rewards"]) == 6
    report = json.loads((folder / "report" / "report.json").read_text())
    check(report, Report)
    suite = SUITES["rm-bench"]()
    for row in scores:
        suite.add(Record(row), row["rewards"], [c["label"] for c in row["candidates"]])
    expected = {**suite.result(0), "references": {"field": 8}}
    assert report["benchmark"] == json.loads(json.dumps(expected))
    assert report["benchmark"]["rows"] == 8 and report["benchmark"]["missing"] == []
    head = (folder / "report" / "report.md").read_text().partition("\n## ")[0].replace("\\", "")
    assert f"* model: {tiny_rm}\n" in head  # from the manifest of the scores
    assert f"* data: {folder}/scores.jsonl: 8 records\n" in head
    assert f"* command: polarctl eval {folder}/scores.jsonl --benchmark rm-bench" in head
    assert f"* versions: polarctl {__version__}, Python" in head
    assert re.search(r"\* date: 20\d\d-\d\d-\d\d \d\d:\d\d UTC\n", head)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    (folder / "verdicts.jsonl").unlink()
    (folder / "verdicts.jsonl.manifest.json").unlink()
    for _ in range(2):  # what is there stays, the check is made again
        assert run([*command, "--min-accuracy", "1", "-q"]) == 5
        said = capfd.readouterr().err
        assert "is below 1" in said and "has ended with exit status 5" in said
        assert "option" not in said
    for name in ("groups.jsonl", "scores.jsonl"):
        assert (folder / name).stat().st_mtime_ns == times[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "rmbench", "-m", "x"], "`rmbench` is none"),
        (["run", "-m", "x"], "`eval run` takes one benchmark"),
        (["run", "rm-bench"], "`eval run` needs a reward model"),
        (["run", "ppe", "-m", "x"], "its rows are not one data set of the Hub"),
    ],
)
def test_what_cannot_be_run_says_so(arguments, message, capfd):
    assert run(["eval", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_rows_without_a_reference_end_the_run_with_the_stages_own_status(
    tiny_rm, data, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["eval", "run", "rm-bench", "-m", str(tiny_rm), "--data", data, "--device", "cpu"]
    assert run([*command, "-q"]) == 3
    said = capfd.readouterr().err
    assert "missing field `reference`" in said
    assert "`polarctl score` has ended with exit status 3" in said
    assert run([*command, "--no-reference", "-q"]) == 0
    assert (tmp_path / f"rm-bench-{tiny_rm.name}" / "report" / "report.html").exists()


def test_a_correct_answer_is_compared_with_the_other_correct_ones(tiny_rm, data, tmp_path, capfd):
    """Reward of a correct answer: the mean over the two others; of a wrong one, over all three."""
    folder = tmp_path / "made"
    command = ["eval", "run", "rm-bench", "-m", str(tiny_rm), "--data", data, "-o", str(folder)]
    command += ["--device", "cpu", "--reference-from", "other-correct"]
    assert run(command) == 0
    assert "references: other correct answers" in " ".join(capfd.readouterr().err.split())
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    judge = RewardModel.from_pretrained(str(tiny_rm), device="cpu")
    for row in rows[:2]:
        right = [c["output"] for c in row["candidates"] if c["label"] == 1]
        assert row["references"] == right and len(right) == 3
        expected = [
            fmean(
                judge.score(row["prompt"], reference, c["output"])
                for reference in right
                if reference != c["output"]
            )
            for c in row["candidates"]
        ]
        assert row["rewards"] == pytest.approx(expected, abs=1e-4)
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["benchmark"]["references"] == {"other-correct": 8}
    assert "references: other correct answers" in (folder / "report" / "report.md").read_text()


def test_a_row_with_one_correct_answer_has_no_other(tiny_rm, tmp_path, capfd):
    rows = [
        {"id": str(i), "prompt": f"q{i}", "chosen": [f"yes {i}", f"right {i}"][: i + 1]}
        | {"rejected": [f"no {i}"], "subset": "Math"}
        for i in range(2)
    ]
    path = tmp_path / "rb2.json"
    path.write_text(json.dumps(rows))
    command = ["eval", "run", "rewardbench2", "-m", str(tiny_rm), "--data", str(path)]
    command += ["--device", "cpu", "--reference-from", "other-correct", "-o"]
    assert run([*command, str(tmp_path / "a")]) == 0
    assert "1 rows are left out" in capfd.readouterr().err
    path.write_text(json.dumps(rows[:1]))
    assert run([*command, str(tmp_path / "b"), "-q"]) == 3
    assert "no row has a reference: none has two correct answers" in capfd.readouterr().err


def test_a_policy_writes_the_references(tiny_rm, data, tmp_path, capfd):
    policy = tmp_path / "writer"
    build_lm(policy, seed=4)
    folder = tmp_path / "made"
    command = ["eval", "run", "rm-bench", "-m", str(tiny_rm), "--data", data, "-o", str(folder)]
    command += ["--device", "cpu", "--reference-from", "generate"]
    assert run(command) == 2
    assert "needs a policy" in capfd.readouterr().err
    assert run([*command, "--reference-policy", str(policy)]) == 0
    said = capfd.readouterr().err
    assert f"polarctl sample {folder}/groups.jsonl" in said
    wrote = [json.loads(line) for line in (folder / "references.jsonl").read_text().splitlines()]
    texts = {row["id"]: row["output"] for row in wrote}
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert rows and all(row["reference"] == texts[row["id"]] for row in rows)
    assert {row["reference_policy"] for row in rows} == {"writer"}
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["benchmark"]["references"] == {"generate": len(rows)}
