"""Weights are read into the page cache; what is there is asked of the kernel (mincore)."""

import ctypes
import mmap
import os
import re

import orjson
import pytest

from polarctl import cli
from polarctl.policies import read_ahead
from polarctl.policies.pool import Policy
from polarctl.policies.read_ahead import ReadAhead, free_memory, weights_of

SIZE = 4 << 20


@pytest.fixture
def model(tmp_path):
    """A folder with two files of weights and a file that is none, none of them in memory."""
    for name in ("model-1-of-2.safetensors", "model-2-of-2.safetensors", "optimizer.bin"):
        with open(tmp_path / name, "wb") as stream:
            stream.write(os.urandom(SIZE))
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return tmp_path


def in_memory(path):
    """Share of a file's pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE,
                           flags=mmap.MAP_PRIVATE)  # fmt: skip
    view = ctypes.c_char.from_buffer(mapped)
    pages = (ctypes.c_ubyte * (-(-SIZE // mmap.PAGESIZE)))()
    status = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(SIZE), pages)
    assert status == 0, os.strerror(ctypes.get_errno())
    del view
    mapped.close()
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.parametrize(("free", "read"), [(4 * SIZE + 1, 1), (4 * SIZE, 0), (None, 0)])
def test_weights_and_nothing_else_are_read_where_memory_has_twice_the_room(
    model, free, read, capsys
):
    names = [path.name for path in weights_of(Policy(name="next", model=str(model)))]
    assert names == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    before = {path.name: in_memory(path) for path in model.iterdir()}
    assert set(before.values()) == {0}, "the kernel kept what it was told to drop"
    with ReadAhead(least=SIZE, free=lambda: free) as ahead:
        ahead.begin(Policy(name="next", model=str(model)))
        ahead.wait()
    found = {path.name: in_memory(path) for path in model.iterdir()}
    assert found == dict.fromkeys(names, read) | {"optimizer.bin": 0}
    said = capsys.readouterr().err
    if free is None:
        assert said == ""
    else:
        assert said.startswith(
            "weights of policy `next`, 0.0 GiB: " + ("read", "not read")[not read]
        )


def test_small_weights_and_those_of_a_server_are_left_alone(model, capsys):
    with ReadAhead(free=lambda: 1 << 40) as ahead:
        ahead.begin(Policy(name="small", model=str(model)))
        ahead.begin(Policy(name="there", model="name", backend="openai", url="http://x"))
        ahead.begin(Policy(name="hub", model="nobody/nothing-of-this-name"))
        ahead.wait()
    assert {in_memory(path) for path in model.iterdir()} == {0} and capsys.readouterr().err == ""


def test_sample_reads_each_next_policy_ahead(tmp_path, tiny_lm, monkeypatch, capsys):
    monkeypatch.setattr(read_ahead, "LEAST_BYTES", 1)
    rows = [{"policy": name, "model": str(tiny_lm)} for name in ("first", "second", "third")]
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    (tmp_path / "in.jsonl").write_bytes(orjson.dumps({"prompt": "The sea was"}))
    command = ["sample", str(tmp_path / "in.jsonl"), "--pool", str(tmp_path / "pool.jsonl")]
    assert cli.run([*command, "-o", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().err
    assert re.findall(r"weights of policy `(\w+)`, 0\.0 GiB: read ahead", said) == [
        "second",
        "third",
    ]


def test_free_memory_is_what_the_system_says():
    with open("/proc/meminfo") as stream:
        total = next(int(line.split()[1]) << 10 for line in stream if line.startswith("MemTotal"))
    assert 0 < free_memory() < total
