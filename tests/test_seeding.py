"""Seeds depend on what they are for, on nothing else."""

import hashlib
import os
import subprocess
import sys

from polarctl.seeding import derive, rng


def test_a_seed_is_the_hash_of_what_it_is_for():
    # blake2b over the text of the tuple, 8 bytes, the top bit dropped: anyone can recompute it.
    digest = hashlib.blake2b(b"(7, 'geo-1', 2)", digest_size=8).digest()
    assert derive(7, "geo-1", 2) == int.from_bytes(digest, "big") // 2


def test_seeds_are_pinned():
    """A change of these numbers changes everybody's samples: it needs a new major version."""
    assert derive(0) == 7210762507766007076
    assert derive(0, "geo-1", 0) == 2322931763212314192
    assert rng(0, "geo-1", 0).random() == 0.06903211464546744


def test_every_part_and_their_order_matter():
    seeds = {
        derive(0, "a", "b"),
        derive(0, "b", "a"),
        derive(1, "a", "b"),
        derive(0, "ab"),
        derive(0, "a", "b", 0),
        derive(0, "a', 'b"),
        derive(0, "1"),
        derive(0, 1),
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_in_every_process():
    program = "from polarctl.seeding import derive; print(derive(3, 'é', 5))"
    seen = set()
    for hash_seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "LANG": "C", "TZ": "Asia/Tokyo"}
        seen.add(subprocess.check_output([sys.executable, "-c", program], env=environment))
    assert seen == {f"{derive(3, 'é', 5)}\n".encode()}


def test_generators_of_one_name_agree_and_of_two_differ():
    assert [rng(1, "x").random() for _ in range(2)] == [rng(1, "x").random()] * 2
    assert rng(1, "x").random() != rng(1, "y").random()
