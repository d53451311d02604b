"""Training runs killed with SIGKILL, in a save too, end in the bytes of an undisturbed run.

`make test-faults` kills each way to train twenty times.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import orjson
import psutil
import pytest
import torch
from faults import count, draws, is_gone, report, sha256
from forks import Forks
from tiny import with_options

from polarctl.cli import run

# Options of each way to train, and its number of processes. A batch of 12 groups of about 20 tokens
# in rows of 90: three forward passes a step and more.
WAYS = {
    "plain": ([], 1),
    "accumulation": (["--batch-tokens", "90"], 1),
    "lora": (["--lora-rank", "4", "--lr", "1e-2"], 1),
    "zero2": (["--deepspeed", "zero2", "--batch-tokens", "50"], 2),
    "zero3": (["--deepspeed", "zero3"], 2),
}
ALONE = {f"{name}-alone": (["--deepspeed", name], 1) for name in ("zero1", "zero2", "zero3")}
KILLS = count(2, 20)
STEPS = 24  # of 12, over 60 triples: nearly five epochs, whose ends are in the middle of a step


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    path = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    draw = random.Random(0)
    with open(path, "w") as stream:
        for i in range(60):
            right, wrong = draw.sample(["yes", "no", "maybe so", "who knows"], 2)
            row = {"prompt": f"q{i}", "reference": right, "chosen": right, "rejected": wrong}
            stream.write(json.dumps(row) + "\n")
    return path


def command(triples, tiny_lm, out, way):
    """Arguments of a run, every step of which is saved."""
    own, _ = (WAYS | ALONE)[way]
    base = ["pretrain", str(triples), "-m", str(tiny_lm), "-o", str(out), "--device", "cpu", "-q"]
    base += ["--lr", "1e-3", "--batch-size", "12", "--epochs", "4.8", "--save-steps", "1"]
    return with_options(base, own)


def start(arguments, processes):
    """The run in processes of its own, in a group that can be killed as one."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.Popen(
        [*launcher, "polarctl", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(arguments, processes):
    if processes == 1:
        assert run(arguments) == 0
        return
    child = start(arguments, processes)
    _, errors = child.communicate()
    assert child.returncode == 0, errors[-3000:]


def kill_all(child):
    """SIGKILL for a process and all below it; a launcher puts them into groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return child.communicate()[1]


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def forks():
    with Forks("trainers") as made:
        yield made


def until(reached, metrics, gone):
    """Wait for a number of steps or the end of the run."""
    while not gone() and lines(metrics) < reached:
        time.sleep(0.001)


def kill_one(forks, arguments, said, metrics, draw, operations):
    """Kill a run of one process between two steps or at one of its file operations.

    Returns:
        Whether it was killed, and not over before.
    """
    said.write_text("")
    if draw.random() < 0.5:
        first = f"import faults; faults.die_at({draw.randrange(operations)}, after=True)"
        forks.start(arguments, said, first=first)
    else:
        reached = lines(metrics) + draw.randint(0, 1)
        child = forks.start(arguments, said)
        until(reached, metrics, lambda: is_gone(child))
        # Saving takes most of a step here: a kill some milliseconds later is mostly in a save.
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
    status = forks.finish()
    assert status in (0, -signal.SIGKILL), said.read_text()
    assert "Traceback" not in said.read_text()
    return status != 0


def kill_several(arguments, processes, metrics, draw):
    """Kill a run of several processes, all at once, between two steps or in a save."""
    child = start(arguments, processes)
    until(lines(metrics) + draw.randint(0, 1), metrics, lambda: child.poll() is not None)
    time.sleep(draw.uniform(0, 0.05))
    said = kill_all(child)
    assert child.returncode in (0, -signal.SIGKILL) and "Traceback" not in said, said
    return child.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_ends_in_the_same_bytes(way, forks, triples, tiny_lm, tmp_path):
    processes = WAYS[way][1]
    whole, out, said = tmp_path / "whole", tmp_path / "killed", tmp_path / "said"
    finish(command(triples, tiny_lm, whole, way), processes)
    wanted = (whole / "metrics.jsonl").read_bytes()
    assert wanted.count(b"\n") == STEPS
    draw, arguments = draws(f"kills of training, {way}"), command(triples, tiny_lm, out, way)
    kills = runs = furthest = 0
    while kills < KILLS:
        if processes > 1:
            killed = kill_several(arguments, processes, out / "metrics.jsonl", draw)
        else:
            # A save is about ten operations: mostly this dies in the second save or before.
            killed = kill_one(forks, arguments, said, out / "metrics.jsonl", draw, 25)
        kills += killed
        left = (out / "metrics.jsonl").read_bytes() if lines(out / "metrics.jsonl") else b""
        assert wanted.startswith(left), f"metrics.jsonl is no prefix after kill {kills}"
        furthest = max(furthest, lines(out / "metrics.jsonl"))
        if not killed:
            same(out, whole)
            shutil.rmtree(out)
            runs += 1
    assert furthest > KILLS // 4  # later runs went on from earlier ones
    finish(arguments, processes)
    same(out, whole)
    report(f"training, {way}", kills=kills, **{"whole runs": runs + 1, "bytes lost": 0})


def same(out, whole):
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("model.safetensors", "metrics.jsonl"):
        assert sha256(out / name) == sha256(whole / name), name


@pytest.mark.slow
def test_processes_save_after_the_same_step_when_the_clock_of_the_first_asks(
    triples, tiny_lm, tmp_path
):
    """30 ms are some steps here; if each process looked at its own clock, they would not meet."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    more = ["--save-steps", "1000", "--save-minutes", "0.0005", "--batch-tokens", "50"]
    finish(with_options(command(triples, tiny_lm, whole, "accumulation"), more), 2)
    arguments = with_options(command(triples, tiny_lm, out, "accumulation"), more)
    child = start(arguments, 2)
    checkpoints = out / "checkpoints"
    while child.poll() is None and len(list(checkpoints.glob("*/checkpoint.json"))) < 2:
        time.sleep(0.001)
    kill_all(child)
    assert list(checkpoints.glob("step-*/checkpoint.json")) and not (out / "config.json").exists()
    finish(arguments, 2)
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")
    assert sha256(out / "metrics.jsonl") == sha256(whole / "metrics.jsonl")


@pytest.fixture(scope="module")
def stopped(triples, tiny_lm, tmp_path_factory):
    """A run that was stopped after some steps, and the weights that it is to end in."""
    folder = tmp_path_factory.mktemp("stopped")
    finish(command(triples, tiny_lm, folder / "whole", "accumulation"), 1)
    child = start(command(triples, tiny_lm, folder / "part", "accumulation"), 1)
    while child.poll() is None and lines(folder / "part/metrics.jsonl") < 5:
        time.sleep(0.001)
    os.killpg(child.pid, signal.SIGTERM)
    child.communicate()
    assert child.returncode == 75
    return folder / "part", sha256(folder / "whole/model.safetensors")


def test_two_checkpoints_are_kept(stopped):
    part, _ = stopped
    names = sorted(path.name for path in (part / "checkpoints").iterdir())
    last = lines(part / "metrics.jsonl")
    assert names == [f"step-{last - 1:08d}", f"step-{last:08d}"]


@pytest.mark.parametrize("harm", ["delete", "cut", "flip"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
def test_a_checkpoint_with_a_damaged_file_gives_way_to_the_one_before(
    name, harm, stopped, triples, tiny_lm, tmp_path, capfd
):
    part, wanted = stopped
    out = tmp_path / "part"
    shutil.copytree(part, out)
    newest = max((out / "checkpoints").iterdir())
    data = (newest / name).read_bytes()
    if harm == "delete":
        (newest / name).unlink()
    else:
        middle = len(data) // 2
        changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (newest / name).write_bytes(data[:-1] if harm == "cut" else changed)
    assert run(command(triples, tiny_lm, out, "accumulation")) in (0, 2)
    said = capfd.readouterr().err
    if "cannot resume" in said:  # a flipped bit in what the checkpoint says of the run
        assert name == "checkpoint.json" and not (out / "model.safetensors").exists()
        return
    assert f"{newest}: incomplete or damaged checkpoint, passed over" in said
    assert sha256(out / "model.safetensors") == wanted


def test_with_every_checkpoint_damaged_the_run_begins_again(
    stopped, triples, tiny_lm, tmp_path, capfd
):
    part, wanted = stopped
    out = tmp_path / "part"
    shutil.copytree(part, out)
    for checkpoint in (out / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").unlink()
    assert run(command(triples, tiny_lm, out, "accumulation")) == 0
    assert capfd.readouterr().err.count("passed over") == 2
    assert sha256(out / "model.safetensors") == wanted


@pytest.mark.slow
def test_another_number_of_processes_is_another_run(stopped, triples, tiny_lm, tmp_path, capfd):
    out = tmp_path / "part"
    shutil.copytree(stopped[0], out)
    assert run([*command(triples, tiny_lm, out, "accumulation"), "--gpus", "2"]) == 2
    said = capfd.readouterr().err
    assert "`processes` was 1 and is now 2" in said and "Traceback" not in said
    assert not (out / "model.safetensors").exists()
    assert run(command(triples, tiny_lm, out, "accumulation")) == 0
    assert sha256(out / "model.safetensors") == stopped[1]


def test_other_data_is_another_run(stopped, triples, tiny_lm, tmp_path, capfd):
    part, _ = stopped
    out = tmp_path / "part"
    shutil.copytree(part, out)
    other = tmp_path / "other.jsonl"
    # The same size: what is compared is the content.
    other.write_bytes(triples.read_bytes().replace(b"q1", b"Q1", 1))
    assert run(command(other, tiny_lm, out, "accumulation")) == 2
    assert "`input_digest` was" in capfd.readouterr().err
    assert not (out / "model.safetensors").exists()


# -- a checkpoint that somebody else has put there ------------------------------------------------


class Canary:
    """A pickle that makes a file when it is opened carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def with_mark(checkpoint):
    """Make the mark agree with the files, as one who can write into the folder can."""
    mark = json.loads((checkpoint / "checkpoint.json").read_bytes())
    for name in mark["files"]:
        data = (checkpoint / name).read_bytes()
        mark["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    del mark["sha256"]
    mark["sha256"] = hashlib.sha256(orjson.dumps(mark)).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(mark))


@pytest.mark.slow
@pytest.mark.parametrize("way", ALONE)
def test_a_pickle_in_a_checkpoint_of_deepspeed_is_refused_and_not_executed(
    way, triples, tiny_lm, tmp_path
):
    arguments = command(triples, tiny_lm, tmp_path / "out", way)
    child = start(arguments, 1)
    while child.poll() is None and lines(tmp_path / "out/metrics.jsonl") < 5:
        time.sleep(0.001)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait() == 75, child.communicate()[1][-3000:]
    child.communicate()
    newest = max((tmp_path / "out/checkpoints").iterdir())
    files = sorted(newest.rglob("*.pt"))
    assert len(files) == 2  # weights and optimiser
    canary = tmp_path / "canary"
    for file in files:
        honest = file.read_bytes()
        state = torch.load(file, weights_only=False)
        torch.save({**state, "more": Canary(canary)}, file)
        with_mark(newest)
        child = start(arguments, 1)
        said = child.communicate()[1]
        assert not canary.exists(), file.name
        assert child.returncode == 1
        assert "Traceback" not in said
        assert f"{newest}: a file in it holds `" in said and "nothing of it was run" in said
        torch.load(file, weights_only=False)  # the canary does sing
        assert canary.exists()
        canary.unlink()
        file.write_bytes(honest)
        with_mark(newest)
    child = start(arguments, 1)  # and what it has written itself is taken
    said = child.communicate()[1]
    assert child.returncode == 0, said[-3000:]
    assert lines(tmp_path / "out/metrics.jsonl") == STEPS
