"""`polarctl compare` on rewards whose figures can be worked out by hand."""

import json

import pytest

from polarctl.cli import run


def write(path, rights, **more):
    """A pair for each prompt, right or wrong; even ones are of category x, odd ones of y."""
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            **{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"},
            **{"category": "xy"[i % 2], "rewards": [1 if right else -1, 0], **more},
        }
        for i, right in enumerate(rights)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# 20 items: b is alone right on 12 of them, a on none: p = 2 / 2^12.
A = [False] * 12 + [True] * 8
B = [True] * 20


def test_a_better_one_is_told_with_figures_and_cases(tmp_path, capfd):
    a, b = write(tmp_path / "a.jsonl", A), write(tmp_path / "b.jsonl", B)
    out, folder = tmp_path / "cases.jsonl", tmp_path / "r"
    assert run(["compare", a, b, "-o", str(out), "--report", str(folder)]) == 0
    report = json.loads((folder / "report.json").read_text())
    found = report["differences"]["b"]
    assert found["value"] == pytest.approx(0.6) and found["low"] > 0
    assert (found["first_only"], found["second_only"], found["items"]) == (0, 12, 20)
    assert found["p"] == pytest.approx(2 / 4096)
    assert report["overall"]["a"]["value"] == pytest.approx(0.4)
    assert report["categories"]["x"]["differences"]["b"]["value"] == pytest.approx(6 / 10)
    said = capfd.readouterr().err
    assert "b is better than a: +60.0 points [" in said and "p = 0.00049" in said
    cases = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(cases) == 12
    assert cases[0]["correct"] == {"a": False, "b": True}
    assert cases[0]["rewards"] == {"a": [-1, 0], "b": [1, 0]}
    assert cases[0]["texts"] == {"prompt": "q0", "better": "good 0", "worse": "bad"}
    assert cases[0]["where"] == f"{a}:1" and cases[0]["category"] == "x"
    assert "b is better than a" in (folder / "report.html").read_text()
    assert "| all | b | 20 |" in (folder / "report.md").read_text()
    for name in ("accuracy", "differences"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()
    assert "Left out" not in (folder / "report.md").read_text()
    # By another field, without texts, to stdout.
    assert run(["compare", a, b, "--no-text", "--by", "prompt", "-q"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert json.loads(lines[0])["texts"]["worse"]["length"] == 3
    assert run(["compare", a, b, "--by", "kind"]) == 2


def test_a_worse_one_fails_every_time_it_is_asked(tmp_path, capfd):
    old, new = write(tmp_path / "old/scores.jsonl", B), write(tmp_path / "new/scores.jsonl", A)
    command = ["compare", str(tmp_path / "old"), new, "-o", str(tmp_path / "c")]
    assert run(command) == 0
    for _ in range(3):
        assert run([*command, "--fail-if-worse"]) == 5
        assert "polarctl: worse than old: new" in capfd.readouterr().err
    turned = ["compare", new, old, "--fail-if-worse", "-q", "-o", str(tmp_path / "d")]
    assert run(turned) == 0
    # One item of 20 is no difference that can be told.
    near = write(tmp_path / "near.jsonl", [False] + [True] * 19)
    assert run(["compare", old, near, "--fail-if-worse", "-o", str(tmp_path / "e")]) == 0
    assert "no difference can be told between old and " in capfd.readouterr().err


def test_what_is_not_compared_is_counted_and_said(tmp_path, capfd):
    a = write(tmp_path / "a.jsonl", A)
    b = write(tmp_path / "b.jsonl", B[:15], rejected="something else")
    with open(b, "a") as file:
        file.write(open(a).readline())
    assert run(["compare", a, b, "-o", str(tmp_path / "c")]) == 0
    said = capfd.readouterr().err
    assert "1 common items" in said
    # q0 is in b twice: as in a, and with another answer. 15 - 19 are in a alone.
    assert "warning: a: 5 items are not in every file: left out" in said
    assert "warning: a: 14 items have an id of another file and other content" in said
    assert "warning: b: 15 items have an id of another file and other content" in said
    with open(b, "w") as file:
        file.write(json.dumps({"prompt": "z", "chosen": "a", "rejected": "b", "rewards": [1, 0]}))
    assert run(["compare", a, b, "-o", str(tmp_path / "d")]) == 3
    assert "the files have no item in common" in capfd.readouterr().err


def test_bad_input_is_told(tmp_path, capfd):
    a = write(tmp_path / "a.jsonl", A)
    assert run(["compare", a]) == 2
    assert "two scored files or more" in capfd.readouterr().err
    assert run(["compare", a, str(tmp_path)]) == 2
    assert "holds no scores.jsonl" in capfd.readouterr().err
    assert run(["compare", a, str(tmp_path / "nothing")]) == 2
    unscored = tmp_path / "u.jsonl"
    unscored.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    assert run(["compare", a, str(unscored)]) == 3
    assert f"polarctl: {unscored}:1: has no reward" in capfd.readouterr().err
    unscored.write_text("{\n")
    assert run(["compare", a, str(unscored)]) == 3
    said = capfd.readouterr().err
    assert f"{unscored}:1: no JSON" in said and "--rejects" not in said
