"""`polarctl score` as the user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from polarctl import console
from polarctl.cli import run

ROWS = 1300  # three windows


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    path = tmp_path_factory.mktemp("score") / "candidates.jsonl"
    with open(path, "w") as stream:
        for i in range(ROWS):
            row = {"prompt": f"q{i}", "reference": "a b c", "mine": i}
            if i % 3:
                row["output"] = "a b " * (i % 4)
            else:
                row["candidates"] = [{"name": n, "output": n * (i % 5 + 1)} for n in "ab"]
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(candidates, tiny_rm, tmp_path_factory):
    out = tmp_path_factory.mktemp("score") / "whole.jsonl"
    assert run(["score", str(candidates), "-m", str(tiny_rm), "-o", str(out), "-q"]) == 0
    return out


def program(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "polarctl", *map(str, arguments)],
        stderr=subprocess.PIPE,
        **options,
    )


def test_every_record_comes_back_in_order_with_its_rewards(whole):
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["mine"] for row in rows] == list(range(ROWS))
    for row in rows:
        if "candidates" in row:
            assert len(row["rewards"]) == len(row["candidates"])
        else:
            assert isinstance(row["reward"], float)


def test_a_file_is_counted_so_that_progress_has_an_end(
    candidates, whole, tiny_rm, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0)
    assert run(["score", str(candidates), "-m", str(tiny_rm), "-o", str(tmp_path / "o")]) == 0
    bars = [line for line in capfd.readouterr().err.splitlines() if line.startswith("score: ")]
    assert bars[-1].startswith(f"score: {ROWS:,}/{ROWS:,} records, ")
    assert any(" left" in line for line in bars[:-1])
    assert (tmp_path / "o").read_bytes() == whole.read_bytes()


def test_what_is_cut_is_said_with_the_limit_and_the_remedy(tiny_rm, tmp_path, capfd):
    row = {"prompt": "q", "reference": "a", "output": "the sea was calm " * 50}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    command = ["score", str(tmp_path / "c.jsonl"), "-m", str(tiny_rm)]
    assert run([*command, "-o", str(tmp_path / "new" / "o.jsonl")]) == 0
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "were cut" in line]
    # The tiny model takes 128 tokens, and a quarter of them of a response.
    assert (
        "1 of 1 inputs are longer than the model's template, which takes 128 tokens, 32 of" in said
    )
    assert "`polarctl finetune --max-length`" in said


def test_a_pipe_gives_the_bytes_of_a_file(candidates, whole, tiny_rm):
    with open(candidates, "rb") as stream:
        child = program("score", "-m", tiny_rm, stdin=stream, stdout=subprocess.PIPE)
        out, _ = child.communicate()
    assert child.returncode == 0
    assert out == whole.read_bytes()


def test_shards_give_the_same_rows(candidates, whole, tiny_rm, tmp_path):
    parts = []
    for shard in range(2):
        out = tmp_path / f"{shard}.jsonl"
        command = ["score", str(candidates), "-m", str(tiny_rm), "-o", str(out), "-q"]
        assert run([*command, "--shard", f"{shard}/2"]) == 0
        parts.append(out.read_bytes().splitlines())
    assert sorted(parts[0] + parts[1]) == sorted(whole.read_bytes().splitlines())
    assert parts[0] and parts[1]


def test_a_killed_run_goes_on_to_the_same_bytes(candidates, whole, tiny_rm, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ("score", candidates, "-m", tiny_rm, "-o", out)
    child = program(*command, stdout=subprocess.DEVNULL)
    while child.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert whole.read_bytes().startswith(out.read_bytes())
    assert not (tmp_path / "out.jsonl.manifest.json").exists()
    assert run(["score", str(candidates), "-m", str(tiny_rm), "-o", str(out), "-q"]) == 0
    assert out.read_bytes() == whole.read_bytes()
    counts = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["counts"]
    assert counts["records"] == ROWS
    assert counts["cuts"]["inputs"] == ROWS + len(range(0, ROWS, 3))


def test_best_of_n_names_the_highest_reward(candidates, tiny_rm, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["score", str(candidates), "-m", str(tiny_rm), "-o", str(out), "--best-of-n", "-q"]
    assert run([*command, "--limit", "30"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    groups = [row for row in rows if "candidates" in row]
    assert len(rows) == 30 and len(groups) == 10
    for row in groups:
        assert row["rewards"][row["best"]] == max(row["rewards"])


def test_bad_rows_stop_or_are_set_aside(tiny_rm, tmp_path, capfd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "p", "reference": "r", "output": "o"}\n'
        '{"prompt": "p", "output": "o"}\n'
        "{broken\n"
        '{"prompt": "p", "reference": "r", "output": "o", "candidates": []}\n'
        '{"prompt": "p", "reference": "r", "output": "o"}\n'
    )
    command = ["score", str(rows), "-m", str(tiny_rm), "-o", str(tmp_path / "out.jsonl")]
    assert run(command) == 3
    assert f"{rows}:2: missing field `reference`" in capfd.readouterr().err
    rejects = tmp_path / "rejects.jsonl"
    assert run([*command, "--rejects", str(rejects), "--force"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    places = [json.loads(line)["where"] for line in rejects.read_text().splitlines()]
    assert places == [f"{rows}:{line}" for line in (2, 3, 4)]


def test_a_group_on_a_triple_is_checked_and_a_lone_chosen_is_a_field_of_the_user(
    tiny_rm, tmp_path, capfd
):
    data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": "q", "reference": "a", "output": "b"}
    rows = [row, {**row, "chosen": True}]
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert run(["score", str(data), "-m", str(tiny_rm), "-o", str(out), "-q"]) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["reward"] == pytest.approx(second["reward"], abs=1e-4)
    pair = {"prompt": "q", "reference": "a", "chosen": "a", "rejected": "b"}
    for group in (1, "a", [1], [], [{"output": 3}], {}):
        data.write_text(json.dumps({**pair, "candidates": group}) + "\n")
        assert run(["score", str(data), "-m", str(tiny_rm)]) == 3
        assert f"{data}:1: " in capfd.readouterr().err


def test_a_model_that_cannot_score_is_said_in_one_line(candidates, tiny_lm, tmp_path, capfd):
    assert run(["score", str(candidates), "-m", str(tiny_lm), "-o", str(tmp_path / "o")]) == 4
    assert "has no reward head" in capfd.readouterr().err
    assert run(["score", str(candidates), "-m", "no/where", "-o", str(tmp_path / "o")]) == 4
    assert run(["score", str(candidates), "-o", str(tmp_path / "o")]) == 2


def test_a_resume_with_another_model_is_refused(candidates, tiny_rm, tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    base = ["score", str(candidates), "-o", str(out), "-q"]
    assert run([*base, "-m", str(tiny_rm)]) == 0
    before = out.read_bytes(), out.stat().st_mtime_ns
    assert run([*base, "-m", str(tiny_rm)]) == 0  # complete: nothing to do
    assert run([*base, "-m", str(tiny_rm), "--no-reference"]) == 2
    assert "`no_reference` was False" in capfd.readouterr().err
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before


GROUP = {
    "prompt": "q",
    "reference": "yes",
    "candidates": [{"output": text} for text in ("yes", "no", "perhaps so", "yes yes")],
}


def scored(tiny_rm, tmp_path, record, *options):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(record) + "\n")
    arguments = ["score", str(source), "-m", str(tiny_rm), "-o", str(out), "--force", "-q"]
    assert run([*arguments, *options]) == 0
    return json.loads(out.read_text())


def test_normalised_rewards_stand_beside_the_raw_ones(tiny_rm, tmp_path):
    raw = scored(tiny_rm, tmp_path, GROUP)["rewards"]
    row = scored(tiny_rm, tmp_path, GROUP, "--normalize", "polar-7b")
    assert row["rewards"] == raw
    assert row["normalized"] == pytest.approx([(r + 5) / 10 for r in raw])
    ranks = scored(tiny_rm, tmp_path, GROUP, "--normalize", "rank")["normalized"]
    assert sorted(ranks) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert ranks.index(1) == raw.index(max(raw))
    z = scored(tiny_rm, tmp_path, GROUP, "--normalize", "zscore")["normalized"]
    assert sum(z) == pytest.approx(0, abs=1e-6) and sum(v * v for v in z) == pytest.approx(4)
    single = {"prompt": "q", "reference": "yes", "output": "yes"}
    assert isinstance(
        scored(tiny_rm, tmp_path, single, "--normalize", "polar-1.8b")["normalized"], float
    )


def test_a_scale_within_a_record_needs_a_group(tiny_rm, tmp_path, capfd):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "q", "reference": "yes", "output": "yes"}) + "\n")
    arguments = ["score", str(source), "-m", str(tiny_rm), "--normalize", "zscore"]
    assert run(arguments) == 3
    assert "in.jsonl:1: `--normalize zscore` compares" in capfd.readouterr().err
    assert run([*arguments[:-1], "zscroe"]) == 2


def test_thinking_is_stripped_for_the_score_and_kept_in_the_record(tiny_rm, tmp_path):
    plain = {**GROUP, "candidates": [{"output": "yes"}, {"output": "no"}]}
    thought = {**GROUP, "candidates": [{"output": "<think>hm\nhm</think>\n yes"}, {"output": "no"}]}
    wanted = scored(tiny_rm, tmp_path, plain)["rewards"]
    row = scored(tiny_rm, tmp_path, thought, "--strip-thinking")
    assert row["rewards"] == pytest.approx(wanted, abs=1e-6)
    assert row["candidates"][0]["output"].startswith("<think>")
    assert scored(tiny_rm, tmp_path, thought)["rewards"] != pytest.approx(wanted, abs=1e-3)


def test_outputs_without_an_answer_get_the_floor_and_say_so(tiny_rm, tmp_path, capfd):
    texts = ["yes", "<think>hm", "<think>hm</think> ", "no"]
    group = {**GROUP, "candidates": [{"output": text} for text in texts]}
    group["candidates"][3]["finish_reason"] = "length"
    wanted = scored(tiny_rm, tmp_path, {**GROUP, "candidates": [{"output": "yes"}]})["rewards"][0]
    capfd.readouterr()
    row = scored(tiny_rm, tmp_path, group, "--strip-thinking", "--best-of-n", "--details")
    assert row["rewards"] == [pytest.approx(wanted, abs=1e-6), -20, -20, -20]
    assert row["floored"] == [None, "unclosed", "empty", "cut_off"]
    assert row["best"] == 0 and row["tokens"][1:] == [0, 0, 0]
    said = "3 of 4 outputs have no answer and got the reward floor -20 (1 in an unfinished thought"
    assert f"{said}, 1 cut off, 1 empty)" in capfd.readouterr().err
    counts = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["counts"]
    assert counts["floored"] == {"outputs": 4, "unclosed": 1, "cut_off": 1, "empty": 1, "below": 0}
    kept = scored(tiny_rm, tmp_path, group, "--strip-thinking", "--reward-floor", "none")
    assert "floored" not in kept and -20 not in kept["rewards"]
    several = {k: v for k, v in GROUP.items() if k not in ("reference", "candidates")}
    several |= {"references": ["yes", "no"], "output": "", "floored": "of an earlier run"}
    row = scored(tiny_rm, tmp_path, several, "--reward-floor", "-9.5")
    assert (row["reward"], row["floored"]) == (-9.5, "empty")
    row = scored(tiny_rm, tmp_path, several)  # nobody has asked for a floor
    assert "floored" not in row and row["reward"] != -20


def test_a_floor_above_answers_is_said(tiny_rm, tmp_path, capfd):
    group = {**GROUP, "candidates": [{"output": "yes"}, {"output": ""}]}
    row = scored(tiny_rm, tmp_path, group, "--reward-floor", "1000")
    assert row["floored"] == [None, "empty"]
    assert "1 answers have a reward at the floor or below it" in capfd.readouterr().err


def test_details_say_what_was_read_and_cut(tiny_rm, tmp_path):
    long = {**GROUP, "candidates": [{"output": "yes"}, {"output": "no " * 300}]}
    row = scored(tiny_rm, tmp_path, long, "--details")
    assert row["truncated"] == [[], ["output"]]
    assert 5 < row["tokens"][0] < row["tokens"][1] <= 128
    single = {"prompt": "q", "reference": "yes", "output": "yes"}
    row = scored(tiny_rm, tmp_path, single, "--details")
    assert isinstance(row["tokens"], int) and row["truncated"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "sglang"], "invalid value for `--backend`: `sglang` is not one of"),
        (["--engine-option", "a=1"], "it is for --backend vllm"),
        (["--backend", "vllm", "--engine-option", "nonsense"], "not of the form KEY=VALUE"),
    ],
)
def test_backends_that_do_not_exist_are_refused(options, said, tiny_rm, tmp_path, capfd):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(GROUP) + "\n")
    assert run(["score", str(source), "-m", str(tiny_rm), *options]) == 2
    assert said in capfd.readouterr().err


def test_a_missing_vllm_is_said_with_the_way_to_get_it(tiny_rm, tmp_path, capfd):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(GROUP) + "\n")
    assert run(["score", str(source), "-m", str(tiny_rm), "--backend", "vllm"]) == 4
    assert "pip install 'polarctl[vllm]'" in capfd.readouterr().err
