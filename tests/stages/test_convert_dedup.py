"""`polarctl convert --dedup`: what counts as there already, against exact similarities."""

import json
import random
from pathlib import Path

import orjson
import pytest

from polarctl import cli
from polarctl.formats.duplicates import Duplicates

WORDS = [f"w{n}" for n in range(400)]


def write_jsonl(path, records):
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return str(path)


def prompts_in(path):
    return [json.loads(line)["prompt"] for line in Path(path).read_bytes().splitlines()]


def runs(text):
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def documents(count, seed=0):
    """Texts of 60 words, and for each one in which some words at the end are others."""
    rng = random.Random(seed)
    for number in range(count):
        words = rng.choices(WORDS, k=60)
        changed = number % 30
        yield " ".join(words), " ".join(words[: 60 - changed] + rng.choices(WORDS, k=changed))


def test_near_duplicates_are_those_above_the_similarity():
    found, near, far = Duplicates("0.8"), [], []
    for text, other in documents(300):
        assert found.add(text) is None
        share = jaccard(runs(text), runs(other))
        # The estimate's standard deviation is 0.035 at 0.8: nothing is said of 0.7 to 0.9.
        if share == 1:
            assert found.add(other) == "repeated"
        elif share >= 0.9:
            near.append(found.add(other))
        elif share <= 0.7:
            far.append(found.add(other))
    assert len(near) > 10 and set(near) == {"near_repeated"}
    assert len(far) > 150 and set(far) == {None}


def test_case_space_and_marks_do_not_make_a_text_new():
    found = Duplicates("0.9")
    assert found.add("What is the sum of 3 and 4?") is None
    assert found.add("what is  the sum of 3 and 4") == "near_repeated"
    assert found.add("What is the sum of 3 and 5?") is None
    assert found.add("我喜欢猫，也喜欢狗。") is None
    assert found.add("我喜欢猫也喜欢狗") == "near_repeated"
    assert found.add("?!") is None and found.add("") is None and found.add("…") is None
    exact = Duplicates("exact")
    assert exact.add("a b") is None and exact.add(" a\nb ") == "repeated"
    assert exact.add([{"role": "user", "content": "a b"}]) == "repeated"
    assert exact.add("A b") is None


def test_duplicates_go_before_the_split_so_that_no_near_copy_is_on_both_sides(tmp_path, capfd):
    texts = [text for pair in documents(200) for text in pair]
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    parts = {}
    for part in ("train", "test"):
        out = tmp_path / f"{part}.jsonl"
        command = ["convert", source, "--to", "prompts", "-o", str(out)]
        assert cli.run([*command, "--split", part, "--dedup", "0.6"]) == 0
        parts[part] = prompts_in(out)
    assert parts["train"] and parts["test"]
    train, test = ([runs(text) for text in parts[part]] for part in ("train", "test"))
    assert not any(jaccard(a, b) > 0.7 for a in train for b in test)
    counts = json.loads(Path(f"{out}.manifest.json").read_bytes())["counts"]
    kept = len(parts["train"]) + len(parts["test"])
    assert kept == 400 - counts["repeated"] - counts["near_repeated"]
    assert counts["repeated"] >= 6 and counts["near_repeated"] > 50
    assert "rows have nearly one that was there already" in capfd.readouterr().err


def test_a_resume_knows_the_prompts_of_before(tmp_path, monkeypatch):
    from polarctl.stages import convert as stage

    monkeypatch.setattr(stage, "WINDOW_ROWS", 10)
    # Prompt n comes again 30 rows later, in another window; a row that is none in each.
    rows = [{"prompt": f"{n % 30} is a number"} if n % 10 else {"x": 1} for n in range(80)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    common = ["convert", source, "--to", "prompts", "--dedup", "exact"]

    def run(out):
        return cli.run([*common, "-o", str(out), "--rejects", f"{out}.bad"])

    assert run(whole) == 0
    assert prompts_in(whole) == [f"{n} is a number" for n in range(30) if n % 10]

    class Power(Exception):
        pass

    calls = []

    def failing(rows, *more):
        calls.append(1)
        if len(calls) == 5:
            raise Power
        return real(rows, *more)

    real = stage.convert
    with monkeypatch.context() as patch:
        patch.setattr(stage, "convert", failing)
        with pytest.raises(Power):
            run(torn)
    assert run(torn) == 0
    assert torn.read_bytes() == whole.read_bytes()
    counts = [json.loads(Path(f"{f}.manifest.json").read_bytes())["counts"] for f in (whole, torn)]
    assert counts[0] == counts[1] and counts[0]["rejects"] == 8


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--dedup", "near"], 2, "`--dedup near`: neither `exact` nor a number from 0.5 to 1"),
        (["--dedup", "1"], 2, "`--dedup 1`"),
        (["--dedup", "0.4"], 2, "`--dedup 0.4`"),
        (["--dedup", "exact", "--shard", "0/2"], 2, "--shard"),
    ],
)
def test_what_cannot_be_is_refused(more, status, said, tmp_path, capfd):
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p"}])
    assert cli.run(["convert", source, *more]) == status
    assert said in capfd.readouterr().err


def test_without_the_package_near_duplicates_need_an_extra(tmp_path, monkeypatch, capfd):
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p"}, {"prompt": "p"}])
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    assert cli.run(["convert", source, "--dedup", "0.8"]) == 4
    assert "pip install 'polarctl[dedup]'" in capfd.readouterr().err
    assert cli.run(["convert", source, "--dedup", "exact"]) == 0
    assert capfd.readouterr().out.count("\n") == 1
