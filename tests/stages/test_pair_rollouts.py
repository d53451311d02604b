"""`polarctl pair --from-rollouts`: what a policy did right over what it did wrong."""

import json
import random
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarctl import cli
from polarctl.policies.labelling import Labelling, Rollouts
from polarctl.records import Record, Triple, check
from polarctl.stages.pair import pair


def rollout(output, check=None, prompt="p", step=1, sample=0, **more):
    record = {
        "id": prompt,
        "prompt": f"prompt {prompt}",
        "reference": f"the reference of {prompt}",
        "output": output,
        "policy": "start",
        "wrapper": "sft",
        "step": step,
        "sample": sample,
        "reward": -1.5,
        **more,
    }
    return record if check is None else {**record, "check": check}


def labels(records, name="check", **options):
    rollouts = Rollouts(name, by_step=options.get("rule") == "rank")
    for record in records:
        rollouts.add(Record(dict(record)))
    rollouts.finish()
    labelling = Labelling(**options)
    return list(pair(rollouts, labelling)), labelling


def roles(triple):
    return triple["chosen"], triple["rejected"]


def command(tmp_path, records, *more):
    path, out = tmp_path / "rollouts.jsonl", tmp_path / "labels.jsonl"
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    status = cli.run(["pair", str(path), "--from-rollouts", "-o", str(out), *more])
    rows = [orjson.loads(line) for line in out.read_bytes().splitlines()] if out.exists() else None
    return status, rows


def test_a_right_rollout_in_other_words_is_chosen_over_a_wrong_one():
    (triple,), _ = labels(
        [
            rollout("right, in other words", 1),
            rollout(" the reference  of p\n", 1),  # a copy but for its spacing
            rollout("wrong", 0),
        ]
    )
    assert triple == {
        "id": "p",
        "prompt": "prompt p",
        "reference": "the reference of p",
        "chosen": "right, in other words",
        "rejected": "wrong",
        "wrapper": "sft",
        "policy": "start",
        "rejected_policy": "start",
    }


@pytest.mark.parametrize("copies", [0, 1])
def test_without_a_right_rollout_another_accepted_text_is_chosen(copies):
    records = [rollout("wrong", 0)] + copies * [rollout("the reference of p", 1)]
    for record in records:
        record["accept"] = ["the reference of p", "so it is"]
    (triple,), labelling = labels(records)
    assert roles(triple) == ("so it is", "wrong") and "policy" not in triple
    assert labelling.counts["chosen is another accepted text"] == 1


def test_with_nothing_else_the_reference_is_chosen_or_the_prompt_left_out():
    records = [rollout("wrong", 0), rollout("wrong too", 0)]
    (triple,), _ = labels(records)
    assert triple["chosen"] == triple["reference"] == "the reference of p"
    made, labelling = labels(records, keep_copies=False)
    assert made == [] and labelling.counts["prompts without a right rollout"] == 1


def test_every_mistake_comes_once_before_one_comes_again():
    # 2 right and 3 wrong texts make 6 triples; the first 3 have the 3 mistakes.
    records = [rollout(f"right {i}", 1) for i in range(2)]
    records += [rollout(f"wrong {i}", 0, step=s) for i in range(3) for s in range(4)]
    made, _ = labels(records, per_prompt=99)
    pairs = [roles(t) for t in made]
    assert len(pairs) == len(set(pairs)) == 6
    for start in (0, 3):
        assert {rejected for _, rejected in pairs[start : start + 3]} == {
            "wrong 0",
            "wrong 1",
            "wrong 2",
        }
    few, labelling = labels(records, per_prompt=4)
    assert few == made[:4]
    assert labelling.counts["triples"] == labelling.counts["chosen is a right rollout"] == 4


def test_what_says_nothing_is_left_out():
    made, labelling = labels(
        [
            rollout("", 0, floored="empty"),  # never scored by the reward model
            rollout("who knows"),  # no check
            rollout("both", 0),
            rollout("both ", 1),
            rollout("the reference of p", 0),  # a wrong check: a copy of the reference is right
            rollout("wrong", 0, prompt="q"),
            rollout("right", 1, prompt="r"),
        ]
    )
    assert [t["id"] for t in made] == ["q"]
    assert labelling.counts["texts with labels of both kinds"] == 1
    assert labelling.counts["prompts without a wrong rollout"] == 2


def test_further_negatives_are_other_wrong_texts():
    records = [rollout("right", 1)] + [rollout(f"wrong {i}", 0) for i in range(3)]
    (triple,), _ = labels(records, negatives=9)
    assert {triple["rejected"], *triple["negatives"]} == {"wrong 0", "wrong 1", "wrong 2"}
    check(triple, Triple)


def test_two_references_of_one_prompt_stay_apart():
    records = [
        rollout(f"{what} of {name}", ok, reference=name)
        for name in "ab"
        for what, ok in (("right", 1), ("wrong", 0))
    ]
    made, _ = labels(records)
    assert [(t["reference"], *roles(t)) for t in made] == [
        ("a", "right of a", "wrong of a"),
        ("b", "right of b", "wrong of b"),
    ]


def test_rank_takes_the_highest_over_the_lowest_of_a_step():
    # Step 1: 3 over -4; step 2: 5 over 4.5, half a point apart; a copy of the reference takes no
    # part, nor does a step whose rollouts are equal.
    records = [rollout(t, reward=r) for t, r in (("a", 3), ("b", -4), ("c", 0))]
    records += [rollout("the reference of p", reward=9)]
    records += [rollout(t, reward=r, step=2) for t, r in (("d", 5), ("e", 4.5))]
    records += [rollout(t, reward=1, step=3) for t in "fg"]
    options = {"name": "reward", "rule": "rank", "per_prompt": 9}
    made, _ = labels(records, **options)
    assert sorted(map(roles, made)) == [("a", "b"), ("d", "e")]
    made, _ = labels(records, **options, gap=1, negatives=3)
    assert list(map(roles, made)) == [("a", "b")] and made[0]["negatives"] == ["c"]
    made, labelling = labels(records, **options, gap=8)
    assert made == []
    assert labelling.counts["prompts without two rollouts far enough apart"] == 1


RECORD = st.builds(
    rollout,
    st.sampled_from(["a", "b ", " b", "c", "d", "the reference of p"]),
    st.sampled_from([None, 0, 0.5, 1]),
    st.sampled_from("pq"),
    st.integers(1, 3),
    reward=st.sampled_from([-1.0, 0.0, 2.0]),
)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(RECORD, max_size=24),
    st.integers(1, 9),
    st.sampled_from(["threshold", "rank"]),
    st.randoms(use_true_random=False),
)
def test_the_order_changes_nothing_and_no_triple_contradicts_the_labels(
    records, per_prompt, rule, rng
):
    name = "check" if rule == "threshold" else "reward"
    made, _ = labels(records, name, rule=rule, per_prompt=per_prompt)
    shuffled = list(records)
    rng.shuffle(shuffled)
    again, _ = labels(shuffled, name, rule=rule, per_prompt=per_prompt)
    assert sorted(map(orjson.dumps, made)) == sorted(map(orjson.dumps, again))
    for prompt in "pq":
        mine = [t for t in made if t["id"] == prompt]
        assert len(mine) <= per_prompt
        assert len({orjson.dumps(roles(t)) for t in mine}) == len(mine)
        for triple in mine:
            assert triple["chosen"].split() != triple["rejected"].split()
            if rule == "rank":
                continue
            got = {
                r["check"]
                for r in records
                if r["id"] == prompt
                and r["output"].split() == triple["rejected"].split()
                and "check" in r
            }
            assert got == {0}


# -- the command ----------------------------------------------------------------------------------


def mixed(prompts=6):
    return [
        rollout(f"{what} {s} of {i}", ok, prompt=f"p{i}", sample=s, components={"exact": 1 - ok})
        for i in range(prompts)
        for s in range(2)
        for what, ok in (("right", 1), ("wrong", 0))
    ]


def test_the_command_says_what_it_made_of_what(tmp_path, capfd):
    records = [*mixed(3), rollout("who knows"), rollout("x", 0, floored="cut_off")]
    status, rows = command(tmp_path, records, "--triples-per-prompt", "2")
    assert status == 0 and len(rows) == 6
    said = capfd.readouterr().err
    assert "6 triples from 14 rollouts of 4 prompts, by `check`" in said
    assert "none for 1 prompts without a label" in said
    assert "6: chosen is a right rollout" in said
    assert "left out: 1 rollouts without a label" in said
    assert "left out: 1 rollouts without an answer" in said
    counts = json.loads((tmp_path / "labels.jsonl.manifest.json").read_bytes())["counts"]
    assert counts["chosen is a right rollout"] == 6


def test_labels_come_from_a_field_or_a_component(tmp_path):
    _, by_check = command(tmp_path, mixed())
    assert all(t["rejected"].startswith("wrong") for t in by_check)
    status, turned = command(tmp_path, mixed(), "--label-by", "exact", "--force")
    assert status == 0 and all(t["rejected"].startswith("right") for t in turned)
    records = [{**r, "grade": 7 if r["check"] else 6.5} for r in mixed()]
    more = ("--label-by", "grade", "--threshold", "7", "--force")
    assert command(tmp_path, records, *more) == (0, by_check)
    status, ranked = command(tmp_path, records, "--label-by", "grade", "--rule", "rank", "--force")
    assert status == 0 and len(ranked) == 6
    assert all(t["rejected"].startswith("wrong") for t in ranked)


@pytest.mark.parametrize(
    ("records", "more", "expected"),
    [
        # Every check is 0, so nothing is right but the reference.
        (
            [rollout("wrong", 0), rollout("wrong too", 0)],
            (),
            {("the reference of p", "wrong"), ("the reference of p", "wrong too")},
        ),
        # Rewards of which the sum is 0.
        (
            [rollout("high", reward=2.0), rollout("low", reward=-2.0)],
            ("--rule", "rank"),
            {("high", "low")},
        ),
    ],
)
def test_numbers_that_add_up_to_nothing_are_numbers(tmp_path, records, more, expected):
    status, rows = command(tmp_path, records, "--triples-per-prompt", "2", *more)
    assert status == 0 and set(map(roles, rows)) == expected


def test_rollouts_that_contradict_others_are_set_aside_and_not_counted(tmp_path, capfd):
    records = [rollout("right", 1), {**rollout("x", 0), "prompt": "another"}, rollout("wrong", 0)]
    rejects = tmp_path / "rejects.jsonl"
    status, rows = command(tmp_path, records, "--rejects", str(rejects))
    assert status == 0 and list(map(roles, rows)) == [("right", "wrong")]
    (bad,) = map(orjson.loads, rejects.read_bytes().splitlines())
    assert bad["where"].endswith("rollouts.jsonl:2") and orjson.loads(bad["record"]) == records[1]
    assert "1 triples from 2 rollouts of 1 prompts" in capfd.readouterr().err


def test_labels_come_from_a_verifier_where_the_rollouts_have_none(tmp_path, capfd):
    records = [
        rollout(text, accept=["It is 7.", "The sum is 7."], prompt=p, **more)
        for p, more in (("p", {}), ("q", {"components": {"exact:accept": 1.0}}))
        for text in ("It is 7.", "It is 8.")
    ]
    status, rows = command(tmp_path, records, "--label-by", "exact:accept")
    assert status == 0 and list(map(roles, rows)) == [("It is 7.", "It is 8.")]
    # The number of `q` that its run wrote counts; both of its rollouts got 1.
    assert "none for 1 prompts without a wrong rollout" in capfd.readouterr().err
    assert command(tmp_path, records, "--label-by", "regex:(", "--force")[0] == 2
    assert "`regex:(`" in capfd.readouterr().err


def test_order_files_and_shards_change_no_triple(tmp_path):
    records, made = mixed(), {}
    shuffled = random.Random(0).sample(records, len(records))
    for name, rows, more in (
        ("whole", records, ()),
        ("shuffled", shuffled, ()),
        ("half", records, ("--shard", "0/2")),
        ("other", records, ("--shard", "1/2")),
    ):
        (tmp_path / name).mkdir()
        status, found = command(tmp_path / name, rows, *more)
        assert status == 0
        made[name] = sorted(map(orjson.dumps, found))
    assert made["whole"] == made["shuffled"] == sorted(made["half"] + made["other"])
    assert made["half"] and made["other"]


@pytest.mark.parametrize(
    ("records", "more", "status", "said"),
    [
        (mixed(), ["--label-by", "exct"], 2, "no rollout has a number `exct`"),
        ([rollout("a")], [], 2, "no rollout has a number `check` (--label-by)"),
        ([rollout("a", 1)], [], 1, "1 prompts without a wrong rollout"),
        (mixed(), ["--require", "x"], 2, "`--require` has no effect here"),
        (mixed(), ["--equal-chosen", "resample"], 2, "is for samples of policies"),
        ([{**rollout("a", 1), "accept": 3}], [], 3, "field `accept`: expected a text or a list"),
        (
            [{k: v for k, v in rollout("a", 1).items() if k != "reference"}],
            [],
            3,
            "rollouts.jsonl:1: missing field `reference`",
        ),
        (
            [rollout("a", 1), {**rollout("b", 0), "prompt": "other"}],
            [],
            3,
            "rollouts.jsonl:2: id `p` already names another prompt",
        ),
    ],
)
def test_what_cannot_be_labelled_is_one_clear_line(tmp_path, capfd, records, more, status, said):
    assert command(tmp_path, records, *more)[0] == status
    error = capfd.readouterr().err
    assert said in error and "\nhint: " in error and "Traceback" not in error


def test_a_dry_run_sees_bad_rollouts_and_a_missing_number(tmp_path, capfd):
    bad = [rollout("a", 1), {**rollout("b", 0), "prompt": "other"}]
    assert command(tmp_path, bad, "--dry-run") == (3, None)
    assert "already names another prompt" in capfd.readouterr().err
    assert command(tmp_path, [rollout("a")], "--dry-run") == (2, None)
    assert "no rollout has a number `check`" in capfd.readouterr().err
    assert not Path(tmp_path / "labels.jsonl").exists()
