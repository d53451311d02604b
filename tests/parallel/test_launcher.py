"""Several processes as one: real processes, their statuses, signals and voices."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from polarctl.cli import run
from polarctl.errors import MissingError, UsageError
from polarctl.parallel import launcher

TESTS = Path(__file__).parents[1]
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")


def begin(folder, *tasks, gpus=2, **variables):
    """Start `process_worker`; see there."""
    environment = {k: v for k, v in os.environ.items() if k not in PLACES}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [sys.executable, "-m", "process_worker", str(gpus), str(folder), *tasks],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, **variables},
    )


def end(parent):
    """(status, stdout, stderr without the notes of the start)"""
    out, errors = parent.communicate(timeout=30)
    lines = [line for line in errors.splitlines() if "torchrun" not in line]
    return parent.returncode, out, [line for line in lines if not line.startswith("threads: ")]


def waiting(folder, count=2):
    """The process ids, once so many processes are in their loop."""
    give_up = time.monotonic() + 20
    while len(found := sorted(folder.glob("pid.*"))) < count or not found[-1].read_text():
        assert time.monotonic() < give_up
        time.sleep(0.01)
    return [int(path.read_text()) for path in found]


def all_gone(pids, within_s=5):
    give_up = time.monotonic() + within_s
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in pids
    ):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True


# -- one voice -------------------------------------------------------------------------------------


def test_each_process_knows_its_place_and_the_first_alone_speaks_and_writes_records(tmp_path):
    parent = begin(tmp_path, "0=say", "1=say")
    status, out, errors = end(parent)
    assert (status, out) == (0, "record of 0\n")
    assert sorted(errors) == ["note of 0", "record of 1", "warning: warning of 0"]
    threads = str(max(1, len(psutil.Process().cpu_affinity()) // 2))
    for rank in ("0", "1"):
        assert json.loads((tmp_path / f"place.{rank}").read_text()) == {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "OMP_NUM_THREADS": threads,
        }
        choices = json.loads((tmp_path / f"choices.{rank}").read_text())
        assert choices["threads"]["value"] == threads  # for the manifest


def test_threads_that_the_user_has_set_stay(tmp_path):
    parent = begin(tmp_path, "0=say", "1=say", OMP_NUM_THREADS="7")
    _, errors = parent.communicate(timeout=30)
    assert "threads:" not in errors and "OMP_NUM_THREADS" not in errors
    assert json.loads((tmp_path / "place.1").read_text())["OMP_NUM_THREADS"] == "7"
    assert json.loads((tmp_path / "choices.0").read_text()) == {}


def test_the_command_that_is_said_does_the_same(tmp_path):
    parent = begin(tmp_path, "0=say", "1=say")
    _, errors = parent.communicate(timeout=30)
    (command,) = [line for line in errors.splitlines() if "torchrun" in line]
    threads = max(1, len(psutil.Process().cpu_affinity()) // 2)
    said = (
        f"OMP_NUM_THREADS={threads} torchrun --standalone --nproc-per-node 2 "
        f"-m process_worker 2 {tmp_path} 0=say 1=say"
    )
    assert command == f"pretrain: 2 processes, as by: {said}"
    ours = {path.name: path.read_text() for path in tmp_path.glob("place.*")}
    for path in tmp_path.iterdir():
        path.unlink()
    program = shutil.which("torchrun", path=str(Path(sys.executable).parent))
    environment = {k: v for k, v in os.environ.items() if k not in PLACES}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    subprocess.run(
        said.replace("torchrun", program, 1), shell=True, check=True, env=environment, timeout=60
    )
    assert {path.name: path.read_text() for path in tmp_path.glob("place.*")} == ours


def test_arguments_are_quoted_for_a_shell():
    said = launcher.torchrun(4, 1, None, "polarctl", ["pretrain", "a b.jsonl", "--gpus", "4"])
    assert said == (
        "torchrun --standalone --nproc-per-node 4 -m polarctl pretrain 'a b.jsonl' --gpus 4"
    )


# -- failures --------------------------------------------------------------------------------------


def test_the_first_error_is_said_once_and_its_status_is_the_runs(tmp_path):
    # Process 0 is stopped, with 75 and words of its own, after process 1 has failed.
    parent = begin(tmp_path, "1=bad-record")
    assert end(parent) == (3, "", ["polarctl: t.jsonl:3: missing field `chosen`"])


def test_the_same_error_of_all_processes_is_said_once(tmp_path):
    parent = begin(tmp_path, *(f"{rank}=bad-record" for rank in range(3)), gpus=3)
    assert end(parent) == (3, "", ["polarctl: t.jsonl:3: missing field `chosen`"])


@pytest.mark.parametrize("status", [4, 75])
def test_a_status_without_words_passes_through(tmp_path, status):
    parent = begin(tmp_path, f"1=status:{status}")
    assert end(parent) == (status, "", [f"polarctl: process 1 of 2 ended with status {status}"])


def test_a_process_that_hangs_when_another_has_failed_is_killed(tmp_path):
    parent = begin(tmp_path, "0=deaf", "1=wait")
    pids = waiting(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    assert "process 1 of 2 was killed by SIGKILL" in end(parent)[2][0]
    assert all_gone(pids)


def test_a_killed_process_is_named_and_ends_the_run(tmp_path):
    parent = begin(tmp_path, "1=signal:9")
    status, _, errors = end(parent)
    assert status == 1
    assert errors[0] == "polarctl: process 1 of 2 was killed by SIGKILL"
    assert "memory" in errors[1] and len(errors) == 2


def test_a_fault_of_the_program_shows_one_traceback_with_its_process(tmp_path):
    parent = begin(tmp_path, "0=fault", "1=fault")
    status, _, errors = end(parent)
    assert status == 1
    assert sum("Traceback" in line for line in errors) == 1
    assert errors[-1] in [
        f"polarctl: process {rank} of 2: ValueError: a fault of the program" for rank in (0, 1)
    ]


def test_under_torchrun_alone_an_error_says_whose_it_is(tmp_path):
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "polarctl", "pretrain", "-m", "x", "-o", str(tmp_path / "o"), "no"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("polarctl: process 1 of 2: no")


# -- signals ---------------------------------------------------------------------------------------


def test_sigterm_lets_every_process_save_and_ends_with_75(tmp_path):
    parent = begin(tmp_path)
    pids = waiting(tmp_path)
    parent.terminate()
    status, _, errors = end(parent)
    assert status == 75
    assert errors[0] in [f"polarctl: stopped by SIGTERM after step {step}" for step in (5, 6)]
    assert errors[1:] == ["hint: go on"]
    assert all_gone(pids)


def test_sigterm_to_one_process_stops_all_with_75(tmp_path):
    parent = begin(tmp_path)
    pids = waiting(tmp_path)
    os.kill(pids[1], signal.SIGTERM)
    assert end(parent)[::2] == (75, ["polarctl: stopped by SIGTERM after step 6", "hint: go on"])
    assert all_gone(pids)


def test_a_second_sigterm_kills(tmp_path):
    parent = begin(tmp_path, "0=deaf")
    pids = waiting(tmp_path)
    parent.terminate()
    all_gone(pids[1:])
    parent.terminate()
    assert end(parent)[0] == 75
    assert all_gone(pids)


def test_ctrl_c_ends_with_130_and_leaves_nothing(tmp_path):
    parent = begin(tmp_path, "1=deaf")  # does not end in its time
    pids = waiting(tmp_path)
    parent.send_signal(signal.SIGINT)
    status, _, errors = end(parent)
    assert status == 130
    assert errors[0].startswith("stopping after this step")
    assert errors[1:] == [
        "polarctl: stopped by Ctrl-C",
        "hint: the same command goes on from here",
    ]
    assert all_gone(pids)


def test_processes_die_with_a_parent_that_is_killed(tmp_path):
    parent = begin(tmp_path, "0=deaf")
    pids = waiting(tmp_path)
    parent.kill()
    parent.communicate(timeout=10)
    assert all_gone(pids)


# -- what torch makes of it ------------------------------------------------------------------------


def test_the_processes_meet_and_reduce(tmp_path):
    status, _, errors = end(begin(tmp_path, "0=reduce", "1=reduce", OMP_NUM_THREADS="1"))
    assert status == 0, errors
    assert [(tmp_path / f"total.{rank}").read_text() for rank in (0, 1)] == ["3.0"] * 2  # 1 + 2


def test_losing_a_partner_is_not_the_error_that_is_said(tmp_path):
    tasks = ("0=lose-partner", "1=lose-partner")
    status, _, errors = end(begin(tmp_path, *tasks, OMP_NUM_THREADS="1"))
    assert status == 1
    assert "polarctl: process 1 of 2 was killed by SIGKILL" in errors
    assert not any("Traceback" in line for line in errors)


def test_two_machines_are_one_run(tmp_path):
    with launcher._meeting_place(None) as (address, port):
        nodes = [
            begin(
                tmp_path,
                *("0=say", "1=say"),
                gpus=1,
                TEST_NODES="2",
                MASTER_ADDR=address,
                MASTER_PORT=port,
                **{variable: str(number)},
            )
            for number, variable in enumerate(("NODE_RANK", "SLURM_NODEID"))
        ]
        ends = [node.communicate(timeout=30) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert [out for out, _ in ends] == ["record of 0\n", ""]
    assert (
        f"torchrun --nnodes 2 --node-rank 1 --master-addr {address} --master-port {port} "
        f"--nproc-per-node 1 -m process_worker"
    ) in ends[1][1]
    second = json.loads((tmp_path / "place.1").read_text())
    assert (second["LOCAL_RANK"], second["WORLD_SIZE"], second["LOCAL_WORLD_SIZE"]) == (
        "0",
        "2",
        "1",
    )


# -- what cannot be started ------------------------------------------------------------------------


def launch(**options):
    given = dict(gpus=2, nnodes=1, device="cpu", inputs=("t.jsonl",), arguments=["pretrain"])
    return launcher.launch("pretrain", **{**given, **options})


def test_one_process_does_the_work_itself(monkeypatch):
    assert launch(gpus=1) is False
    monkeypatch.setenv("RANK", "0")
    assert launch(gpus=2) is False
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch(gpus=2) is False
    with pytest.raises(UsageError, match="the launcher has started 2 processes"):
        launch(gpus=3)


def test_a_pipe_cannot_be_shared(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("-", str(tmp_path / "pipe")):
        with pytest.raises(UsageError, match="several processes cannot read one pipe"):
            launch(inputs=("t.jsonl", path))


def test_the_command_line_refuses_a_pipe(tmp_path, capsys):
    arguments = ["pretrain", "-m", "x", "-o", str(tmp_path / "o"), "--gpus", "2"]
    assert run(arguments) == 2
    assert capsys.readouterr().err == (
        "polarctl: several processes cannot read one pipe\nhint: write the triples to a file\n"
    )


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(MissingError, match=r"`--gpus 99`: \d+ GPUs found") as caught:
        launch(gpus=99, device="auto")
    assert caught.value.hint == "--device cpu runs the processes on the CPU"


def test_one_gpu_by_name_is_not_for_several_processes():
    with pytest.raises(UsageError, match="`--device cuda:1` is one GPU"):
        launch(device="cuda:1")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "NODE_RANK is not set"),
        ({"NODE_RANK": "1"}, "MASTER_ADDR is not set"),
        ({"NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK is `2`"),
        ({"NODE_RANK": "-1", "MASTER_ADDR": "a"}, "NODE_RANK is `-1`"),
    ],
)
def test_a_machine_without_its_number_is_refused(variables, message, monkeypatch):
    for name in ("NODE_RANK", "SLURM_NODEID", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launch(nnodes=2)
