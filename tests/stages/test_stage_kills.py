"""Every stage that writes lines, killed at random points: the same command ends in the same bytes.

A kill is one of three: SIGKILL when the output has grown to some size, SIGKILL before or after some
fsync, rename or removal, and a write that is cut at some byte. `make test-faults` kills each stage
a hundred times for each kind of file.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from faults import count, draws, is_gone, report, sha256
from forks import Forks

# A unit of work is some rows, and a compressed block some units: there is much to go on with.
SMALL = "from polarctl.storage import write; write._BLOCK_BYTES = 1500; "
WINDOWS = {
    "sample": "from polarctl.stages import sample; sample.WINDOW_ROWS = 4; ",
    "pair": "from polarctl.stages import pair; pair.WINDOW_PROMPTS = 4; ",
    "score": "from polarctl.stages import score; score.WINDOW_ROWS = 8; ",
    "eval": "from polarctl.stages import eval; eval.WINDOW_ROWS = 8; ",
    "convert": "from polarctl.stages import convert; convert.WINDOW_ROWS = 8; ",
}
OPTIONS = {
    "sample": ["--max-new-tokens", "8", "--samples", "1", "--device", "cpu"],
    "pair": [],
    "score": ["--device", "cpu"],
    "eval": [],
    "convert": ["--to", "candidates"],
}
KILLS = {"": count(4, 100), ".gz": count(2, 100), ".zst": count(2, 100)}


def rows_of(stage):
    """Rows that the stage reads; every seventh is broken and set aside."""
    draw = random.Random(5)
    for number in range({"sample": 60, "pair": 160, "eval": 250}.get(stage, 150)):
        prompt = f"q{number} é"
        if number % 7 == 3:
            yield "{broken"
        elif stage == "sample":
            yield json.dumps({"prompt": prompt})
        elif stage == "pair":
            for policy, texts in (("a", "one two"), ("b", "three four")):
                for text in texts.split():
                    row = {"prompt": prompt, "output": f"{text} {number}", "policy": policy}
                    yield json.dumps(row)
        else:
            row = {"prompt": prompt, "reference": "yes", "chosen": "yes", "rejected": "no"}
            if stage == "eval":
                row["rewards"] = [draw.uniform(-1, 1), draw.uniform(-1, 1)]
            yield json.dumps(row)


@pytest.fixture(scope="module")
def forks():
    with Forks("models") as made:
        yield made


class Stage:
    """A stage with its input; `run` and `kill` write into a folder."""

    def __init__(self, name, suffix, folder, forks, models):
        self.name, self.suffix, self.forks = name, suffix, forks
        self.source, self.models = folder / "in.jsonl", models
        self.source.write_text("\n".join(rows_of(name)) + "\n")
        self.said = folder / "said"
        self.first = SMALL + WINDOWS[name]

    def command(self, folder):
        model = ["-m", self.models[self.name]] if self.name in self.models else []
        return [
            *(self.name, self.source, *model, *OPTIONS[self.name], "-q"),
            *("-o", folder / f"out.jsonl{self.suffix}", "--rejects", folder / "bad.jsonl"),
        ]

    def files(self, folder):
        return folder / f"out.jsonl{self.suffix}", folder / "bad.jsonl"

    def run(self, folder, first=""):
        self.said.write_text("")
        status = self.forks.run(self.command(folder), self.said, first=self.first + first)
        assert status == 0, self.said.read_text()

    def kill(self, folder, draw, size, operations):
        """Start the command and kill it at a random point; whether it was killed."""
        self.said.write_text("")
        out, _ = self.files(folder)
        start = out.stat().st_size if out.exists() else 0
        way, first, until = draw.choice(["progress", "operation", "write"]), "", size
        if way == "operation":
            # Mostly one of the first: later runs have less to do.
            number = int(operations * draw.random() ** 2)
            first = f"import faults; faults.die_at({number}, after={draw.random() < 0.5})"
        elif way == "write":
            first = f"import faults; faults.die_beyond({draw.randint(1, size)})"
        else:
            until = start + draw.random() ** 2 * (size - start)
        child = self.forks.start(self.command(folder), self.said, first=self.first + first)
        if way == "progress":
            hidden = folder / f".polarctl-next.{out.name}"
            while not is_gone(child) and max(map(_size, (out, hidden))) < until:
                time.sleep(0.0005)
            os.kill(child, signal.SIGKILL)  # nobody has waited for it: the number is still its own
        status = self.forks.finish()
        said = self.said.read_text()
        assert "Traceback" not in said, said
        assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ), (way, first, status, said)
        return status != 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("suffix", KILLS)
@pytest.mark.parametrize("name", WINDOWS)
def test_a_killed_stage_ends_in_the_same_bytes(name, suffix, forks, tiny_lm, tiny_rm, tmp_path):
    stage = Stage(name, suffix, tmp_path, forks, {"sample": tiny_lm, "score": tiny_rm})
    draw = draws(f"kills of {name}{suffix}")
    whole, folder, seen = tmp_path / "whole", tmp_path / "killed", tmp_path / "operations"
    whole.mkdir(), folder.mkdir()
    stage.run(whole, f"import faults; faults.count_operations({str(seen)!r})")
    wanted = [path.read_bytes() for path in stage.files(whole)]
    assert all(wanted) and wanted[1].count(b"\n") > 5
    kills = runs = 0
    while kills < KILLS[suffix]:
        killed = stage.kill(folder, draw, len(wanted[0]), seen.stat().st_size)
        kills += killed
        for path, data in zip(stage.files(folder), wanted, strict=True):
            left = path.read_bytes() if path.exists() else b""
            assert data.startswith(left), f"{path.name} is no prefix after kill {kills}"
        if not killed or draw.random() < 0.02:
            stage.run(folder)
            assert [sha256(p) for p in stage.files(folder)] == [
                sha256(p) for p in stage.files(whole)
            ]
            names = {path.name for path in folder.iterdir()}
            assert names == {path.name for path in whole.iterdir()}
            shutil.rmtree(folder)
            folder.mkdir()
            runs += 1
    stage.run(folder)
    assert [sha256(p) for p in stage.files(folder)] == [sha256(p) for p in stage.files(whole)]
    report(f"{name}{suffix}", kills=kills, **{"whole runs": runs + 1, "bytes lost": 0})
