"""Workers on a Ray cluster: order, lost processes and machines, errors, a cluster that is gone.

The clusters are real: `ray.cluster_utils` starts every process of each machine here.
"""

import socket
import time
from pathlib import Path

import pytest
from parallel.ray_work import Told

from polarctl.errors import MissingError, PolarctlError, RecordError, UsageError
from polarctl.parallel import ray_pool
from polarctl.parallel.ray_pool import Placement

PATIENCE_S = 120
slow = pytest.mark.slow


def new_cluster():
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    return Cluster(initialize_head=True, head_node_args=machine)


def add_machine(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


@pytest.fixture(scope="module")
def cluster():
    """Two machines with a CPU each. What the tests import is there, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        made = new_cluster()
        add_machine(made)
        yield made
        made.shutdown()


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
def test_results_come_in_order_from_all_machines(cluster, tmp_path, capfd):
    items = [(number, "say") for number in range(20)]
    items[0], items[1] = (0, "meet"), (1, "meet")
    items[5] = (5, "large", 3 << 20)  # through the object store
    found = list(deal(cluster, items, tmp_path))
    assert found[5] == (5, "x" * (3 << 20))
    assert found[:5] + found[6:] == [row for row in squares(20) if row[0] != 5]
    processes = {pid for _, pid in seen(tmp_path)}
    assert len(processes) == 2
    closed = [tuple(map(int, x.split())) for x in (tmp_path / "closed").read_text().splitlines()]
    assert {pid for pid, _ in closed} == processes
    assert sum(calls for _, calls in closed) == 20
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "ray workers: 2 (CPU 1 each; machines: 2, CPU 2 in all)",
        "dtype: float32 (as told)",  # each process says it with every item
    ]


@slow
def test_only_so_many_items_are_under_way(cluster, tmp_path):
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number, "square"

    found = deal(cluster, items(), tmp_path)
    for number in range(10):
        assert next(found) == (number, number * number)
        assert len(taken) <= number + 1 + 4  # 2 workers, twice as many items
    found.close()
    assert len(seen(tmp_path)) <= 14


@slow
def test_a_killed_worker_is_replaced_and_its_item_done_again(cluster, tmp_path, capfd):
    items = [(number, "die-once" if number in (3, 9) else "square") for number in range(14)]
    assert list(deal(cluster, items, tmp_path)) == squares(14)
    assert len({pid for _, pid in seen(tmp_path)}) == 4
    err = capfd.readouterr().err
    assert err.count("warning: a worker is lost") == 2
    assert len(err.splitlines()) == 3


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
    with pytest.raises(ZeroDivisionError):
        list(deal(cluster, [(0, "fault")], tmp_path))


@slow
def test_an_error_of_the_input_comes_after_what_was_before_it(cluster, tmp_path):
    def items():
        yield 0, "square"
        yield 1, "square"
        raise RecordError("bad row", where="in.jsonl:3")

    found = deal(cluster, items(), tmp_path)
    assert [next(found), next(found)] == squares(2)
    with pytest.raises(RecordError, match="bad row"):
        next(found)


@slow
def test_a_lost_machine_costs_nothing_and_a_new_one_is_used(cluster, tmp_path):
    lost = add_machine(cluster)
    items = [(0, "square"), *((number, "wait") for number in (1, 2, 3)), *[(4, "square")]]
    found = deal(cluster, items, tmp_path, workers=3)
    assert next(found) == (0, 0)
    wait_for(lambda: {1, 2, 3} <= {number for number, _ in seen(tmp_path)})
    before = {pid for _, pid in seen(tmp_path)}
    cluster.remove_node(lost, allow_graceful=False)
    (tmp_path / "go").touch()  # two workers are left, and no room for a third
    assert list(found) == squares(5)[1:]
    assert len(before) == 3


@slow
def test_a_worker_that_finds_no_place_takes_no_item(cluster, tmp_path):
    items = [(number, "square") for number in range(12)]
    assert list(deal(cluster, items, tmp_path, workers=5)) == squares(12)
    assert len({pid for _, pid in seen(tmp_path)}) == 2


@slow
def test_a_cluster_without_room_is_told(cluster, tmp_path):
    placement = Placement(cluster.address, None, {"GPU": 1})
    with pytest.raises(MissingError, match="has no room for a worker: GPU 1"):
        list(ray_pool.in_order(iter([1]), Told(tmp_path), placement=placement))


@slow
def test_a_cluster_that_is_lost_ends_the_run(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        doomed = new_cluster()
    found = deal(doomed, [(0, "square"), (1, "wait")], tmp_path, workers=1)
    assert next(found) == (0, 0)
    for processes in doomed.head_node.all_processes.values():
        for entry in processes:
            entry.process.kill()
    start = time.monotonic()
    with pytest.raises(MissingError, match="is lost") as caught:
        next(found)
    assert caught.value.hint == "again"
    assert time.monotonic() - start < 60
