"""The pool file: JSONL and YAML, patterns, and what is refused with its place."""

import json

import pytest

from polarctl.errors import MissingError, UsageError
from polarctl.policies.pool import Policy, Sampling, read_pool

DEFAULT = Policy(name="", model="", sampling=Sampling(top_k=7), samples=3)


@pytest.fixture
def models(tmp_path):
    """Model folders: one, and some checkpoints of a run beside a folder that is none."""
    for name in ("a", "run/step-9", "run/step-10", "run/step-100"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "run/step-logs").mkdir()
    return tmp_path


def test_yaml_and_jsonl_say_the_same(models):
    lines = [
        {"policy": "one", "model": "a", "kind": "base", "top_p": 0.5, "group": "g"},
        {"policy": "two", "model": "a", "backend": "vllm", "engine": {"max_model_len": 64}},
        {"policy": "three", "model": "m", "backend": "openai", "url": "http://x", "kind": "chat"},
        {"policy": "four", "model": "org/name", "revision": "v1", "dtype": "float16"},
    ]
    (models / "pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (models / "pool.yaml").write_text(
        """# Four policies
- {policy: one, model: a, kind: base, top_p: 0.5, group: g}
- policy: two
  model: a
  backend: vllm
  engine:
    max_model_len: 64
- {policy: three, model: m, backend: openai, url: "http://x", kind: chat}
- {policy: four, model: org/name, revision: v1, dtype: float16}
"""
    )
    pools = [read_pool(str(models / name), DEFAULT) for name in ("pool.jsonl", "pool.yaml")]
    assert [p.identity() for p in pools[0]] == [p.identity() for p in pools[1]]
    assert [p.where.rpartition(":")[2] for p in pools[1]] == ["2", "3", "8", "9"]
    one, two, three, four = pools[1]
    assert one.sampling == Sampling(top_p=0.5, top_k=7) and one.samples == 3 and one.group == "g"
    assert one.model == str(models / "a")  # seen from the pool's folder
    assert (two.backend, two.engine) == ("vllm", {"max_model_len": 64})
    assert (three.url, three.kind) == ("http://x", "chat")
    assert (four.revision, four.dtype) == ("v1", "float16")


def test_a_plain_policy_is_known_by_what_it_was_known_by_before(models):
    """An interrupted run of an older pool goes on: nothing is added to the identity."""
    (models / "pool.jsonl").write_text('{"policy": "one", "model": "a"}\n')
    (policy,) = read_pool(str(models / "pool.jsonl"), DEFAULT)
    assert len(policy.identity()) == 5 and policy.identity()[2:] == [None, [1.0, 0.9, 7, 4096], 3]


def test_another_weight_is_another_run(models):
    identities = []
    for weight in ("", ', "weight": 1', ', "weight": 0.5', ', "weight": 0.25'):
        (models / "pool.jsonl").write_text(f'{{"policy": "one", "model": "a"{weight}}}\n')
        (policy,) = read_pool(str(models / "pool.jsonl"), DEFAULT)
        identities.append(policy.identity())
        assert policy.facts().get("weight", 1) == policy.weight
    assert identities[0] == identities[1]
    assert [identities.count(one) for one in identities] == [2, 2, 1, 1]


def test_a_pattern_is_a_policy_for_each_checkpoint_in_the_order_of_their_numbers(models):
    (models / "pool.yaml").write_text("- {policy: run, model: run/step-*, group: mine}\n")
    found = read_pool(str(models / "pool.yaml"), DEFAULT)
    assert [p.name for p in found] == ["run-step-9", "run-step-10", "run-step-100"]
    assert [p.model for p in found] == [
        str(models / "run" / name) for name in ("step-9", "step-10", "step-100")
    ]
    assert {p.group for p in found} == {"mine"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {policy: p, model: a, temprature: 1}\n", ":1: object contains unknown field `temprat"),
        ("\n- policy: p\n  model: a\n- policy: q\n", ":4: missing field `model`"),
        ("- {policy: p, model: a, top_p: 0}\n", ":1: field `top_p`"),
        ("- {policy: p, model: a}\n- 3\n", ":2: an entry that is no mapping"),
        ("policy: p\nmodel: a\n", "pool.yaml: must be a list of policies"),
        ("- {policy: p, policy: q, model: a}\n", ":1: `policy` is given twice"),
        ("- {policy: p, model: a}\n- {policy: p, model: a}\n", ":2: policy `p` is named twice"),
        ("- {policy: run, model: run/nothing-*}\n", ":1: run/nothing-*: matches no model folder"),
        ("- {policy: p, model: m, backend: openai, kind: base}\n", "`openai` needs a `url`"),
        ('- {policy: p, model: m, backend: openai, url: "http://x"}\n', "needs a `kind`"),
        ('- {policy: p, model: a, url: "http://x"}\n', ":1: `url` has no effect with backend `tra"),
        ("- {policy: p, model: a, engine: {a: 1}}\n", ":1: `engine` has no effect with backend"),
        ("- {policy: p, model: a, revision: v1}\n", ":1: `revision` is of a Hub id"),
        ("- {policy: p, model: a, backend: vllm, temperature: 0.001}\n", "temperature of 0.01 at"),
        ("- {policy: p, model: a, backend: vllm, engine: {hf_token: x}}\n", "a secret would be in"),
        ("- {policy: p, model: a, weight: 0}\n", ":1: field `weight`"),
        ("- {policy: p, model: a}\n- {policy: q, model: a, weight: 1.5}\n", ":2: field `weight`"),
        ("- {policy: p, model: a, weight: -0.5}\n", ":1: field `weight`"),
        ("- {policy: p, model: a, weight: half}\n", ":1: field `weight`"),
        ("- {policy: p, model: a, backend: sglang}\n", ":1: field `backend`: invalid enum"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_refused_with_its_place(models, text, said):
    (models / "pool.yaml").write_text(text)
    with pytest.raises((UsageError, MissingError)) as caught:
        read_pool(str(models / "pool.yaml"), DEFAULT)
    assert said in str(caught.value) and str(models / "pool.yaml") in str(caught.value)
