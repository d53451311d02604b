"""`polarctl sample` on real tiny models."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest
from tiny import build_lm, build_tokenizer

from polarctl import cli
from polarctl.policies.prompts import cut_to_prefixes
from polarctl.records import Record, Trajectory, check, prompt_id
from polarctl.stages import sample as stage

PROGRAM = str(Path(sys.executable).parent / "polarctl")
QUESTIONS = [{"prompt": f"What is the sum of {n} and {n * 7 % 31}?"} for n in range(40)]


def write_jsonl(path, records):
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return str(path)


def read_jsonl(path):
    return [orjson.loads(line) for line in Path(path).read_bytes().splitlines()]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def prompts(tmp_path):
    return write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS)


@pytest.fixture
def pool(tmp_path, tiny_lm, tiny_chat_lm):
    policies = [
        {"policy": "base", "model": str(tiny_lm)},
        {"policy": "chat", "model": str(tiny_chat_lm), "samples": 1, "max_new_tokens": 3},
    ]
    return write_jsonl(tmp_path / "pool.jsonl", policies)


def sample(*arguments):
    return cli.run(["sample", *arguments, "--max-new-tokens", "8", "-q"])


def test_trajectories_are_whole_records_policy_by_policy(tmp_path, pool):
    extra = {"reference": "Paris.", "category": "geo", "mine": [1, {"a": None}]}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    asked = [
        {"prompt": "The capital of France?", **extra},
        {"prompt": messages, "id": "why"},
        {"prompt": "The sea was", "wrapper": "pretrain", "id": "sea"},
    ]
    path = write_jsonl(tmp_path / "asked.jsonl", asked)
    out = tmp_path / "out.jsonl"
    assert sample(path, "--pool", pool, "-o", str(out), "--no-clean") == 0
    made = read_jsonl(out)
    for record in made:
        check(record, Trajectory)
    geo = prompt_id(asked[0])
    assert [(r["policy"], r["id"], r["sample"]) for r in made] == [
        *[("base", name, i) for name in (geo, "why", "sea") for i in (0, 1)],
        ("chat", geo, 0),
        ("chat", "why", 0),  # the chat policy passes over the text to be continued
    ]
    assert {(r["policy"], r["wrapper"]) for r in made} == {("base", "pretrain"), ("chat", "sft")}
    assert all({k: r[k] for k in extra} == extra for r in made if r["id"] == geo)
    assert [r["prompt"] for r in made if r["id"] == "why"] == [messages] * 3
    assert max(r["num_tokens"] for r in made if r["policy"] == "chat") <= 3
    counts = json.loads(Path(f"{out}.manifest.json").read_bytes())["counts"]
    assert counts["policies"]["chat"]["other wrapper"] == 1


def test_what_cleaning_did_is_counted_and_said(tmp_path, prompts, pool, capfd):
    out = tmp_path / "out.jsonl"
    sized = ["--max-new-tokens", "8", "-o", str(out)]
    assert cli.run(["sample", prompts, "--pool", pool, *sized]) == 0
    found = Counter((r["policy"], mark) for r in read_jsonl(out) for mark in r["cleaned"])
    tallies = json.loads(Path(f"{out}.manifest.json").read_bytes())["counts"]["policies"]
    assert found["base", "incomplete"] > 0
    for policy in ("base", "chat"):
        assert tallies[policy].get("incomplete", 0) == found[policy, "incomplete"]
    said = capfd.readouterr().err
    row = next(words for words in map(str.split, said.splitlines()) if words[:1] == ["base"])
    cut, texts = found["base", "incomplete"], tallies["base"]["records"]
    # Policy, texts, failed; loops, ends cut with their share, refusals.
    assert row[1:3] == [f"{texts}", f"{tallies['base']['empty']}"]
    assert row[3:7] == ["0", f"{cut}", f"({cut / texts:.1%})", "0"]
    tokens = sum(record["num_tokens"] for record in read_jsonl(out))
    assert f"{len(read_jsonl(out)):,} texts by 2 policies, {tokens:,} tokens" in said


def test_batch_size_order_and_shards_change_no_text(tmp_path, prompts, tiny_lm):
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", QUESTIONS[::-1])
    texts = []
    for name, arguments in {
        "a": [prompts],
        "b": [prompts, "--batch-size", "3"],
        "c": [shuffled, "--batch-size", "7"],
        "d": [prompts, "--limit", "20"],
    }.items():
        out = tmp_path / f"{name}.jsonl"
        assert sample(*arguments, "-m", str(tiny_lm), "-o", str(out)) == 0
        texts.append({(r["id"], r["sample"]): r["output"] for r in read_jsonl(out)})
    a, b, c, d = texts
    assert a == b == c
    assert d == {key: a[key] for key in d}
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(set(a.values())) > 70  # samples and prompts differ


def test_another_seed_or_policy_name_gives_other_texts(tmp_path, prompts, tiny_lm):
    texts = set()
    for number, arguments in enumerate([[], ["--seed", "1"], ["--policy", "other"]]):
        out = tmp_path / f"{number}.jsonl"
        assert sample(prompts, "--limit", "5", "-m", str(tiny_lm), "-o", str(out), *arguments) == 0
        texts.add(tuple(r["output"] for r in read_jsonl(out)))
    assert len(texts) == 3


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, tiny_lm, tiny_chat_lm, capfd):
    pool = write_jsonl(
        tmp_path / "pool.jsonl",
        [
            {"policy": name, "model": str(model), "max_new_tokens": 24}
            for name, model in [("a", tiny_lm), ("b", tiny_chat_lm)]
        ],
    )
    asked = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Text {n} is"} for n in range(600)])
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    common = ["sample", asked, "--pool", pool, "--samples", "1", "-o"]
    assert cli.run([*common, str(whole), "--batch-size", "256"]) == 0
    journal = Path(f"{torn}.journal")
    process = subprocess.Popen([PROGRAM, *common, str(torn), "--batch-size", "16"])
    while not (torn.exists() and journal.read_bytes().count(b"\n") > 1):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(f"{torn}.manifest.json").exists()
    assert 0 < torn.stat().st_size < whole.stat().st_size
    assert whole.read_bytes().startswith(torn.read_bytes()[: -os.stat(torn).st_size // 2])
    capfd.readouterr()
    # Another batch size may go on: it changes no text.
    assert cli.run([*common, str(torn), "--batch-size", "256"]) == 0
    assert "going on after" in capfd.readouterr().err
    assert sha256(torn) == sha256(whole)
    counts = [json.loads(Path(f"{f}.manifest.json").read_bytes())["counts"] for f in (whole, torn)]
    assert counts[0] == counts[1]


def test_a_finished_output_loads_nothing(tmp_path, prompts, tiny_lm, capfd):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_lm, model)
    out = tmp_path / "out.jsonl"
    command = ["sample", prompts, "-m", str(model), "--limit", "2", "--max-new-tokens", "4"]
    command += ["-o", str(out)]
    assert cli.run(command) == 0
    before = out.stat().st_mtime_ns
    assert cli.run(command) == 0
    assert "complete already" in capfd.readouterr().err
    assert out.stat().st_mtime_ns == before
    (model / "config.json").write_text("{}")  # another policy now
    assert cli.run(command) == 2
    assert "`policies` was" in capfd.readouterr().err


def test_a_pipe_carries_the_bytes_of_the_file(tmp_path, prompts, pool):
    out = tmp_path / "out.jsonl"
    assert sample(prompts, "--pool", pool, "-o", str(out)) == 0
    data = Path(prompts).read_bytes()
    command = [PROGRAM, "sample", "--pool", pool, "--max-new-tokens", "8"]
    piped = subprocess.run(command, input=data, capture_output=True, check=True)
    assert piped.stdout == out.read_bytes()
    assert b"device: cpu" in piped.stderr


# -- prefixes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path, prompts, pool, monkeypatch):
    monkeypatch.setattr(stage, "WINDOW_ROWS", 4)
    made = []
    for gpus in ("1", "2"):
        out = tmp_path / f"{gpus}.jsonl"
        arguments = [prompts, "--pool", pool, "-o", str(out), "--gpus", gpus, "--device", "cpu"]
        assert sample(*arguments, "--rejects", str(tmp_path / f"bad-{gpus}.jsonl")) == 0
        counts = json.loads(Path(f"{out}.manifest.json").read_bytes())["counts"]
        made.append((out.read_bytes(), (tmp_path / f"bad-{gpus}.jsonl").read_bytes(), counts))
    assert made[0] == made[1] and len(made[0][0]) > 1000


def test_prefix_lengths_are_uniform_and_true_prefixes():
    tokenizer = build_tokenizer()
    text = "a é 我 the sea was calm that day. " * 3
    total = len(tokenizer(text)["input_ids"])
    lengths = Counter()
    for number in range(3000):
        record = Record({"prompt": text, "id": str(number)}, "f:1")
        (cut,) = cut_to_prefixes([record], tokenizer, 5, seed=0)
        assert text.startswith(cut["prompt"]) and cut.where == "f:1"
        lengths[len(tokenizer(cut["prompt"])["input_ids"])] += 1
    assert total > 20
    # 600 of each length; a standard deviation is 22. A token may end inside a character, which is
    # then kept whole, so that the text is recounted a token longer or so: "é" is tokens 3 and 4.
    assert sum(lengths.values()) == 3000
    assert lengths[1] == pytest.approx(600, abs=110)
    assert lengths[2] == pytest.approx(600, abs=110)
    assert max(lengths) <= 6


def test_short_texts_and_instructions_stay_whole():
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "one two three"}]
    records = [
        {"prompt": "a"},
        {"prompt": ""},
        {"prompt": messages},
        {"prompt": "one two three", "wrapper": "sft"},
    ]
    cut = list(cut_to_prefixes(map(Record, records), tokenizer, 1, seed=0))
    assert cut == records


def test_all_policies_continue_the_same_prefix_of_a_corpus(tmp_path, tiny_lm, tiny_chat_lm):
    texts = [{"text": f"Story {n}: the boats lay still, and nobody spoke."} for n in range(6)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    pool = write_jsonl(
        tmp_path / "pool.jsonl",
        [
            {"policy": name, "model": str(model), "kind": "base"}
            for name, model in [("a", tiny_lm), ("b", tiny_chat_lm)]
        ],
    )
    out = tmp_path / "out.jsonl"
    options = ["--text-field", "text", "--prefix-tokens", "1024", "--no-clean"]
    assert sample(corpus, "--pool", pool, "-o", str(out), *options) == 0
    made = read_jsonl(out)
    prefixes = {p: {r["id"]: r["prompt"] for r in made if r["policy"] == p} for p in "ab"}
    assert prefixes["a"] == prefixes["b"]
    assert len(prefixes["a"]) == 6
    for record in made:
        assert any(text["text"].startswith(record["prompt"]) for text in texts)
        assert record["id"] == prompt_id({"prompt": record["prompt"]})
        assert "text" not in record


# -- what goes wrong ------------------------------------------------------------------------------


def test_prompts_longer_than_the_context_name_their_line(tmp_path, tiny_lm, capfd):
    asked = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": "xyz " * 200}])
    out, rejects = tmp_path / "out.jsonl", tmp_path / "rejects.jsonl"
    assert sample(asked, "-m", str(tiny_lm), "-o", str(out)) == 3
    said = capfd.readouterr().err
    assert f"{asked}:2: the prompt has " in said and "a context of 128" in said
    assert not out.exists()  # found before anything was written
    command = [asked, "-m", str(tiny_lm), "-o", str(out), "--rejects", str(rejects), "--force"]
    assert sample(*command) == 0
    assert {r["prompt"] for r in read_jsonl(out)} == {"Hi"}
    (rejected,) = read_jsonl(rejects)
    assert rejected["where"] == f"{asked}:2" and "context" in rejected["reason"]


def test_the_context_ends_an_answer(tmp_path, tiny_lm):
    asked = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "The sea was calm"}])
    out = tmp_path / "out.jsonl"
    command = ["sample", asked, "-m", str(tiny_lm), "-o", str(out), "--samples", "8", "--no-clean"]
    assert cli.run(command) == 0
    length = len(build_tokenizer()("The sea was calm")["input_ids"])
    longest = {r["num_tokens"] for r in read_jsonl(out) if r["finish_reason"] == "length"}
    assert longest == {128 - length}
    choices = json.loads(Path(f"{out}.manifest.json").read_bytes())["choices"]
    assert "tiny-base: 128" in choices["length limit"]["reason"]


def test_a_policy_without_any_text_is_named(tmp_path, capfd):
    silent = build_lm(tmp_path / "silent", seed=5)
    config = json.loads((silent / "generation_config.json").read_text())
    config["eos_token_id"] = list(range(320))  # whatever it writes ends its text
    (silent / "generation_config.json").write_text(json.dumps(config))
    asked = write_jsonl(tmp_path / "p.jsonl", QUESTIONS[:3])
    out, rejects = tmp_path / "out.jsonl", tmp_path / "rejects.jsonl"
    assert sample(asked, "-m", str(silent), "-o", str(out)) == 0
    said = capfd.readouterr().err
    assert "policy `silent` wrote no text at all (empty: 6)" in said
    assert "6 samples without text" in said
    assert (
        sample(asked, "-m", str(silent), "-o", str(out), "--force", "--rejects", str(rejects)) == 0
    )
    assert "wrote no text (sample 1)" in read_jsonl(rejects)[1]["reason"]


def test_repeated_prompts_are_sampled_once_and_one_id_for_two_is_an_error(tmp_path, tiny_lm, capfd):
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"prompt": "Hi"}, {"prompt": "Hi"}])
    out = tmp_path / "out.jsonl"
    assert sample(twice, "-m", str(tiny_lm), "-o", str(out), "--no-clean") == 0
    assert len(read_jsonl(out)) == 2
    assert "1 repeated prompts" in capfd.readouterr().err
    asked = [{"prompt": "Hi", "id": "a"}, {"prompt": "Ho", "id": "a"}]
    clash = write_jsonl(tmp_path / "clash.jsonl", asked)
    assert sample(clash, "-m", str(tiny_lm), "-o", str(out), "--force") == 3
    assert f"{clash}:2: id `a` already names another prompt" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("lines", "status", "said"),
    [
        (b"", 2, "pool.jsonl: no records"),
        (b'{"policy": "a"}\n', 2, "pool.jsonl:1: missing field `model`"),
        (b'{"policy": "a", "model": "BASE"}\n' * 2, 2, "pool.jsonl:2: policy `a` is named twice"),
        (b'{"policy": "a", "model": "BASE", "top_p": 0}\n', 2, "pool.jsonl:1: field `top_p`"),
        (b'{"policy": "a", "model": "./none"}\n', 4, "pool.jsonl:1: ./none: no such model folder"),
        (b'{"policy": "a", "model": "nobody/nothing"}\n', 4, "pool.jsonl:1: nobody/nothing: no "),
        (b'{"policy": "a", "model": "EMPTY"}\n', 4, "no model that can be loaded"),
        (b'{"policy": "a", "model": "MUTE"}\n', 4, "no tokenizer that can be loaded"),
        (b'{"policy": "a", "model": "BARE"}\n', 4, "the model cannot be loaded"),
        (b'{"policy": "a", "model": "BASE", "kind": "chat"}\n', 2, "has no chat template"),
    ],
)
def test_a_bad_pool_is_one_line_with_its_place(
    tmp_path, prompts, tiny_lm, capfd, lines, status, said
):
    import shutil

    (tmp_path / "empty").mkdir()
    (tmp_path / "mute").mkdir()
    shutil.copy(tiny_lm / "config.json", tmp_path / "mute")
    shutil.copytree(tiny_lm, tmp_path / "bare", ignore=lambda *_: ["model.safetensors"])
    for name, folder in [
        (b"BASE", str(tiny_lm)),
        (b"EMPTY", "empty"),  # seen from the pool's folder
        (b"MUTE", "mute"),
        (b"BARE", "bare"),
    ]:
        lines = lines.replace(name, folder.encode())
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes(lines)
    assert sample(prompts, "--pool", str(pool), "-o", str(tmp_path / "out.jsonl")) == status
    error = capfd.readouterr().err
    assert said in error and error.startswith("polarctl: ") and "Traceback" not in error


def test_a_dry_run_looks_at_every_policy_and_counts_without_weights(
    tmp_path, tiny_lm, tiny_chat_lm, capfd
):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_lm, bare, ignore=lambda *_: ["model.safetensors"])
    pool = tmp_path / "pool.yaml"
    pool.write_text(
        f"- {{policy: a, model: {bare}, dtype: bfloat16, max_new_tokens: 500}}\n"
        f"- {{policy: b, model: {tiny_chat_lm}, samples: 3, max_new_tokens: 10, weight: 0.5}}\n"
    )
    asked = [*QUESTIONS[:5], {"prompt": "Why?", "wrapper": "sft"}]
    path = write_jsonl(tmp_path / "p.jsonl", asked)
    out = tmp_path / "out.jsonl"
    command = ["sample", path, "--pool", str(pool), "-o", str(out), "--dry-run", "--json"]
    assert cli.run(command) == 0
    assert not out.exists()
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    plan = next(entry for entry in said if "tokens" in entry)
    # a: 5 prompts x 2 in a context of 128; b: half of 6 prompts x 3 of 10 tokens.
    assert (plan["passes"], plan["samples"], plan["tokens"]) == (2, 10 + 9, 10 * 128 + 9 * 10)
    assert any("weight 0.5, about 3 prompts x 3" in entry["message"] for entry in said)
    shape = next(entry["message"] for entry in said if "LlamaForCausalLM" in entry["message"])
    # V 290, H 32, F 64, 2 layers: embedding and head 2 V H; a layer q, o 2 H H, k, v 2 H H/2,
    # MLP 3 H F, two norms 2 H; the last norm H.
    count = 2 * 290 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert f"{count:,} weights: " in shape and "in bfloat16, context 128" in shape
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    assert cli.run(command) == 4
    assert "pool.yaml:1: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "pass either `--pool FILE` or `--model DIR`"),
        (["--pool", "x", "--model", "y"], "pass either"),
        (["--pool", "none.jsonl"], "none.jsonl: no such file"),
        (["--pool", "-"], "the pool must be a file"),
        (["--pool", "POOL", "--policy", "a"], "`--policy` has no effect here: it is for --model"),
        (["-m", "BASE", "--top-p", "0"], "top-p"),
        (["-m", "BASE", "--samples", "0"], "samples"),
        (["-m", "BASE", "-o", "POOL/out.jsonl"], "is not a folder"),
        (["-m", "BASE", "--device", "tpu"], "no such device"),
        (["-m", "BASE", "--dtype", "int8"], "`int8` is not one of"),
    ],
)
def test_a_bad_option_is_refused(prompts, pool, tiny_lm, capfd, arguments, said):
    names = {"POOL": pool, "BASE": str(tiny_lm)}
    words = [word.replace("POOL", str(pool)) for word in arguments]
    assert sample(prompts, *[names.get(word, word) for word in words]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "x"}', ":2: missing field `prompt`"),
        (b'{"prompt": 3}', ":2: field `prompt`"),
        (b"{", ":2: no JSON"),
    ],
)
def test_a_bad_prompt_is_refused_or_set_aside(tmp_path, tiny_lm, capfd, line, said):
    path, out, rejects = (tmp_path / name for name in ("p.jsonl", "out.jsonl", "r.jsonl"))
    path.write_bytes(b'{"prompt": "Hi"}\n' + line + b"\n")
    command = [str(path), "-m", str(tiny_lm), "-o", str(out), "--no-clean"]
    assert sample(*command) == 3
    assert said in capfd.readouterr().err
    assert sample(*command, "--rejects", str(rejects)) == 0
    assert len(read_jsonl(out)) == 2
    assert read_jsonl(rejects)[0]["where"] == f"{path}:2"


def test_a_dry_run_writes_nothing(tmp_path, prompts, pool, capfd):
    out = tmp_path / "out.jsonl"
    assert cli.run(["sample", prompts, "--pool", pool, "-o", str(out), "--dry-run"]) == 0
    assert "40 records" in capfd.readouterr().err
    assert not out.exists()
