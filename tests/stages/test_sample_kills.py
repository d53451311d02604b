"""A pool of twelve policies whose processes are killed: the same command ends in the same bytes.

A kill is one of three, at a random size of the output: SIGKILL to the program, to one of the
processes of `--gpus`, or to all of them at once, as when memory runs out. `make test-faults` has
20,000 prompts and 20 kills.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import orjson
import pytest
from faults import FULL, count, draws, is_gone, report, sha256
from forks import Forks
from tiny import build_lm

POLICIES, PROMPTS, SAMPLES, WORKERS = 12, count(40, 20_000), 3, 2
SHARED = 2  # further policies, each of which answers half of the prompts
KILLS, TOKENS = count(3, 20), count(4, 16)
# Units of work in the small run: 12 policies x 5 windows, and a few.
FIRST = f"from polarctl.stages import sample; sample.WINDOW_ROWS = {count(8, 256)}; "
PATIENCE_S = 600  # for a machine that does much else


@pytest.fixture(scope="module")
def forks():
    with Forks("models") as made:
        yield made


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pool file of policies that differ in weights, size, kind, temperature and share."""
    folder = tmp_path_factory.mktemp("pool")
    rows = []
    for number in range(POLICIES + SHARED):
        chat = number % 3 == 2
        model = build_lm(
            folder / f"lm-{number}", chat=chat, seed=number, hidden_size=16, layers=1 + number % 2
        )
        row = {"policy": f"p{number:02}", "model": str(model), "group": "chat" if chat else "base"}
        row |= {"temperature": 0.7} if number % 4 == 1 else {}
        rows.append(row | ({"weight": 0.5} if number >= POLICIES else {}))
    path = folder / "pool.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def workers_of(child):
    """Numbers of the processes that a process has started and that are not gone."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{child}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return [number for number in found if not is_gone(number)]


class Run:
    """The command, and what of it is killed."""

    def __init__(self, source, pool, folder, forks):
        self.out, self.said, self.forks = folder / "out.jsonl", folder / "said", forks
        self.command = [
            *("sample", source, "--pool", pool, "--samples", SAMPLES),
            *("--max-new-tokens", TOKENS, "--batch-size", 768),
            *("--device", "cpu", "--gpus", WORKERS, "-q"),
            *("-o", self.out, "--rejects", folder / "rejects.jsonl"),
        ]
        self.files = [self.out, folder / "rejects.jsonl"]

    def finish(self):
        self.said.write_text("")
        assert self.forks.run(self.command, self.said, first=FIRST) == 0, self.said.read_text()

    def kill(self, what, size, draw):
        """Start the command and kill it when its output has a size; whether it was killed."""
        self.said.write_text("")
        child = self.forks.start(self.command, self.said, first=FIRST)
        end, workers = time.monotonic() + PATIENCE_S, []
        while not is_gone(child):
            workers = workers_of(child)
            if len(workers) == WORKERS and self.out.exists() and self.out.stat().st_size >= size:
                break
            assert time.monotonic() < end
            time.sleep(0.002)
        doomed = {"program": [child], "worker": draw.sample(workers, len(workers))[:1]}
        for number in doomed.get(what, [child, *workers]):
            with contextlib.suppress(ProcessLookupError):  # at its end by itself
                os.kill(number, signal.SIGKILL)
        status, said = self.forks.finish(), self.said.read_text()
        while any(not is_gone(number) for number in workers):  # none is left behind
            assert time.monotonic() < end, f"{what}: a process goes on without its parent"
            time.sleep(0.01)
        assert "Traceback" not in said, said
        if status == 1:
            assert what == "worker" and "was killed by SIGKILL" in said, said
        else:
            assert status in (0, -signal.SIGKILL), said
        return status != 0


def counts_of(path):
    return json.loads(Path(f"{path}.manifest.json").read_bytes())["counts"]


def compare(run, other):
    """The same files, byte for byte, and the same counts; the rest of a manifest has times."""
    assert [sha256(path) for path in run.files] == [sha256(path) for path in other.files]
    assert counts_of(run.out) == counts_of(other.out)
    names = [{path.name for path in each.out.parent.iterdir()} for each in (run, other)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_pool_whose_processes_are_killed_ends_in_the_same_bytes(forks, pool, tmp_path):
    draw = draws("kills of a pool")
    source = tmp_path / "prompts.jsonl"
    with source.open("w") as stream:
        for number in range(PROMPTS):
            row = {"prompt": f"What is {number} and é?", "id": f"q{number}"}
            if number % 97 == 11:
                row["prompt"] *= 30  # longer than the context: to the rejects
            stream.write(json.dumps(row) + "\n")
    whole, torn = (tmp_path / name for name in ("whole", "torn"))
    whole.mkdir(), torn.mkdir()
    undisturbed, disturbed = (Run(source, pool, folder, forks) for folder in (whole, torn))
    begun = time.monotonic()
    undisturbed.finish()
    seconds = time.monotonic() - begun
    wanted = [path.read_bytes() for path in undisturbed.files]
    tallies = counts_of(undisturbed.out)["policies"]
    assert len(tallies) == POLICIES + SHARED
    long = sum(number % 97 == 11 for number in range(PROMPTS))
    for number, tally in enumerate(tallies.values()):
        made = tally["records"] + tally["empty"]
        if number >= POLICIES:
            assert made == pytest.approx(PROMPTS * SAMPLES / 2, rel=0.1 if FULL else 0.6)
        else:
            assert tally["unfit"] == long and tally["records"] > 0
            assert made == (PROMPTS - long) * SAMPLES
    kills = dict.fromkeys(("program", "worker", "all"), 0)
    sizes = sorted(draw.uniform(0, 0.9) * len(wanted[0]) for _ in range(KILLS))
    ways = [sorted(kills)[number % len(kills)] for number in range(KILLS)]
    draw.shuffle(ways)
    while sizes:
        what = ways[len(sizes) - 1]
        if not disturbed.kill(what, sizes[0], draw):  # it was quicker: to be killed in another
            compare(disturbed, undisturbed)
            shutil.rmtree(torn)
            torn.mkdir()
            continue
        sizes.pop(0)
        kills[what] += 1
        for path, data in zip(disturbed.files, wanted, strict=True):
            left = path.read_bytes() if path.exists() else b""
            assert data.startswith(left), f"{path.name} is no prefix after {kills}"
    disturbed.finish()
    compare(disturbed, undisturbed)
    texts = sum(tally["records"] for tally in tallies.values())
    samples = sum(tally["records"] + tally["empty"] for tally in tallies.values())
    report(
        f"pool of {POLICIES} and {SHARED}",
        **{f"kills of {what}": number for what, number in kills.items()},
        **{"samples": samples, "texts": texts, "bytes": len(wanted[0])},
        **{"seconds undisturbed": round(seconds), "bytes lost": 0},
    )
