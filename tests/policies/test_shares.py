"""Which policies answer which prompts."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import orjson
import pytest

from polarctl import cli
from polarctl.policies.pool import Policy
from polarctl.policies.shares import by_kind, in_words, joined, lots
from polarctl.stages import sample as stage

IDS = [f"q{number}" for number in range(20_000)]


def pool(*weights):
    return [Policy(name=f"p{n}", model="m", weight=w) for n, w in enumerate(weights)]


@pytest.mark.parametrize(
    ("weights", "numbers"),
    [
        ([0.5], {0, 1}),
        ([0.5, 0.3, 0.2, 0.7], {1, 2}),  # 1.7
        ([0.25, 0.75, 0.5, 0.5], {2}),
        ([1 / 3] * 6, {2}),
        ([2 / 53] * 53, {2}),
        ([0.01, 0.02], {0, 1}),
        ([0.999, 0.999], {1, 2}),
    ],
)
def test_every_policy_has_its_share_and_every_prompt_its_number(weights, numbers):
    drawn = lots(IDS, pool(*weights), seed=0)
    for column, weight in enumerate(weights):
        deviation = (weight * (1 - weight) / len(IDS)) ** 0.5
        assert drawn[:, column].mean() == pytest.approx(weight, abs=4.5 * deviation)
    assert set(drawn.sum(axis=1).tolist()) == numbers


def test_every_pair_of_equal_policies_is_as_likely():
    pairs = Counter(tuple(np.flatnonzero(row)) for row in lots(IDS, pool(*[1 / 3] * 6), seed=3))
    expected = len(IDS) / 15
    assert set(pairs) == set(itertools.combinations(range(6), 2))
    # Chi-square with 14 degrees of freedom: 36.1 is exceeded once in 1,000 times.
    assert sum((count - expected) ** 2 / expected for count in pairs.values()) < 36.1


def test_order_company_and_number_of_prompts_do_not_matter():
    policies = pool(0.5, 0.3, 0.9, 0.05)
    drawn = lots(IDS[:500], policies, seed=7)
    assert (lots(IDS[100:140], policies, seed=7) == drawn[100:140]).all()
    assert (lots(IDS[:500], policies, seed=8) != drawn).any()
    order = [2, 0, 3, 1]
    moved = lots(IDS[:500], [policies[n] for n in order], seed=7)
    assert (moved == drawn[:, order]).all()


@pytest.mark.parametrize(
    ("weights", "number"),
    [([0.0152672] * 131, "2 of 131"), ([0.5, 0.5, 0.7], "1 or 2 of 3"), ([0.25], "0 or 1 of 1")],
)
def test_the_number_of_policies_of_a_prompt_is_told(weights, number):
    policies = [*pool(*weights), Policy(name="all", model="m")]
    (line,) = in_words(by_kind(policies, lambda policy: "pretrain"))
    assert line == f"weights: a prompt has {number} base policies with a weight"


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ([], []),
        ([0, 0], []),
        ([4, 4], [(0, 1), (1, 2)]),
        ([2, 1, 3, 0, 1], [(0, 3), (3, 5)]),
        ([0, 5, 0], [(0, 2)]),
        ([1, 1, 1], [(0, 3)]),
    ],
)
def test_windows_are_joined_until_there_is_enough_to_do(counts, found):
    assert joined(counts, 4) == [range(*each) for each in found]


def test_a_run_gives_each_policy_its_share_by_kind(tmp_path, tiny_lm, tiny_chat_lm, monkeypatch):
    """Two base and two chat policies of weight 0.5, and a base policy that answers everything."""
    monkeypatch.setattr(stage, "WINDOW_ROWS", 8)
    rows = [
        {"policy": "all", "model": str(tiny_lm), "samples": 1},
        {"policy": "b1", "model": str(tiny_lm), "weight": 0.5},
        {"policy": "c1", "model": str(tiny_chat_lm), "weight": 0.5},
        {"policy": "b2", "model": str(tiny_lm), "weight": 0.5},
        {"policy": "c2", "model": str(tiny_chat_lm), "weight": 0.5},
    ]
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    wrappers = [{}, {"wrapper": "pretrain"}, {"wrapper": "sft"}]
    asked = [{"prompt": f"Text {n} is", "id": f"t{n}", **wrappers[n % 3]} for n in range(60)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, asked)))
    command = ["sample", str(tmp_path / "in.jsonl"), "--pool", str(tmp_path / "pool.jsonl"), "-q"]
    command += ["--max-new-tokens", "6", "--no-clean", "--samples", "2"]
    found = {}
    for name, more in {"whole": [], "0": ["--shard", "0/2"], "1": ["--shard", "1/2"]}.items():
        out = tmp_path / f"{name}.jsonl"
        assert cli.run([*command, "-o", str(out), *more]) == 0
        found[name] = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    who = defaultdict(set)
    for record in found["whole"]:
        who[record["id"]].add(record["policy"])
    for prompt in asked:
        policies = who[prompt["id"]]
        wrapper = prompt.get("wrapper")
        base, chat = len(policies & {"b1", "b2"}), len(policies & {"c1", "c2"})
        assert base == (wrapper != "sft") and chat == (wrapper != "pretrain")
        assert ("all" in policies) == (wrapper != "sft")
    for policy in ("b1", "b2", "c1", "c2"):
        assert 8 <= sum(policy in policies for policies in who.values()) <= 32  # of 40
    key = lambda record: (record["policy"], record["id"], record["sample"])  # noqa: E731
    assert sorted(found["0"] + found["1"], key=key) == sorted(found["whole"], key=key)


def test_a_prompt_that_a_policy_is_not_asked_need_not_fit_it(tmp_path, tiny_lm, capfd):
    rows = [{"policy": f"p{n}", "model": str(tiny_lm), "weight": 0.001} for n in range(2)]
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    (tmp_path / "in.jsonl").write_bytes(orjson.dumps({"prompt": "xyz " * 200, "id": "long"}))
    out = str(tmp_path / "out.jsonl")
    command = ["sample", str(tmp_path / "in.jsonl"), "-o", out]
    assert cli.run([*command, "--pool", str(tmp_path / "pool.jsonl")]) == 0
    assert Path(out).read_bytes() == b""
    assert "no prompt of the input was for `p0`, `p1`" in capfd.readouterr().err
