"""`polarctl pair`: who meets whom, evenly, and what is said of the rest."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarctl import cli
from polarctl.policies import nearness
from polarctl.policies.by_prompt import Groups
from polarctl.policies.pairing import Pairing
from polarctl.records import Record, Triple, check
from polarctl.stages.pair import pair

PROGRAM = str(Path(sys.executable).parent / "polarctl")


def trajectories(prompts, policies, samples=2, **fields):
    """Text `POLICY SAMPLE of PROMPT` for each combination."""
    return [
        Record(
            {
                "id": f"p{number}",
                "prompt": f"prompt {number}",
                "output": f"{policy} {index} of {number}",
                "policy": policy,
                "sample": index,
                **fields,
            }
        )
        for number in range(prompts)
        for policy in policies
        for index in range(samples)
    ]


def triples_of(records, **options):
    groups = Groups()
    for record in records:
        groups.add(Record(record))
    groups.finish()
    pairing = Pairing(groups, **options)
    return list(pair(groups, pairing)), pairing


def write_jsonl(path, records):
    path.write_bytes(b"".join(orjson.dumps(dict(record)) + b"\n" for record in records))
    return str(path)


def read_jsonl(path):
    return [orjson.loads(line) for line in Path(path).read_bytes().splitlines()]


TRAJECTORY = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "b"]),
        "policy": st.sampled_from(["x", "y", "z"]),
        "sample": st.integers(0, 3),
        "output": st.sampled_from(["one", "two", " two", "three", "four"]),
        "wrapper": st.sampled_from(["sft", "pretrain"]),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        TRAJECTORY,
        max_size=24,
        unique_by=lambda r: (r["id"], r["policy"], r["sample"], r["wrapper"]),
    ),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
def test_every_triple_is_two_samples_of_one_policy_and_one_of_another(records, per_prompt, rng):
    records = [{**r, "prompt": f"prompt {r['id']}"} for r in records]
    texts = {}
    for r in records:
        texts.setdefault((r["id"], r["wrapper"], r["policy"]), []).append(r["output"])
    made, pairing = triples_of(records, per_prompt=per_prompt)
    for triple in made:
        check(triple, Triple)
        where = triple["id"], triple["wrapper"]
        ours = list(texts[(*where, triple["policy"])])
        assert triple["policy"] != triple["rejected_policy"]
        assert triple["rejected"] in texts[(*where, triple["rejected_policy"])]
        ours.remove(triple["reference"])
        assert triple["chosen"] in ours  # another sample
        assert triple["rejected"].strip() not in (
            triple["reference"].strip(),
            triple["chosen"].strip(),
        )
    assert pairing.counts["triples"] == len(made)
    shuffled = list(records)
    rng.shuffle(shuffled)
    again, _ = triples_of(shuffled, per_prompt=per_prompt)
    assert sorted(map(orjson.dumps, again)) == sorted(map(orjson.dumps, made))


def test_pairs_of_policies_come_round_before_they_repeat():
    # 3 policies make 6 ordered pairs; 2 samples each make 2 x 2 = 4 triples of a pair: 24 in all.
    made, _ = triples_of(trajectories(1, "abc"), per_prompt=100)
    pairs = [(t["policy"], t["rejected_policy"]) for t in made]
    assert len(made) == 24
    for start in range(0, 24, 6):
        assert len(set(pairs[start : start + 6])) == 6
    assert len({(t["reference"], t["chosen"], t["rejected"]) for t in made}) == 24


def test_more_triples_per_prompt_only_add():
    records = trajectories(20, "abcd")
    one, _ = triples_of(records)
    three, _ = triples_of(records, per_prompt=3)
    assert len(one) == 20 and len(three) == 60
    assert one == three[::3]


def test_roles_are_even_where_all_policies_answer_all_prompts():
    names = "abcdefgh"
    made, pairing = triples_of(trajectories(2000, names))
    # 2000 / 8 = 250 in each role; a standard deviation is sqrt(2000 * 1/8 * 7/8) = 15.
    for name in names:
        assert pairing.roles[name]["reference"] == pytest.approx(250, abs=75)
        assert pairing.roles[name]["rejected"] == pytest.approx(250, abs=75)
    # And every ordered pair of the 56 meets: 36 expected, a standard deviation is 6.
    meetings = Counter((t["policy"], t["rejected_policy"]) for t in made)
    assert len(meetings) == 56 and max(meetings.values()) < 72


def test_a_policy_with_few_prompts_comes_up_more_often_in_those():
    records = trajectories(1000, "abcd") + trajectories(100, "e")
    _, pairing = triples_of(records)
    # Weights 1/100 and 4 x 1/1000 in its 100 prompts: 0.01 / 0.014 = 71 of 100 as reference,
    # where an even draw would give 20.
    assert pairing.roles["e"]["reference"] == pytest.approx(71, abs=23)


def test_equal_texts_are_never_a_pair():
    same = [dict(r, output="same") for r in trajectories(1, "ab")]
    made, pairing = triples_of(same)
    assert made == []
    assert pairing.counts["prompts with identical texts"] == 1
    # One of b's samples differs from a's: it is always found.
    partly = [dict(r) for r in trajectories(50, "ab")]
    for r in partly:
        if r["policy"] == "b" and r["sample"] == 0 or r["policy"] == "a":
            r["output"] = " same\n" if r["policy"] == "b" else "same"
    made, pairing = triples_of(partly)
    assert len(made) == 50
    assert pairing.counts["identical texts passed over"] > 0
    assert {tuple(sorted((t["policy"], t["rejected_policy"]))) for t in made} == {("a", "b")}


def with_copies():
    """Three samples of `a`, two of which are one text but for white space; two of `b`."""
    records = trajectories(40, "a", samples=3) + trajectories(40, "b")
    for record in records:
        if record["policy"] == "a" and record["sample"]:
            record["output"] = f"a copy of {record['id']}" + "\n" * record["sample"]
    return records


def copies_in(triples):
    return sum(t["reference"].split() == t["chosen"].split() for t in triples)


def test_a_chosen_text_that_is_the_reference_is_kept_dropped_or_drawn_again():
    # `a` has 3 x 2 = 6 orders of two samples as reference and chosen; 2 of them are the copies.
    # As `b` is the first policy as often, a sixth of the triples has them: 40 x 2 / 12 = 7 of 40.
    kept, pairing = triples_of(with_copies())
    assert len(kept) == 40 and 0 < copies_in(kept) < 15
    assert pairing.counts["chosen equal to the reference"] == copies_in(kept)
    dropped, pairing = triples_of(with_copies(), equal_chosen="drop")
    assert dropped == [t for t in kept if t["reference"].split() != t["chosen"].split()]
    assert pairing.counts["chosen equal to the reference"] == copies_in(kept)
    assert sum(roles["reference"] for roles in pairing.roles.values()) == len(dropped)
    again, pairing = triples_of(with_copies(), equal_chosen="resample")
    assert len(again) == 40 and copies_in(again) == 0
    assert [t for t in again if t in kept] == dropped  # the others are as they were
    replaced = [(o, n) for o, n in zip(kept, again, strict=True) if o != n]
    assert len(replaced) == copies_in(kept)
    assert all(o["policy"] == n["policy"] == "a" for o, n in replaced)  # of the same policies


def test_where_every_sample_is_the_reference_another_policy_takes_the_place():
    records = trajectories(30, "abc")
    for record in records:
        if record["policy"] == "a":
            record["output"] = f"always {record['id']}"
    made, _ = triples_of(records, equal_chosen="resample")
    assert len(made) == 30 and {t["policy"] for t in made} == {"b", "c"}
    assert "a" in {t["rejected_policy"] for t in made}
    only = [dict(r) for r in records if r["policy"] != "c"]
    for record in only:
        record["output"] = record["policy"]
    made, pairing = triples_of(only, equal_chosen="resample")
    assert made == [] and pairing.counts["prompts with identical texts"] == 30


@pytest.mark.parametrize(
    ("choice", "triples", "said"),
    [("keep", 4, "kept"), ("drop", 0, "dropped"), ("resample", 0, "drawn again")],
)
def test_the_report_says_what_became_of_copies(choice, triples, said, tmp_path, capfd):
    records = [dict(r, output=r["policy"]) for r in trajectories(4, "ab")]
    records += trajectories(6, "ab", id="more")[:4]
    out, source = tmp_path / "out.jsonl", write_jsonl(tmp_path / "t.jsonl", records)
    assert cli.run(["pair", source, "-o", str(out), "--equal-chosen", choice]) == 0
    found = read_jsonl(out)
    assert sum(t["reference"] == t["chosen"] for t in found) == triples
    assert f"is the reference: {said} (--equal-chosen {choice})" in capfd.readouterr().err


def test_policies_of_different_wrappers_do_not_meet():
    base = trajectories(5, "ab", wrapper="pretrain")
    chat = trajectories(5, "cd", wrapper="sft")
    made, _ = triples_of(base + chat)
    assert len(made) == 10
    meetings = {(t["wrapper"], "".join(sorted(t["policy"] + t["rejected_policy"]))) for t in made}
    assert meetings == {("pretrain", "ab"), ("sft", "cd")}


def test_a_single_sample_can_only_be_rejected():
    records = trajectories(30, "a") + trajectories(30, "b", samples=1)
    made, _ = triples_of(records)
    assert {(t["policy"], t["rejected_policy"]) for t in made} == {("a", "b")}


def test_similarity_is_the_share_of_common_pairs_of_words():
    def share(a, b):
        return nearness.similarity(nearness.pairs_of_words(a), nearness.pairs_of_words(b))

    # (start, It) and (It, is) of the 4 pairs `start It is 7 .`: 2 x 2 / 8.
    assert share("It is 7.", "It  is 8.") == 0.5
    hundred = [f"w{n}" for n in range(100)]
    other = [*hundred[:50], "x", *hundred[51:]]
    assert share(" ".join(hundred), " ".join(other)) == 0.98  # two of 100 pairs are others
    assert share("a b c", "a b c") == 1 and share("", "") == 1 and share("a", "b") == 0
    assert share("我喜欢猫。", "我喜欢狗。") == 0.6  # a sign is a word: 3 of 5
    assert share("a a a a", "a a") == pytest.approx(2 * 2 / 6)  # counted, not only there
    assert share([{"role": "user", "content": "a b"}], "a b") == 1


def near_texts():
    """`a` and `b` differ in one of 21 words for each prompt; `c` says something else."""
    said = {"a": "so", "b": "thus"}
    for r in (records := trajectories(60, "abc")):
        line = f"it is {r['sample']} of {r['id']} " + "and on " * 8
        if r["policy"] in said:
            r["output"] = line + said[r["policy"]]
    return records


def test_a_nearly_equal_text_of_another_policy_is_no_negative():
    made, _ = triples_of(near_texts())
    pairs = {frozenset((t["policy"], t["rejected_policy"])) for t in made}
    assert frozenset("ab") in pairs and len(pairs) == 3
    made, pairing = triples_of(near_texts(), max_similarity=0.8)
    assert len(made) == 60
    assert {"c"} == {n for t in made for n in (t["policy"], t["rejected_policy"])} - {"a", "b"}
    assert all("c" in (t["policy"], t["rejected_policy"]) for t in made)
    assert pairing.counts["similar texts passed over"] > 0
    # Nor a further negative: for `a` only the two of `c` are left.
    made, _ = triples_of(near_texts(), max_similarity=0.8, negatives=9)
    assert all(len(t["negatives"]) == 1 for t in made if t["policy"] in "ab")
    only, pairing = triples_of([r for r in near_texts() if r["policy"] != "c"], max_similarity=0.8)
    assert only == [] and pairing.counts["prompts with too similar texts"] == 60


# -- the command ----------------------------------------------------------------------------------


NAMED = ["qwen-7b-base", "qwen-7b-chat", "qwen-72b", "yi-34b", "glm-9b"]


def scored(first, second, margin):
    triple = {"prompt": "p", "reference": "r", "chosen": "c", "rejected": "x"}
    return {**triple, "policy": first, "rejected_policy": second, "rewards": [1.0, 1.0 - margin]}


@pytest.mark.parametrize("by", ["names", "scores"])
def test_hard_negatives_come_from_near_policies(by, tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", trajectories(300, NAMED))
    # By rewards 7b-chat is nearest to 7b-base (mean of 1 and 3), then 72b, yi; glm is unknown.
    rows = [scored(NAMED[0], NAMED[1], 1), scored(NAMED[1], NAMED[0], 3)]
    rows += [scored(NAMED[0], NAMED[2], 4), scored(NAMED[3], NAMED[0], 9)]
    hard_by = "names" if by == "names" else write_jsonl(tmp_path / "scores.jsonl", rows)
    hard = tmp_path / "hard.jsonl"
    assert cli.run(["pair", source, "-o", str(hard), "-q", "--hard-by", hard_by]) == 0
    near = Counter(t["rejected_policy"] for t in read_jsonl(hard) if t["policy"] == NAMED[0])
    # Some 60 triples with this reference. Even would be 1/4 each. Half goes by nearness: by names
    # 1, 1/2, 1/4, 1/4 parts (two at one distance have one rank), by rewards 1, 1/2, 1/4 and none.
    parts = [1 / 2, 1 / 4, 1 / 8, 1 / 8] if by == "names" else [4 / 7, 2 / 7, 1 / 7, 0]
    for name, part in zip(NAMED[1:], parts, strict=True):
        assert near[name] / near.total() == pytest.approx((1 / 4 + part) / 2, abs=0.12)
    again = tmp_path / "again.jsonl"
    lines = Path(source).read_bytes().splitlines(keepends=True)
    Path(source).write_bytes(b"".join(lines[::-1]))
    assert cli.run(["pair", source, "-o", str(again), "-q", "--hard-by", hard_by]) == 0
    assert sorted(again.read_bytes().splitlines()) == sorted(hard.read_bytes().splitlines())


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ([scored("x", "y", 1)], 2, "knows none of the policies"),
        ([{"prompt": "p", "output": "o", "reward": 1.0}], 3, "s.jsonl:1: no `policy`"),
        ([scored("a", "b", 1) | {"rewards": [1.0]}], 3, "s.jsonl:1: no `rewards`"),
    ],
)
def test_scores_that_say_nothing_are_refused(rows, status, said, tmp_path, capfd):
    source = write_jsonl(tmp_path / "t.jsonl", trajectories(3, "ab"))
    out = tmp_path / "out.jsonl"
    found = write_jsonl(tmp_path / "s.jsonl", rows)
    assert cli.run(["pair", source, "-o", str(out), "--hard-by", found]) == status
    assert said in capfd.readouterr().err and not out.exists()


def test_held_out_prompts_are_those_of_convert_whatever_the_policies(tmp_path, capfd):
    records = trajectories(200, "abc")
    source = write_jsonl(tmp_path / "t.jsonl", records)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"prompt {n}"} for n in range(200)])
    share = ["--test-share", "0.1", "--force", "-q"]

    def kept(stage, path, *more):
        out = tmp_path / "out.jsonl"
        assert cli.run([stage, path, "-o", str(out), *share, *more]) == 0
        return {t["prompt"] for t in read_jsonl(out)}

    train, held = (kept("pair", source, "--split", part) for part in ("train", "test"))
    assert not train & held and len(train | held) == 200
    assert 8 <= len(held) <= 32  # 20 expected, a standard deviation is 4
    assert kept("pair", source, "--split", "test", "--exclude-policies", "a") == held
    assert kept("convert", prompts, "--split", "test") == held
    few = write_jsonl(tmp_path / "few.jsonl", trajectories(1, "ab"))
    assert cli.run(["pair", few, "--split", "test", "--test-share", "0"]) == 1
    assert "no prompt is in the test part" in capfd.readouterr().err


@pytest.fixture
def pool_file(tmp_path):
    records = trajectories(40, ["seen-a", "seen-b", "held-c"], category="qa")
    return write_jsonl(tmp_path / "t.jsonl", records)


def test_held_out_policies_are_excluded_and_required(tmp_path, pool_file):
    train, unseen = tmp_path / "train.jsonl", tmp_path / "unseen.jsonl"
    assert cli.run(["pair", pool_file, "-o", str(train), "--exclude-policies", "held-*"]) == 0
    assert cli.run(["pair", pool_file, "-o", str(unseen), "--require", "held-*"]) == 0
    whose = {t[k] for t in read_jsonl(train) for k in ("policy", "rejected_policy")}
    assert whose == {"seen-a", "seen-b"}
    made = read_jsonl(unseen)
    assert len(made) == 40
    assert all("held-c" in (t["policy"], t["rejected_policy"]) for t in made)
    assert {t["category"] for t in made} == {"qa"}


def test_the_report_says_what_was_not_paired_and_why(tmp_path, capfd):
    records = [
        *trajectories(10, "ab"),
        *[dict(r, id=f"lonely-{r['id']}") for r in trajectories(3, "a")],
        *[dict(r, id=f"single-{r['id']}") for r in trajectories(2, "ab", samples=1)],
        *[dict(r, id=f"same-{r['id']}", output="x") for r in trajectories(1, "ab")],
    ]
    out = tmp_path / "out.jsonl"
    assert cli.run(["pair", write_jsonl(tmp_path / "t.jsonl", records), "-o", str(out)]) == 0
    said = capfd.readouterr().err
    assert "10 triples from 16 prompts" in said
    assert "3 prompts with one policy" in said
    assert "2 prompts with single samples only" in said
    assert "1 prompts with identical texts" in said
    counts = json.loads(Path(f"{out}.manifest.json").read_bytes())["counts"]
    assert counts["prompts with one policy"] == 3
    assert sum(roles["reference"] for roles in counts["policies"].values()) == 10


def test_input_order_and_shards_change_no_triple(tmp_path, pool_file):
    lines = Path(pool_file).read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_bytes(b"".join(lines))
    made = {}
    for name, arguments in {
        "whole": [pool_file],
        "shuffled": [str(shuffled)],
        "shard0": [pool_file, "--shard", "0/2"],
        "shard1": [pool_file, "--shard", "1/2"],
    }.items():
        out = tmp_path / f"{name}.out.jsonl"
        assert cli.run(["pair", *arguments, "-o", str(out), "-q"]) == 0
        made[name] = sorted(out.read_bytes().splitlines())
    assert made["whole"] == made["shuffled"]
    assert made["shard0"] and made["shard1"]
    assert sorted(made["shard0"] + made["shard1"]) == made["whole"]


def test_an_interrupted_output_is_made_whole(tmp_path, pool_file, monkeypatch):
    from polarctl.stages import pair as stage

    monkeypatch.setattr(stage, "WINDOW_PROMPTS", 7)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert cli.run(["pair", pool_file, "-o", str(whole)]) == 0

    class Power(Exception):
        pass

    calls = []

    def failing(groups, pairing):
        calls.append(1)
        if len(calls) == 17:  # in the third window
            raise Power
        return pair(groups, pairing)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "pair", failing)
        with pytest.raises(Power):
            cli.run(["pair", pool_file, "-o", str(torn)])
    assert 0 < torn.stat().st_size < whole.stat().st_size
    assert cli.run(["pair", pool_file, "-o", str(torn)]) == 0
    assert torn.read_bytes() == whole.read_bytes()
    counts = [json.loads(Path(f"{f}.manifest.json").read_bytes())["counts"] for f in (whole, torn)]
    assert counts[0] == counts[1]


def test_a_pipe_carries_the_bytes_of_the_file(tmp_path, pool_file):
    out = tmp_path / "out.jsonl"
    assert cli.run(["pair", pool_file, "-o", str(out)]) == 0
    data = Path(pool_file).read_bytes()
    piped = subprocess.run([PROGRAM, "pair"], input=data, capture_output=True, check=True)
    assert piped.stdout == out.read_bytes()


@pytest.mark.parametrize(
    ("records", "arguments", "status", "said"),
    [
        (trajectories(3, "a"), [], 2, "every trajectory is by `a`: a triple needs two policies"),
        (trajectories(3, "ab"), ["--policies", "a"], 2, "every trajectory is by `a`"),
        (trajectories(3, "ab"), ["--exclude-policies", "*"], 2, "every trajectory is left out"),
        (trajectories(3, "ab"), ["--require", "z*"], 2, "`--require z*` fits no policy"),
        (trajectories(3, "ab", samples=1), [], 1, "3 prompts with single samples only"),
        (trajectories(1, "ab") + trajectories(1, "b"), [], 3, "t.jsonl:5: sample 0 of policy `b`"),
        (
            [*trajectories(1, "ab"), {**trajectories(1, "c")[0], "prompt": "other"}],
            [],
            3,
            "t.jsonl:5: id `p0` already names another prompt",
        ),
        ([*trajectories(1, "ab"), {"prompt": "x"}], [], 3, "t.jsonl:5: missing field `output`"),
    ],
)
def test_what_cannot_be_paired_is_one_clear_line(tmp_path, capfd, records, arguments, status, said):
    path = write_jsonl(tmp_path / "t.jsonl", records)
    assert cli.run(["pair", path, "-o", str(tmp_path / "out.jsonl"), *arguments]) == status
    error = capfd.readouterr().err
    assert said in error and "\nhint: " in error and "Traceback" not in error


def test_bad_rows_are_set_aside(tmp_path, capfd):
    records = [*trajectories(2, "ab"), {"prompt": "x"}, *trajectories(1, "a", samples=1)]
    path = write_jsonl(tmp_path / "t.jsonl", records)
    out, rejects = tmp_path / "out.jsonl", tmp_path / "rejects.jsonl"
    assert cli.run(["pair", path, "-o", str(out), "--rejects", str(rejects)]) == 0
    assert len(read_jsonl(out)) == 2
    reasons = [r["reason"] for r in read_jsonl(rejects)]
    assert "missing field" in reasons[0] and "there already" in reasons[1]


def test_further_negatives_are_of_other_policies_and_no_text_comes_twice():
    (triple,), _ = triples_of(trajectories(1, ["a", "b", "c"]), negatives=4, seed=5)
    policy = triple["policy"]
    others = {f"{name} {i} of 0" for name in {"a", "b", "c"} - {policy} for i in range(2)}
    # Two other policies with two samples each: the rejected one and three further ones.
    assert {triple["rejected"], *triple["negatives"]} == others
    assert len(triple["negatives"]) == 3
    (fewer,), _ = triples_of(trajectories(1, ["a", "b", "c"]), negatives=2, seed=5)
    assert fewer["negatives"] == triple["negatives"][:1]
    (bare,), _ = triples_of(trajectories(1, ["a", "b", "c"]), seed=5)
    assert "negatives" not in bare and bare["rejected"] == triple["rejected"]
