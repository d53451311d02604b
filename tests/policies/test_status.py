"""What is said of a run's policies while it goes on and at its end."""

import contextlib
import os
import re
import sys
import threading

import orjson
import pytest

from polarctl import cli, console
from polarctl.policies import status
from polarctl.policies.pool import Policy
from polarctl.stages import sample as stage


class Clock:
    """Seconds, as told."""

    now = 0.0

    def monotonic(self):
        return self.now


def test_figures_are_those_of_this_run_and_of_each_policy(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(status, "time", clock)
    a, b, c = (Policy(name=name, model="m", samples=samples) for name, samples in
               [("a", 2), ("b", 3), ("c", 1)])  # fmt: skip
    tallies = {
        "a": {"records": 190, "empty": 4, "unfit": 3, "loop": 19, "tokens": 9000},
        "b": {"records": 60, "empty": 0, "unfit": 0, "tokens": 600},
    }
    run = status.Status([(a, 100), (b, 1000), (c, 0)], tallies)
    assert run.total == 200 + 3000 and run.idle() == ["`c`"]
    run.skip(a, 100)
    run.skip(b, 10)
    assert run.done == 230 and run.line() == "" and run.running() == []
    clock.now = 50.0
    run.begin(b, 10)
    run.begin(b, 10)
    assert run.running() == [("b", "30/3,000", "60", "0", "-", "-")]
    clock.now = 55.0
    run.end(b, 10, tokens=400)
    # 30 samples in 5 s, so 2,940 more take 490 s; 400 tokens in 5 s.
    assert run.line() == "b: 60/3,000, 80 tokens/s, 8 min 10 s left"
    assert run.running() == [("b", "60/3,000", "30", "0", "80", "8 min 10 s")]
    assert run.done == 260
    clock.now = 60.0
    run.end(b, 10, tokens=400)  # none is under way: the last one is named
    assert run.line() == "b: 90/3,000, 80 tokens/s, 8 min 05 s left"
    assert run.running()[0][:3] == ("b", "90/3,000", "0")
    # Of a 4 samples without text and 3 prompts x 2 samples failed; loops are a share of the texts.
    assert run.rows() == [
        ("a", "190", "10", "19 (10.0%)", "0", "0", "-"),
        ("b", "60", "0", "0", "0", "0", "80"),
        ("c", "0", "0", "0", "0", "0", "-"),
    ]


def test_a_line_names_few_policies_and_counts_the_rest():
    policies = [Policy(name=f"p{n}", model="m", samples=1) for n in range(5)]
    run = status.Status([(policy, 10) for policy in policies], {"p1": {"empty": 1, "unfit": 1}})
    for policy in policies:
        run.begin(policy, 5)
    assert run.line() == "p0: 0/10; p1: 0/10, 2 failed; p2: 0/10; 2 more policies"


def test_without_a_terminal_a_line_names_the_policies_at_work(
    tmp_path, tiny_lm, monkeypatch, capsys
):
    monkeypatch.setattr(stage, "WINDOW_ROWS", 8)
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    rows = [{"policy": name, "model": str(tiny_lm), "samples": 1} for name in ("first", "second")]
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    prompts = [{"prompt": f"Text {number} is"} for number in range(24)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, prompts)))
    command = ["sample", str(tmp_path / "in.jsonl"), "--pool", str(tmp_path / "pool.jsonl")]
    assert cli.run([*command, "-o", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "/48 samples" in line]
    lines = [re.split(r" (?=first|second)", line) for line in said]
    assert [whole.split("/48")[0] for whole, _ in lines] == [
        f"sample: {done}" for done in (8, 16, 24, 32, 40, 48)
    ]
    assert [mine.split(",")[0] for _, mine in lines] == [
        f"{name}: {done}/24" for name in ("first", "second") for done in (8, 16, 24)
    ]
    assert all(re.search(r", [\d,]+ tokens/s, \d+ s left$", mine) for _, mine in lines)


@contextlib.contextmanager
def terminal(monkeypatch, columns):
    """stderr as a terminal of that width; gives what was shown on it so far."""
    ours, theirs = os.openpty()
    shown = bytearray()

    def read():
        with contextlib.suppress(OSError):  # closed on the other side
            while data := os.read(ours, 4096):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch, os.fdopen(theirs, "w") as stream:
        patch.setattr(sys, "stderr", stream)
        yield shown
    reader.join()
    os.close(ours)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_policies_at_work_and_the_table_once(
    tmp_path, tiny_lm, monkeypatch, quiet
):
    rows = [{"policy": name, "model": str(tiny_lm)} for name in ("first", "second")]
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    prompts = [{"prompt": f"Text {number} is"} for number in range(40)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, prompts)))
    command = ["sample", str(tmp_path / "in.jsonl"), "--pool", str(tmp_path / "pool.jsonl")]
    command += ["-o", str(tmp_path / "out.jsonl"), "--max-new-tokens", "24", "--no-color"]
    with terminal(monkeypatch, 120) as shown:
        assert cli.run([*command, *(["-q"] if quiet else [])]) == 0
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "").split("\n")
    heads = [line.split() for line in lines]
    assert (["Policy", "Done", "Running", "Failed", "Tokens/s", "Left"] in heads) is not quiet
    assert (["first", "0/80", "80", "0", "-", "-"] in heads) is not quiet
    last = [line for line in heads if line[:3] == ["Policy", "Texts", "Failed"]]
    assert len(last) == (not quiet)
    if not quiet:
        assert any(words[:2] == ["second", "80"] for words in heads)
