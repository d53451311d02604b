"""`polarctl eval run NAME`: a whole benchmark in one command, with a model of random weights."""

import json

import pytest

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
    assert report["benchmark"] == json.loads(json.dumps(suite.result(0)))
    assert report["benchmark"]["rows"] == 8 and report["benchmark"]["missing"] == []
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
