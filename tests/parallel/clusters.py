"""Ray clusters for tests: real ones, by `ray.cluster_utils`, every process of each machine here."""

from contextlib import contextmanager
from pathlib import Path

import pytest


def new_cluster():
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    return Cluster(initialize_head=True, head_node_args=machine)


def add_machine(cluster, **more):
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20, **more)


@contextmanager
def two_machines():
    """Two machines with a CPU each. What the tests import is there, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        made = new_cluster()
        add_machine(made)
        yield made
        made.shutdown()
