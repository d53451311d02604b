"""Trajectories by prompt: the same groups as in memory, in bounded memory, and a full disk."""

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from polarctl.errors import RecordError
from polarctl.policies import by_prompt
from polarctl.records import Record

WORD = "The sea was calm that day. "


def record(prompt, policy, sample=None, output="text", place="t.jsonl:1", **fields):
    found = {"prompt": prompt, "policy": policy, "output": output, **fields}
    return Record(found if sample is None else {**found, "sample": sample}, place)


def grouped(records):
    groups = by_prompt.Groups()
    for one in records:
        groups.add(one)
    groups.finish()
    return groups


def test_groups_come_in_the_order_of_their_first_rows_and_keep_their_samples(monkeypatch):
    monkeypatch.setattr(by_prompt, "_ROWS", 3)  # rows are written down in several parts
    groups = grouped(
        [
            record("z", "p", 1, "z1"),
            record("a", "p", 0, "a0", category="maths"),
            record("z", "p", 0, "z0"),
            record("a", "q", 5, "a5"),
            record("z", "p", 0, "w0", wrapper="pretrain"),
            record([{"role": "user", "content": "z"}], "q", output="m0"),
            record("a", "p", 1, "a1"),
        ]
    )
    found = [(g.prompt, g.wrapper, g.category, g.outputs) for g in groups]
    assert found == [
        ("z", "sft", None, {"p": {1: "z1", 0: "z0"}}),
        ("a", "sft", "maths", {"p": {0: "a0", 1: "a1"}, "q": {5: "a5"}}),
        ("z", "pretrain", None, {"p": {0: "w0"}}),
        ([{"role": "user", "content": "z"}], "sft", None, {"q": {0: "m0"}}),
    ]
    assert found == [(g.prompt, g.wrapper, g.category, g.outputs) for g in groups]  # again
    assert len(groups) == 4
    assert dict(groups.firsts) == {"p": 2}
    assert dict(groups.seconds) == {"p": 3, "q": 2}


def test_samples_without_a_number_are_counted():
    groups = grouped([record("a", "p", output=f"{i}") for i in range(3)])
    assert [g.outputs for g in groups] == [{"p": {0: "0", 1: "1", 2: "2"}}]


def test_a_sample_number_that_the_database_cannot_hold_is_refused():
    groups = by_prompt.Groups()
    groups.add(record("a", "p", 2**63 - 1, "kept"))
    with pytest.raises(RecordError, match="field `sample`: more than 63 bits"):
        groups.add(record("a", "p", 2**63, "refused"))
    groups.finish()
    assert [g.outputs for g in groups] == [{"p": {2**63 - 1: "kept"}}]


def test_what_contradicts_an_earlier_row_is_refused_in_the_order_of_the_rows():
    rows = [
        record("a", "p", 0, "first", id="x", place="t:1"),
        record("b", "q", 0, "another prompt", id="x", place="t:2"),
        record("c", "p", 0, "alone", id="y", place="t:3"),
        record("a", "p", 0, "again", id="x", place="t:4"),
    ]
    groups = by_prompt.Groups()
    for row in rows:
        groups.add(row)
    bad = []
    groups.finish(lambda *given: bad.append(given))
    assert [(place, reason) for place, reason, _ in bad] == [
        ("t:2", "id `x` already names another prompt"),
        ("t:4", "sample 0 of policy `p` for prompt `x` is there already"),
    ]
    assert [orjson.loads(raw) for _, _, raw in bad] == [dict(rows[1]), dict(rows[3])]
    assert [g.outputs for g in groups] == [{"p": {0: "first"}}, {"p": {0: "alone"}}]
    assert groups.policies == {"p", "q"}
    assert dict(groups.seconds) == {"p": 2}  # what was refused takes no part
    again = by_prompt.Groups()
    for row in rows:
        again.add(row)
    with pytest.raises(RecordError, match="x` already names another prompt") as caught:
        again.finish()
    assert caught.value.where == "t:2"


def write(path, prompts, output_bytes, policies=8):
    text = WORD * (output_bytes // len(WORD))
    with open(path, "wb") as stream:
        for policy in range(policies):
            for prompt in random.Random(policy).sample(range(prompts), prompts):
                for sample in range(2):
                    fields = {
                        "prompt": f"Question {prompt}",
                        "reference": "Yes.",
                        "policy": f"policy-{policy}",
                        "sample": sample,
                        "output": f"{policy} {prompt} {sample} {text}",
                        "check": sample,
                    }
                    stream.write(orjson.dumps(fields) + b"\n")


def pair(path, out, *more, before="pass", **options):
    code = f"import sys; from polarctl import cli; {before}; sys.exit(cli.run(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "pair", str(path), "-o", str(out), *more],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--from-rollouts",)])
def test_memory_does_not_grow_with_the_trajectories(tmp_path, more):
    peaks = []
    for prompts in (4_000, 10_000):  # 128 MB and 320 MB of text
        write(tmp_path / "t.jsonl", prompts, 2_000)
        process = pair(tmp_path / "t.jsonl", tmp_path / f"{prompts}.jsonl", *more)
        _, status, used = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, process.stderr.read()
        process.returncode = 0
        process.stderr.close()
        with open(tmp_path / f"{prompts}.jsonl", "rb") as stream:
            assert sum(1 for _ in stream) == prompts
        peaks.append(used.ru_maxrss / 1024)  # MiB on Linux
    assert peaks[1] < peaks[0] + 48, peaks


def test_a_full_disk_is_one_line(tmp_path):
    write(tmp_path / "t.jsonl", 100, 2_000)
    process = pair(
        tmp_path / "t.jsonl",
        tmp_path / "out.jsonl",
        before="from polarctl.policies import by_prompt; by_prompt._CACHE_MIB = 1 / 64",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "polarctl: trajectories cannot be sorted on disk: " in errors
    assert "TMPDIR" in errors and "Traceback" not in errors
    assert not (tmp_path / "out.jsonl").exists()
