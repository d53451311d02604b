"""A long run through a server with faults: nothing is lost, doubled or moved.

`make test-faults` takes a hundred thousand records, and five thousand requests to a bad server.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from faults import count, draws, report
from scoring.faulty_server import FAULTS, reward_of, serving
from scoring.test_hostile_server import BAD_REPLIES, BAD_REWARDS, rows

from polarctl.cli import run
from polarctl.model import reward_model

pytestmark = pytest.mark.slow


def write(path, count):
    """Single candidates and groups of one to five."""
    with open(path, "w") as stream:
        for i in range(count):
            row = {"prompt": f"question {i}", "reference": "yes", "mine": i}
            if i % 3:
                row["output"] = f"answer {i}"
            else:
                row["candidates"] = [{"output": f"{i} {k}"} for k in range(1 + i % 5)]
            stream.write(json.dumps(row) + "\n")
    return path


def program(data, tiny_rm, out, server):
    return subprocess.Popen(
        [
            *[sys.executable, "-m", "polarctl", "score", data, "-m", tiny_rm, "-o", out],
            *["--server", server.url, "--server-deadline", "60"],
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_many_records_with_five_percent_faults(tiny_rm, tmp_path):
    records = count(20_000, 100_000)
    data = write(tmp_path / "in.jsonl", records)
    said = {}
    for share in (0.0, 0.05):
        with serving(share=share) as server:
            child = program(data, tiny_rm, tmp_path / f"{share}.jsonl", server)
            _, said[share] = child.communicate()
            assert child.returncode == 0, said[share]
            seen = dict(server.seen)
    failed = sum(seen.get(fault, 0) for fault in FAULTS)
    assert set(FAULTS) <= set(seen) and 0.03 < failed / seen["requests"] < 0.07
    again = re.search(r"([\d,]+) requests had to be sent again", said[0.05])
    # On a busy machine a good reply may come too late as well.
    assert failed <= int(again[1].replace(",", "")) <= failed + seen["requests"] // 50
    assert (tmp_path / "0.0.jsonl").read_bytes() == (tmp_path / "0.05.jsonl").read_bytes()

    encoder = reward_model.load_encoder(str(tiny_rm))
    with open(tmp_path / "0.05.jsonl") as stream:
        for place, row in enumerate(map(json.loads, stream)):
            assert row["mine"] == place
            if place % 997 == 0:
                outputs = [c["output"] for c in row.get("candidates", [row])]
                ids = [encoder.encode(row["prompt"], "yes", output) for output in outputs]
                found = row["rewards"] if "rewards" in row else [row["reward"]]
                assert found == pytest.approx([reward_of(one) for one in ids])
    assert place == records - 1


def test_a_killed_run_through_a_faulty_server_goes_on_to_the_same_bytes(tiny_rm, tmp_path):
    data = write(tmp_path / "in.jsonl", 5_000)
    with serving() as server:
        with program(data, tiny_rm, tmp_path / "whole.jsonl", server) as child:
            child.communicate()
        assert child.returncode == 0
    whole, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    with serving(share=0.2) as server:
        for windows in (1, 4):
            child = program(data, tiny_rm, out, server)
            least = windows * len(whole) // 12
            while child.poll() is None and not (out.exists() and out.stat().st_size >= least):
                time.sleep(0.002)
            assert child.poll() is None, "the run was over before it was killed"
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
            assert whole.startswith(out.read_bytes())
        child = program(data, tiny_rm, out, server)
        child.communicate()
    assert child.returncode == 0
    assert out.read_bytes() == whole


def test_a_bad_server_gives_the_rewards_of_a_good_one_or_none(tiny_rm, tmp_path):
    """A third of the replies fail as servers do, a third are made to be taken for rewards."""
    least, data = count(200, 5000), write(tmp_path / "in.jsonl", count(200, 1500))
    draw = draws("a bad server")
    seen = wrong = runs = 0

    def answer(handler, rewards):
        if draw.random() < 0.5:
            name = draw.choice([*BAD_REWARDS])
            handler.reply(200, rows("vllm", rewards, BAD_REWARDS[name]).encode())
        else:
            name = draw.choice([*BAD_REPLIES])
            handler.reply(200, BAD_REPLIES[name]([r + 1 for r in rewards]))

    options = ["-m", str(tiny_rm), "-q", "--server-batch", "4", "--server-deadline", "60"]
    with serving() as server:
        whole = tmp_path / "whole.jsonl"
        command = ["score", str(data), *options, "--server", server.url]
        assert run([*command, "-o", str(whole)]) == 0
        wanted = whole.read_bytes().splitlines()
    while seen < least:
        out = tmp_path / f"{runs}.jsonl"
        with serving(share=0.3, hostile=answer) as server:
            server.draw = draw
            command = ["score", str(data), *options, "--server", server.url]
            assert run([*command, "-o", str(out)]) == 0
            seen += server.seen["requests"]
        found = out.read_bytes().splitlines()
        wrong += sum(one != other for one, other in zip(found, wanted, strict=True))
        runs += 1
    report("a bad server", requests=seen, runs=runs, **{"wrong rewards": wrong})
    assert not wrong
