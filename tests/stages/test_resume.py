"""Training runs killed with SIGKILL, in a save too, end in the bytes of an undisturbed run."""

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
from tiny import with_options

from polarctl.cli import run

# Options of each way to train, and its number of processes. A batch of 12 groups of about 20 tokens
# in rows of 90: three forward passes a step and more.
WAYS = {
    "accumulation": (["--batch-tokens", "90"], 1),
    "lora": (["--lora-rank", "4", "--lr", "1e-2"], 1),
    "zero2": (["--deepspeed", "zero2", "--batch-tokens", "50"], 2),
    "zero3": (["--deepspeed", "zero3"], 2),
}
ALONE = {f"{name}-alone": (["--deepspeed", name], 1) for name in ("zero1", "zero2", "zero3")}
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
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.communicate()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_ends_in_the_same_bytes(way, triples, tiny_lm, tmp_path):
    processes = WAYS[way][1]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    finish(command(triples, tiny_lm, whole, way), processes)
    assert lines(whole / "metrics.jsonl") == STEPS
    draw = random.Random(way)
    arguments = command(triples, tiny_lm, out, way)
    reached = []
    for kill in range(2):
        # Saving takes most of a step here: a kill some milliseconds later is mostly in a save.
        until = draw.randint(2, STEPS // 2) + kill * STEPS // 3
        child = start(arguments, processes)
        while child.poll() is None and lines(out / "metrics.jsonl") < until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        kill_all(child)
        reached.append(lines(out / "metrics.jsonl"))
    assert reached[0] < STEPS and reached[0] <= reached[1]  # the second went on from the first
    finish(arguments, processes)
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")
    assert sha256(out / "metrics.jsonl") == sha256(whole / "metrics.jsonl")


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


def test_other_data_or_another_number_of_processes_is_another_run(
    stopped, triples, tiny_lm, tmp_path, capfd, monkeypatch
):
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
