import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarctl.errors import RecordError
from polarctl.formats import groups

FAST = settings(max_examples=50, deadline=None)


def group_of(*labels, **fields):
    candidates = [
        {"name": f"p{place}", "output": f"text {place}", "label": label}
        for place, label in enumerate(labels)
    ]
    return {"prompt": "Q", **fields, "candidates": candidates}


def outputs(triple):
    return tuple(triple[name][-1] for name in ("reference", "chosen", "rejected"))


def test_every_pair_of_a_group_becomes_a_triple_with_the_groups_reference():
    made = groups.triples(group_of(0, 1, 1, reference="R", id="q1", level="easy"))
    assert made == [
        {
            "prompt": "Q",
            "reference": "R",
            "chosen": f"text {good}",
            "rejected": "text 0",
            "policy": f"p{good}",
            "rejected_policy": "p0",
            "id": "q1",
            "level": "easy",
        }
        for good in (1, 2)
    ]


def test_equal_or_unknown_labels_make_no_triple():
    assert groups.triples(group_of(1, 1, 1, reference="R")) == []
    assert groups.triples(group_of(None, None, 1, reference="R")) == []
    assert groups.triples(group_of(2, 2, 1)) == []


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        # labels 3 2 1 0 are the ranks 0 1 2 3; a triple is reference > chosen > rejected
        ("all", ["012", "013", "023", "123"]),
        ("adjacent", ["012", "123"]),
        ("top", ["012", "013", "023"]),
    ],
)
def test_a_ranking_without_a_reference_gives_triples_a_b_c(ranked, expected):
    made = groups.triples(group_of(3, 2, 1, 0), ranked)
    assert ["".join(outputs(triple)) for triple in made] == expected
    assert made[0]["policy"] == "p1" and made[0]["rejected_policy"] == "p2"


@FAST
@given(st.lists(st.integers(0, 4), min_size=3, max_size=7))
def test_ranked_triples_are_those_of_the_definition(labels):
    size = range(len(labels))
    want = {
        (a, b, c) for a in size for b in size for c in size if labels[a] > labels[b] > labels[c]
    }
    made = [tuple(map(int, outputs(t))) for t in groups.triples(group_of(*labels))]
    assert set(made) == want and len(made) == len(want)
    top = {triple for triple in want if labels[triple[0]] == max(labels)}
    assert {tuple(map(int, outputs(t))) for t in groups.triples(group_of(*labels), "top")} == top


def test_two_candidates_without_a_reference_are_refused_with_the_way_out():
    with pytest.raises(RecordError, match="fewer than three") as caught:
        groups.triples(group_of(1, 0))
    assert "--map reference=FIELD" in caught.value.hint


@pytest.mark.parametrize("record", [{"prompt": "Q"}, {"prompt": "Q", "output": "A"}])
def test_a_record_without_a_comparison_gives_no_triples_but_an_error(record):
    with pytest.raises(RecordError, match="neither `candidates` nor"):
        groups.triples(record)


def test_a_triple_goes_to_a_group_and_back():
    triple = {
        "prompt": [{"role": "user", "content": "Q"}],
        "reference": "R",
        "chosen": "C",
        "rejected": "D",
        "policy": "big",
        "rejected_policy": "small",
        "wrapper": "pretrain",
        "source": {"file": 1},
    }
    made = groups.group(triple)
    assert made["candidates"] == [
        {"name": "big", "output": "C", "label": 1},
        {"name": "small", "output": "D", "label": 0},
    ]
    groups.check_native(made)
    assert groups.triples(made) == [triple]


def test_prompts_drop_the_candidates_and_keep_the_rest():
    assert groups.prompt(group_of(1, 0, reference="R", level=3)) == {
        "prompt": "Q",
        "reference": "R",
        "level": 3,
    }


@FAST
@given(st.text(max_size=8), st.integers(0, 5), st.floats(0, 1))
def test_the_part_depends_on_the_prompts_text_alone(text, seed, share):
    part = groups.part_of({"prompt": text, "id": "a"}, share, seed)
    messages = [{"role": "user", "content": f"  {text}\n"}]
    assert groups.part_of({"prompt": messages, "id": "b", "output": "x"}, share, seed) == part
    assert groups.part_of({"prompt": text}, 0.0, seed) == "train"
    assert groups.part_of({"prompt": text}, 1.0, seed) == "test"


def test_the_parts_are_stable_and_have_the_share_asked_for():
    parts = [groups.part_of({"prompt": f"question {i}"}, 0.3, 0) for i in range(2000)]
    # binomial: 600 expected, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5
    assert 540 < parts.count("test") < 660
    assert [groups.part_of({"prompt": f"question {i}"}, 0.3, 1) for i in range(2000)] != parts
    assert "".join(part[1] for part in parts[:12]) == "rerrrerrrrrr"  # tRain, tEst: pinned
