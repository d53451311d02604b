"""Workers on a Ray cluster: order, lost processes and machines, errors, a cluster that is gone."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from faults import is_gone
from parallel.clusters import add_machine, two_machines
from parallel.ray_work import Told

from polarctl import cli
from polarctl.errors import MissingError, PolarctlError, RecordError, UsageError
from polarctl.parallel import ray_pool
from polarctl.parallel.ray_pool import Placement
from polarctl.stages import sample, score

PATIENCE_S = 120
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    with two_machines() as made:
        yield made


def deal(cluster, items, folder, workers=2):
    placement = Placement(cluster.address, workers, {"CPU": 1})
    return ray_pool.in_order(
        iter(items), Told(folder), placement=placement, task="computes", hint="again"
    )


def wait_for(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def seen(folder):
    path = folder / "seen"
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()]


def squares(count):
    return [(number, number * number) for number in range(count)]


# -- options --------------------------------------------------------------------------------------


class Asked:
    """Options as a stage has them."""

    def __init__(self, **values):
        self.ray, self.ray_resource, self.gpus, self.device = "auto", (), 1, "auto"
        self.given = dict.fromkeys(values, "command line")
        vars(self).update(values)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ray": None}, None),
        ({}, Placement("auto", None, {"GPU": 1})),
        ({"device": "cpu"}, Placement("auto", None, {"CPU": 1})),
        ({"gpus": 1}, Placement("auto", 1, {"GPU": 1})),
        ({"gpus": 6, "ray_resource": ("CPU=4",)}, Placement("auto", 6, {"CPU": 4, "GPU": 1})),
        ({"ray_resource": ("GPU=0.5", "a:b=1")}, Placement("auto", None, {"GPU": 0.5, "a:b": 1})),
    ],
)
def test_options_become_workers_and_what_each_is_given(options, expected):
    assert ray_pool.placement_of(Asked(**options)) == expected


@pytest.mark.parametrize("text", ["GPU", "GPU=", "=1", "GPU=-1", "GPU=nan", "GPU=inf", "GPU=x"])
def test_a_resource_that_is_no_amount_is_refused(text):
    with pytest.raises(UsageError, match="KEY=AMOUNT"):
        ray_pool.placement_of(Asked(ray_resource=(text,)))


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", "http://head:8265", ""])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(UsageError, match="not auto, local or HOST:PORT"):
        ray_pool.placement_of(Asked(ray=address))


def test_one_device_for_all_workers_is_refused():
    with pytest.raises(UsageError, match="cuda:1"):
        ray_pool.placement_of(Asked(device="cuda:1"))


def test_a_cluster_holds_as_many_workers_as_its_scarcest_resource_allows():
    have = {"CPU": 16.0, "GPU": 8.0}
    assert Placement("auto", None, {"GPU": 2}).fitting(have) == 4
    assert Placement("auto", None, {"GPU": 1, "CPU": 3}).fitting(have) == 5  # 16 / 3
    assert Placement("auto", None, {"GPU": 0.5, "CPU": 0}).fitting(have) == 16
    assert Placement("auto", None, {"GPU": 1}).fitting({"CPU": 16.0}) == 0


def test_an_address_where_nobody_answers_is_missing_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(MissingError, match=f"`{address}` does not answer"):
            list(ray_pool.in_order(iter([1]), Told(tmp_path), placement=Placement(address)))
        assert time.monotonic() - start < 30


# -- a cluster of two machines --------------------------------------------------------------------


@slow
def test_results_come_in_order_whatever_becomes_of_a_worker(cluster, tmp_path, capfd):
    told = {0: "meet", 1: "meet", 9: "die-once", 12: "die-once"}

    def items():
        for number in range(20):
            yield number, told.get(number, "say")
        yield 20, "large", 3 << 20  # through the object store
        raise RecordError("bad row", where="in.jsonl:21")

    found = deal(cluster, items(), tmp_path, workers=3)  # there is room for two
    assert [next(found) for _ in range(20)] == squares(20)
    assert next(found) == (20, "x" * (3 << 20))
    with pytest.raises(RecordError, match="in.jsonl:21: bad row"):  # once all before it is there
        next(found)
    assert sorted({number for number, _ in seen(tmp_path)}) == list(range(21))
    assert 3 <= len({pid for _, pid in seen(tmp_path)}) <= 4  # two, and those that took over
    closed = (tmp_path / "closed").read_text().splitlines()
    assert 1 <= len(closed) <= 2 and all(int(line.split()[1]) > 0 for line in closed)
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line.replace("\x1b[33m", "").replace("\x1b[0m", "") for line in err.splitlines()]
    lost = "warning: a worker is lost (ActorUnavailableError); another one takes its records"
    assert sorted(lines) == [
        "dtype: float32 (as told)",  # each process says it with every item
        "ray workers: 3 (CPU 1 each; machines: 2, CPU 2 in all)",
        lost,
        lost,
    ]


@slow
def test_a_lost_machine_costs_nothing(cluster, tmp_path):
    lost = add_machine(cluster)
    taken = []

    def items():
        for number in range(12):
            taken.append(number)
            yield number, "wait" if number in (1, 2, 3) else "square"

    found = deal(cluster, items(), tmp_path, workers=3)
    assert next(found) == (0, 0)
    wait_for(lambda: {1, 2, 3} <= {number for number, _ in seen(tmp_path)})
    assert len({pid for number, pid in seen(tmp_path) if number in (1, 2, 3)}) == 3
    assert len(taken) <= 6  # 3 workers, twice as many items
    cluster.remove_node(lost, allow_graceful=False)
    wait_for(lambda: any(is_gone(pid) for _, pid in seen(tmp_path)))
    (tmp_path / "go").touch()  # two workers are left, and no room for a third
    for number in range(1, 12):
        assert next(found) == (number, number * number)
        assert len(taken) <= number + 6
    assert list(found) == []
    assert len(seen(tmp_path)) == 13  # one item was done again


@slow
def test_an_item_that_kills_every_worker_ends_the_run(cluster, tmp_path):
    found = deal(cluster, [(0, "square"), (1, "die"), (2, "square")], tmp_path)
    assert next(found) == (0, 0)
    with pytest.raises(PolarctlError, match="4 processes that computes were lost") as caught:
        next(found)
    assert caught.value.exit_status == 1 and caught.value.hint == "again"


@slow
def test_an_error_of_the_work_comes_after_what_was_before_it(cluster, tmp_path):
    found = deal(cluster, [(0, "square"), (1, "square"), (2, "bad"), (3, "square")], tmp_path)
    assert [next(found), next(found)] == squares(2)
    with pytest.raises(RecordError, match="^in.jsonl:7: missing field `x`$") as caught:
        next(found)
    assert caught.value.hint == "look"
    assert "ray_work.py" in str(caught.value.__cause__)  # where, for a report of a fault


@slow
def test_a_cluster_without_room_is_told(cluster, tmp_path):
    placement = Placement(cluster.address, None, {"GPU": 1})
    with pytest.raises(MissingError, match="has no room for a worker: GPU 1"):
        list(ray_pool.in_order(iter([1]), Told(tmp_path), placement=placement))


# -- the stages -----------------------------------------------------------------------------------

# With small windows: there is much to be killed in.
PROGRAM = """import sys
from polarctl import cli
from polarctl.stages import sample, score
sample.WINDOW_ROWS, score.WINDOW_ROWS = 4, 16
sys.exit(cli.run(sys.argv[1:]))"""


@pytest.fixture
def stage(monkeypatch, capfd):
    """Runs a command with the windows of PROGRAM; gives status and lines of stderr."""
    monkeypatch.setattr(sample, "WINDOW_ROWS", 4)
    monkeypatch.setattr(score, "WINDOW_ROWS", 16)

    def run(arguments, out, *more):
        capfd.readouterr()
        status = cli.run([str(part) for part in (*arguments, "-o", out, *more)])
        said = capfd.readouterr()
        assert said.out == ""
        return status, said.err.splitlines()

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def size_of(path):
    return path.stat().st_size if path.exists() else 0


@slow
def test_a_killed_score_goes_on_to_the_bytes_of_one_process(cluster, tiny_rm, tmp_path, stage):
    rows = ({"prompt": f"q{n}", "reference": "yes", "output": f"no {n}"} for n in range(1000))
    source = write(tmp_path / "in.jsonl", rows)
    one, out = tmp_path / "one.jsonl", tmp_path / "out.jsonl"
    command = ["score", source, "-m", tiny_rm, "--device", "cpu"]
    assert stage(command, one)[0] == 0
    there = ["--ray", cluster.address]
    arguments = [sys.executable, "-c", PROGRAM, *map(str, [*command, "-o", out, *there])]
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: size_of(out) or child.poll() is not None)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert one.read_bytes().startswith(out.read_bytes()) and out.stat().st_size < one.stat().st_size
    status, said = stage(command, out, *there)
    assert status == 0 and out.read_bytes() == one.read_bytes()
    # Nothing of Ray's own, and what a worker chose.
    begins = [line.partition(": ")[0] for line in said if not line.startswith("score: ")]
    assert begins == [str(out), "ray workers", "dtype", "rewards", "speed"]


@slow
def test_sample_on_a_cluster_that_loses_a_machine_writes_the_bytes_of_one_process(
    cluster, tiny_lm, tiny_chat_lm, tmp_path, stage
):
    source = write(tmp_path / "in.jsonl", ({"prompt": f"q{n}"} for n in range(120)))
    models = {"a": tiny_lm, "b": tiny_chat_lm}
    pool = write(
        tmp_path / "pool.jsonl", ({"policy": k, "model": str(path)} for k, path in models.items())
    )
    one, out = tmp_path / "one.jsonl", tmp_path / "out.jsonl"
    command = ["sample", source, "--pool", pool, "--device", "cpu", "--max-new-tokens", "12"]
    assert stage(command, one)[0] == 0
    lost = add_machine(cluster)
    at = []

    def lose():
        wait_for(lambda: size_of(out))
        at.append(size_of(out))
        cluster.remove_node(lost, allow_graceful=False)

    watch = threading.Thread(target=lose)
    watch.start()
    status, _ = stage(command, out, "--ray", cluster.address, "--gpus", "3")
    watch.join()
    assert status == 0 and out.read_bytes() == one.read_bytes()
    assert at[0] < len(one.read_bytes()) / 2


@slow
def test_a_model_that_cannot_be_loaded_is_told_as_without_a_cluster(
    cluster, tiny_rm, tmp_path, stage
):
    model = shutil.copytree(tiny_rm, tmp_path / "rm")
    (model / "model.safetensors").write_bytes(b"no weights")
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "reference": "a", "output": "b"}])
    command = ["score", source, "-m", model, "--device", "cpu"]
    status, said = stage(command, tmp_path / "one.jsonl")
    assert status == 4
    there = stage(command, tmp_path / "two.jsonl", "--ray", cluster.address, "--gpus", "1")
    assert there[0] == 4 and there[1][0].startswith("ray workers: 1 ")
    told = [line for line in said if line.startswith(("polarctl: ", "hint: "))]
    assert told and there[1][-len(told) :] == told
    assert not (tmp_path / "two.jsonl").exists()


# The last one: it ends the cluster of this file.
@slow
def test_a_cluster_that_is_lost_ends_the_run(cluster, tmp_path):
    found = deal(cluster, [(0, "square"), (1, "wait")], tmp_path, workers=1)
    assert next(found) == (0, 0)
    for processes in cluster.head_node.all_processes.values():
        for entry in processes:
            entry.process.kill()
    start = time.monotonic()
    with pytest.raises(MissingError, match="is lost") as caught:
        next(found)
    assert caught.value.hint == "again"
    assert time.monotonic() - start < 60
