"""`pair --ray`: the bytes of one machine, whatever the machines, and its messages."""

import gzip
import json
from pathlib import Path

import orjson
import pytest
from parallel.clusters import add_machine, two_machines
from parallel.ray_work import broken

from polarctl import cli
from polarctl.errors import PolarctlError
from polarctl.parallel.ray_data import Grouped
from polarctl.stages import pair as stage

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    with two_machines() as made:
        yield made


def trajectories(prompts, policies):
    """Two samples of each policy for each prompt, and fields that `pair` does not know."""
    for number in range(prompts):
        prompt = f"prompt {number}"
        if number % 5 == 0:
            prompt = [{"role": "user", "content": prompt}]
        for policy in policies:
            for index in range(2):
                yield {
                    "zeta": {"b": 1, "a": [number]},
                    "prompt": prompt,
                    "output": f"{policy} says {index * number % 3} of {number}",
                    "policy": policy,
                    **({"sample": index} if number % 2 else {}),
                    **({"wrapper": "pretrain"} if number % 7 == 0 else {}),
                    **({"category": f"c{number % 3}"} if number % 3 else {}),
                }


def write(path, rows):
    data = b"".join(row if isinstance(row, bytes) else orjson.dumps(row) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path.name


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Three files, policy after policy as `sample` writes; named from here, not from the root."""
    monkeypatch.chdir(tmp_path)
    rows = {name: list(trajectories(60, [name])) for name in ("qwen-7b", "qwen-72b", "yi", "held")}
    write(tmp_path / "one.jsonl", [*rows["qwen-7b"], b"\n", *rows["qwen-72b"][:70]])
    write(tmp_path / "two.jsonl.gz", [*rows["qwen-72b"][70:], *rows["yi"]])
    write(tmp_path / "three.jsonl", rows["held"][::-1])
    return ["one.jsonl", "two.jsonl.gz", "three.jsonl"]


@pytest.fixture
def run(capfd):
    """Runs `pair`; gives status and lines of stderr without what only Ray says."""

    def run(*arguments):
        capfd.readouterr()
        status = cli.run(["pair", *arguments])
        said = capfd.readouterr()
        assert said.out == ""
        return status, [x for x in said.err.splitlines() if not x.startswith("ray data: ")]

    return run


def counts_of(path):
    return json.loads((path.parent / f"{path.name}.manifest.json").read_bytes())["counts"]


@slow
@pytest.mark.parametrize(
    "options",
    [
        ["--triples-per-prompt", "3", "--negatives", "2", "--hard-by", "names", "--limit", "401"],
        ["--exclude-policies", "held", "--split", "train", "--shard", "1/2", "--seed", "3"],
    ],
)
def test_a_cluster_writes_the_bytes_of_one_machine(cluster, inputs, options, tmp_path, run):
    one, two = tmp_path / "out-1.jsonl", tmp_path / "out-2.jsonl"
    status, said = run(*inputs, *options, "-o", one.name)
    assert status == 0 and one.stat().st_size
    assert run(*inputs, *options, "-o", two.name, "--ray", cluster.address) == (0, said)
    assert two.read_bytes() == one.read_bytes()
    assert counts_of(two) == counts_of(one)


@slow
def test_bad_rows_are_set_aside_and_told_as_on_one_machine(cluster, inputs, tmp_path, run):
    bad = [
        {"id": "x", "prompt": "a", "output": "1", "policy": "yi", "sample": 0},
        b'{"prompt": "a", "output": "2"}\n',
        {"id": "x", "prompt": "b", "output": "3", "policy": "yi", "sample": 1},
        b"no JSON\n",
        {"id": "x", "prompt": "a", "output": "4", "policy": "yi", "sample": 0},
    ]
    write(tmp_path / "zero.jsonl", bad)
    there = ["--ray", cluster.address]
    files = ["zero.jsonl", *inputs]
    # The second row, though that the third contradicts the first is found on another machine.
    expected = run(*files, "-o", "out.jsonl")
    assert expected[0] == 3 and "zero.jsonl:2: missing field `policy`" in expected[1][0]
    assert run(*files, "-o", "out.jsonl", *there) == expected
    write(tmp_path / "zero.jsonl", [row for row in bad if isinstance(row, dict)])
    expected = run(*files, "-o", "out.jsonl")
    assert expected[0] == 3 and "zero.jsonl:2: id `x` already names" in expected[1][0]
    assert run(*files, "-o", "out.jsonl", *there) == expected
    assert not (tmp_path / "out.jsonl").exists()
    write(tmp_path / "zero.jsonl", bad)
    for name, more in (("one", []), ("two", there)):
        rejects = f"rejects-{name}.jsonl"
        assert run(*files, "-o", f"out-{name}.jsonl", "--rejects", rejects, *more)[0] == 0
    assert len((tmp_path / "rejects-one.jsonl").read_bytes().splitlines()) == 4
    for kind in ("out", "rejects"):
        written = [(tmp_path / f"{kind}-{name}.jsonl").read_bytes() for name in ("one", "two")]
        assert written[0] == written[1]


@slow
def test_a_run_that_one_machine_began_goes_on_there(cluster, inputs, tmp_path, run, monkeypatch):
    monkeypatch.setattr(stage, "WINDOW_PROMPTS", 7)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert run(*inputs, "-o", whole.name)[0] == 0

    class Power(Exception):
        pass

    def failing(groups, pairing):
        if pairing.counts["prompts"] == 30:
            raise Power
        return pairing.triples(groups[0])

    with monkeypatch.context() as patch:
        patch.setattr(stage, "pair", failing)
        with pytest.raises(Power):
            run(*inputs, "-o", torn.name)
    assert 0 < torn.stat().st_size < whole.stat().st_size
    status, said = run(*inputs, "-o", torn.name, "--ray", cluster.address)
    assert status == 0 and "going on after" in said[0]
    assert torn.read_bytes() == whole.read_bytes()
    assert counts_of(torn) == counts_of(whole)


@slow
def test_a_file_that_the_machines_do_not_have_is_told(cluster, inputs, tmp_path, run, monkeypatch):
    from polarctl.policies import on_ray

    elsewhere = tmp_path / "elsewhere"  # what a folder that is not shared is on another machine
    elsewhere.mkdir()
    monkeypatch.setattr(on_ray.os.path, "abspath", lambda path: str(elsewhere / path))
    status, said = run(*inputs, "-o", "out.jsonl", "--ray", cluster.address)
    assert status == 4
    assert "one.jsonl: a machine of the cluster has another file of this name, or none" in said[0]


@slow
def test_a_fault_on_a_machine_is_one_line(cluster):
    with Grouped(cluster.address, [1, 2], 100, broken, list) as grouped:
        with pytest.raises(PolarctlError, match=r"the work on .* failed: .*a fault") as caught:
            list(grouped.notes(b"".join))
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)


@slow
def test_a_machine_with_other_packages_is_refused(cluster, inputs, tmp_path, run):
    """What Ray Data hashes keys with decides where a key goes."""
    package = tmp_path / "more" / "polars-9.9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: polars\nVersion: 9.9.9\n")
    path = f"{package.parent}:{Path(__file__).parent.parent}"
    other = add_machine(cluster, env_vars={"PYTHONPATH": path})
    try:
        status, said = run(*inputs, "-o", "out.jsonl", "--ray", cluster.address)
    finally:
        cluster.remove_node(other)
    assert status == 4 and "differ in polars: 9.9.9, " in said[0]
    assert said[1] == "hint: every machine needs the same packages"


def test_a_broken_file_is_told_within_a_limit(tmp_path, run):
    whole = gzip.compress(b"".join(orjson.dumps(row) + b"\n" for row in trajectories(99, "ab")))
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    command = [str(tmp_path / "torn.jsonl.gz"), "-o", str(tmp_path / "out.jsonl"), "--limit", "390"]
    expected = run(*command)
    assert expected[0] == 3 and "torn.jsonl.gz: cannot read on" in expected[1][0]
    assert run(*command, "--ray", "local") == expected


def test_what_is_read_only_once_is_refused(tmp_path, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    status, said = run("-", "--ray", "local", "-o", str(tmp_path / "out.jsonl"))
    assert status == 2 and "--ray reads files on every machine, and <stdin> is none" in said[0]
    status, said = run("-", "--ray", "head", "-o", str(tmp_path / "out.jsonl"), "--dry-run")
    assert status == 2 and "not auto, local or HOST:PORT" in said[0]
