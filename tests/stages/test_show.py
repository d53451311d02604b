"""`show`: what a reader sees, and that no text of a record can do anything to a terminal."""

import fcntl
import json
import os
import pty
import random
import re
import shlex
import struct
import subprocess
import sys
import termios
import unicodedata

import pytest
from rich.cells import cell_len

from polarctl import cli

TRIPLE = {
    "id": "t1",
    "prompt": "What is 2+2?",
    "reference": "4",
    "chosen": "The answer is four.",
    "rejected": "The answer is five.",
    "policy": "left",
    "rejected_policy": "right",
    "rewards": [1.25, -0.5],
}
PROGRAM = [sys.executable, "-m", "polarctl"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Short paths: a long one is folded."""
    monkeypatch.chdir(tmp_path)


def verdict(name, margin, **more):
    return {
        "id": name,
        "correct": margin > 0,
        "margin": margin,
        "rewards": [margin, 0.0],
        "baselines": {"length": 0.5},
        "texts": {"prompt": "p", "better": "a b", "worse": "a c"},
        **more,
    }


def written(tmp_path, *rows):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def shown(capfdbinary, *arguments):
    assert cli.run(["show", *arguments]) == 0
    return capfdbinary.readouterr().out.decode()


def test_a_pair_is_shown_with_its_difference_marked(tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capfdbinary, written(tmp_path, TRIPLE))
    lines = text.splitlines()
    assert lines == [
        "─" * 80, "in.jsonl:1 score t1 margin 1.75 right",
        "prompt", "What is 2+2?", "",
        "reference", "4", "",
        "chosen (left): reward 1.25", "The answer is {+four+}.", "",
        "rejected (right): reward -0.5", "The answer is [-five-].", "",
    ]  # fmt: skip


def test_a_wide_terminal_has_the_answers_beside_each_other(tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(capfdbinary, written(tmp_path, TRIPLE))
    assert re.search(r"^The answer is \{\+four\+\}\. +The answer is \[-five-\]\.$", text, re.M)


def test_every_kind_of_record_is_shown(tmp_path, capfdbinary):
    message = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "said"}]
    group = {"candidates": [{"output": "low"}, {"output": "high", "name": "me", "label": 1}]}
    rows = [
        {"prompt": "only", "category": "sums"},
        {"prompt": message, "output": "written", "policy": "lm", "reward": 0.5, "step": 3},
        {"prompt": "q", "reference": "r", **group, "rewards": [-2.0, 1.0]},
        verdict("v", -1, texts={"prompt": {"hash": "abc", "length": 1200}}),
        {"id": "d", "correct": {"a": True, "b": False}, "rewards": {"a": [1, 0], "b": [0, 1]}}
        | {"texts": {"prompt": "p", "better": "x", "worse": "y"}},
    ]
    text = shown(capfdbinary, written(tmp_path, *rows))
    assert "category: sums" in text
    assert "user: ask\nassistant: said\n" in text
    assert "step: 3\n" in text and "output (lm): reward 0.5\nwritten\n" in text
    # The best first.
    at = text.index
    assert at("me, label 1: reward 1") < at("high") < at("candidate 1: reward -2") < at("low")
    assert "[1,200 characters, hash abc]" in text
    assert "disagreement d" in text and "rewards of b: [0, 1]" in text


def test_the_worst_come_first(tmp_path, capfdbinary):
    margins = {"a": 0.5, "b": -3, "c": -1, "d": 2, "e": -3}
    path = written(tmp_path, {"prompt": "no margin"}, *(verdict(n, m) for n, m in margins.items()))
    text = shown(capfdbinary, path, "--worst", "3")
    assert re.findall(r"verdict (\w)", text) == ["b", "e", "c"]
    assert cli.run(["show", path, "--worst", "3", "--limit", "1"]) == 3
    assert b"no record has a margin" in capfdbinary.readouterr().err


def test_records_are_found_by_id(tmp_path, capfdbinary):
    path = written(tmp_path, *(verdict(n, 1) for n in "abc"), {"prompt": "no id"})
    text = shown(capfdbinary, path, "--id", "c", "--id", "a")
    assert re.findall(r"verdict (\w)", text) == ["a", "c"]
    hashed = re.search(r"prompt (\w{16})", shown(capfdbinary, path))[1]
    assert "no id" in shown(capfdbinary, path, "--id", hashed)
    assert cli.run(["show", path, "--id", "zz"]) == 3
    assert b"no record has the id `zz`" in capfdbinary.readouterr().err


def test_what_is_no_record_of_ours_is_named(tmp_path, capfdbinary):
    path = written(tmp_path, TRIPLE, {"prompt": 3})
    assert cli.run(["show", path]) == 3
    said = capfdbinary.readouterr().err
    assert f"{path}:2: ".encode() in said
    assert b"--rejects" not in said  # which it does not have


@pytest.mark.parametrize("columns", [20, 61, 100, 133])
def test_hostile_text_is_seen_and_obeyed_by_nothing(columns, tmp_path, capfdbinary, monkeypatch):
    """Nothing but printable characters and line ends; no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    draw = random.Random(columns)
    kinds = [
        "\x1b[2J", "\x1b]52;c;aGk=\x07", "\x9b31m", "\r", "\b\b", "\u202e", "\u2066", "\ufeff",
        "\x00", "\u2028", "日本語", "한국어", "👩‍👩‍👧", "é", "word", "[bold]", ":smile:", "\t",
        "\n", " ",
    ]  # fmt: skip
    rows = []
    for _ in range(25):
        a, b = ("".join(draw.choices(kinds, k=draw.randrange(60))) for _ in "ab")
        rows.append({**TRIPLE, "prompt": a, "chosen": b + " x", "rejected": b + " y", "note": b})
        rows.append({**TRIPLE, "id": a, "policy": b, "chosen": a, "rejected": b})
    text = shown(capfdbinary, written(tmp_path, *rows))
    assert "\\x1b[2J" in text.replace("\n", "") and "[bold]" in text.replace("\n", "")
    for line in text.split("\n"):
        assert not [c for c in line if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
        assert cell_len(line) <= columns, line


def test_a_reader_that_has_enough_ends_it_quietly(tmp_path):
    path = written(tmp_path, *[TRIPLE] * 3000)
    command = f"{shlex.join(PROGRAM)} show {path} | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[1:] == ["0"]
    assert result.stderr == ""


def on_a_terminal(arguments, columns, **environment):
    """What the program writes on a terminal of so many columns, and its exit status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "PAGER")}
    child = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**known, "TERM": "xterm", **environment},
    )
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    assert child.stderr.read() == b""
    return child.wait(), b"".join(pieces).decode()


def test_a_terminal_has_colour_its_own_width_and_the_users_pager(tmp_path):
    path = written(tmp_path, *[TRIPLE] * 200)
    pager = tmp_path / "my-pager"
    pager.write_text('#!/bin/sh\necho "LESS=$LESS"\nexec head -12\n')
    pager.chmod(0o755)
    status, text = on_a_terminal(["show", path], 120, PAGER=str(pager))
    lines = text.split("\r\n")
    assert status == 0, text
    assert lines[0] == "LESS=FRX"
    assert len(lines) == 14  # its twelve, and the end of the last: it had enough
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    assert cell_len(plain[1]) == 120
    assert "The answer is four.  " in "".join(plain)
    assert any("\x1b[" in line and "four" in line for line in lines)

    status, text = on_a_terminal(["show", path, "--limit", "1", "--no-color"], 60, PAGER="cat")
    assert status == 0
    assert "\x1b" not in text and "{+four+}" in text
    assert all(cell_len(line) <= 60 for line in text.split("\r\n"))
