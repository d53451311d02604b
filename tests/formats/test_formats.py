import ast
import functools
import importlib.util
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polarctl.errors import RecordError, UsageError
from polarctl.formats.comparisons import extract_prompt
from polarctl.formats.groups import check_native, group, triples
from polarctl.formats.table import FORMATS, detect, readable, require, writable
from polarctl.model.template import content_text

FAST = settings(max_examples=40, deadline=None)
PLAIN = st.text("ab 1\né我", min_size=1, max_size=6)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def read(name, row, answer="reference"):
    record = FORMATS[name].read(row, answer)
    check_native(record)
    return record


def write(name, record):
    return FORMATS[name].write(record)


# -- one hand-made row per format ----------------------------------------------------------------


def test_trl_with_an_explicit_prompt_and_no_reference_is_a_group():
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 2}
    assert read("trl", row) == {
        "prompt": "Q",
        "candidates": [{"output": "good", "label": 1}, {"output": "bad", "label": 0}],
        "margin": 2,
    }


def test_trl_with_a_reference_is_a_triple():
    row = {"prompt": [user("Q")], "chosen": [said("g")], "rejected": [said("b")], "reference": "R"}
    assert read("trl", row) == row


def test_trl_implicit_conversation():
    talk = [user("Q1"), said("A1"), user("Q2")]
    row = {"chosen": [*talk, said("g")], "rejected": [*talk, said("b")], "reference": "R"}
    assert read("trl", row) == {
        "prompt": talk,
        "chosen": [said("g")],
        "rejected": [said("b")],
        "reference": "R",
    }
    # Some data sets repeat the prompt as a string: the conversation decides, as in TRL.
    assert read("trl", {**row, "prompt": "Q1"}) == read("trl", row)
    # An explicit prompt whose answers are single messages stays as it is.
    plain = {"prompt": "Q", "chosen": [said("g")], "rejected": [said("b")], "reference": "R"}
    assert read("trl", plain) == plain


def test_trl_implicit_strings_follow_trl():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green.", "reference": "R"}
    assert read("trl", row) == {
        "prompt": "The sky is",
        "chosen": " blue.",
        "rejected": " green.",
        "reference": "R",
    }


def test_trl_completions_are_answers_and_labelled_ones_candidates():
    assert read("trl", {"prompt": "Q", "completion": "A"}) == {"prompt": "Q", "reference": "A"}
    assert read("trl", {"prompt": "Q", "completion": "A", "label": True}) == {
        "prompt": "Q",
        "output": "A",
        "label": True,
    }


def test_the_last_assistant_message_of_openai_is_the_reference_or_the_output():
    row = {"messages": [user("Q"), said("A"), user("Q2"), said("A2")], "source": "x"}
    prompt = [user("Q"), said("A"), user("Q2")]
    assert read("openai", row) == {"prompt": prompt, "reference": [said("A2")], "source": "x"}
    assert read("openai", row, "output")["output"] == [said("A2")]
    own = read("openai", {**row, "reference": "R"})
    assert (own["reference"], own["output"]) == ("R", [said("A2")])
    # A conversation that the user ends is a prompt.
    assert read("openai", {"messages": [user("Q")]}) == {"prompt": [user("Q")]}


def test_sharegpt_conversation_with_a_system_field():
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert read("sharegpt", {"conversations": turns, "system": "S", "tools": "[]"}) == {
        "prompt": [{"role": "system", "content": "S"}, user("Q")],
        "reference": [said("A")],
        "tools": "[]",
    }


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: t["value"]])
def test_sharegpt_preference(wrap):
    good, bad = {"from": "gpt", "value": "g"}, {"from": "gpt", "value": "b"}
    row = {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": wrap(good),
        "rejected": wrap(bad),
    }
    record = read("sharegpt", row)
    assert record["prompt"] == [user("Q")]
    assert [(content_text(c["output"]), c["label"]) for c in record["candidates"]] == [
        ("g", 1),
        ("b", 0),
    ]


def test_nemo_ranks_become_labels_and_three_of_them_a_triple():
    completions = [
        {"rank": 2, "completion": [said("worst")]},
        {"rank": 0, "completion": [said("best")]},
        {"rank": 1, "completion": [said("middle")]},
    ]
    record = read("nemo", {"context": [user("Q")], "completions": completions, "domain": "code"})
    assert [c["label"] for c in record["candidates"]] == [0, 2, 1]
    assert triples(record) == [
        {
            "prompt": [user("Q")],
            "reference": [said("best")],
            "chosen": [said("middle")],
            "rejected": [said("worst")],
            "domain": "code",
        }
    ]


def test_llama_factory_prompt_of_all_its_fields():
    row = {
        "instruction": "Add",
        "input": "3 and 4",
        "system": "S",
        "history": [["Q0", "A0"]],
        "chosen": "7",
        "rejected": "8",
        "reference": "seven",
    }
    assert read("llama-factory", row) == {
        "prompt": [
            {"role": "system", "content": "S"},
            user("Q0"),
            said("A0"),
            user("Add\n3 and 4"),
        ],
        "chosen": "7",
        "rejected": "8",
        "reference": "seven",
    }


def test_llama_factory_answers():
    assert read("llama-factory", {"instruction": "Q", "input": "", "output": "A"}) == {
        "prompt": "Q",
        "reference": "A",
    }
    ranked = read("llama-factory", {"instruction": "Q", "output": ["best", "middle", "worst"]})
    assert [c["label"] for c in ranked["candidates"]] == [2, 1, 0]


def test_gsm8k_and_its_published_model_solutions():
    assert read("gsm8k", {"question": "Q", "answer": "A"}) == {"prompt": "Q", "reference": "A"}
    row = {
        "question": "Q",
        "ground_truth": "A",
        "6b": {"solution": "wrong", "is_correct": False},
        "175b": {"solution": "right", "is_correct": True},
        "note": {"solution": "no policy"},
    }
    record = read("gsm8k-solutions", row)
    assert len(record.pop("id")) == 16
    assert record == {
        "prompt": "Q",
        "reference": "A",
        "candidates": [
            {"name": "6b", "output": "wrong", "label": 0},
            {"name": "175b", "output": "right", "label": 1},
        ],
        "note": {"solution": "no policy"},
    }


def test_verl_rows_have_the_shape_of_the_official_release():
    record = {"prompt": "Q", "reference": [said("A")], "id": "q1", "category": "maths", "x": [1]}
    assert write("verl", {**record, "output": "dropped"}) == [
        {
            "data_source": "maths",
            "prompt": [user("Q")],
            "ability": "general",
            "reward_model": {"style": "polar", "ground_truth": "A"},
            "extra_info": {
                "split": "train",
                "id": "q1",
                "prompt": [user("Q")],
                "wrapper": "sft",
                "fields": '{"category":"maths","x":[1]}',
            },
        }
    ]
    with pytest.raises(RecordError, match="missing field `reference`"):
        write("verl", {"prompt": "Q"})


# -- there and back ------------------------------------------------------------------------------

ASKED = st.lists(st.tuples(PLAIN, PLAIN), max_size=2).flatmap(
    lambda rounds: PLAIN.map(
        lambda last: [*(m for q, a in rounds for m in (user(q), said(a))), user(last)]
    )
)
ANSWER = PLAIN.map(lambda text: [said(text)])
EXTRA = st.fixed_dictionaries(
    {}, optional={"id": PLAIN, "wrapper": st.just("pretrain"), "source": st.integers()}
)


def record_of(**texts):
    fields = st.fixed_dictionaries({"prompt": ASKED, **texts})
    return st.builds(lambda a, b: {**a, **b}, fields, EXTRA)


TRIPLES = record_of(reference=PLAIN | ANSWER, chosen=ANSWER, rejected=ANSWER)


@FAST
@given(TRIPLES)
@pytest.mark.parametrize("name", ["native", "trl", "sharegpt", "nemo", "llama-factory"])
def test_a_triple_goes_there_and_back(name, triple):
    (row,) = write(name, triple)
    read_back = read(name, row)
    (back,) = triples(read_back)
    if name == "llama-factory":  # holds strings only
        assert {k: v if isinstance(v, int) else content_text(v) for k, v in back.items()} == {
            k: v if isinstance(v, int) else content_text(v) for k, v in triple.items()
        }
    else:
        assert back == triple


@FAST
@given(record_of(reference=ANSWER))
@pytest.mark.parametrize("name", ["native", "trl", "openai", "sharegpt"])
def test_a_prompt_with_its_reference_goes_there_and_back(name, record):
    (row,) = write(name, record)
    assert read(name, row) == record


@FAST
@given(record_of(reference=ANSWER, output=ANSWER))
@pytest.mark.parametrize("name", ["native", "trl", "openai", "sharegpt"])
def test_a_candidate_with_its_reference_goes_there_and_back(name, record):
    (row,) = write(name, record)
    assert read(name, row) == record


@FAST
@given(PLAIN, PLAIN, PLAIN)
@pytest.mark.parametrize("name", ["native", "trl", "llama-factory"])
def test_strings_stay_strings(name, prompt, good, bad):
    record = {"prompt": prompt, "reference": "R", "chosen": good, "rejected": bad}
    assert read(name, write(name, record)[0]) == record


@FAST
@given(st.lists(st.tuples(st.integers(0, 3), PLAIN), min_size=1, max_size=5))
def test_a_ranked_group_goes_to_nemo_and_back(ranked):
    ranks = sorted({rank for rank, _ in ranked})
    candidates = [
        {"name": "p", "output": [said(text)], "label": len(ranks) - 1 - ranks.index(rank)}
        for rank, text in sorted(ranked, key=lambda pair: pair[0])
    ]
    record = {"prompt": [user("Q")], "candidates": candidates, "id": "q"}
    (row,) = write("nemo", record)
    assert [entry["rank"] for entry in row["completions"]] == sorted(
        ranks.index(rank) for rank, _ in ranked
    )
    assert read("nemo", row) == record


def test_named_pairs_without_a_reference_keep_their_names_through_trl():
    record = group({"prompt": "Q", "chosen": "g", "rejected": "b", "policy": "a"})
    (row,) = write("trl", record)
    assert row == {"prompt": "Q", "chosen": "g", "rejected": "b", "policy": "a"}
    assert read("trl", row) == record


def test_a_group_gives_a_trl_row_for_every_pair_and_mixed_texts_become_messages():
    candidates = [{"output": t, "label": n} for t, n in (("a", 2), ("b", 1), ("c", 0))]
    rows = write("trl", {"prompt": [user("Q")], "candidates": candidates})
    assert [(r["chosen"], r["rejected"]) for r in rows] == [
        ([said(x)], [said(y)]) for x, y in ("ab", "ac", "bc")
    ]


# -- TRL's own rule ------------------------------------------------------------------------------


@functools.cache
def trl_extract_prompt():
    """TRL's function from its source, without importing TRL (seconds)."""
    found = importlib.util.find_spec("trl")
    assert found is not None, "trl is part of what `make setup` installs"
    tree = ast.parse((Path(found.origin).parent / "data_utils.py").read_text())
    (function,) = (n for n in tree.body if getattr(n, "name", "") == "extract_prompt")
    function.returns, function.args.args[0].annotation = None, None
    scope: dict = {}
    exec(compile(ast.Module([function], []), "trl", "exec"), scope)
    return scope["extract_prompt"]


@settings(max_examples=200, deadline=None)
@given(st.text("a b", min_size=1), st.text("a b", max_size=4), st.text("a b", max_size=4))
def test_the_implicit_prompt_is_trls(prompt, good, bad):
    theirs = trl_extract_prompt()
    chosen, rejected = prompt + good, prompt + bad
    assume(chosen != rejected)
    made = theirs({"chosen": chosen, "rejected": rejected})
    assume(made["prompt"])
    assert extract_prompt(chosen, rejected) == tuple(made.values())
    chosen, rejected = [user(c) for c in chosen], [user(c) for c in rejected]
    made = theirs({"chosen": chosen, "rejected": rejected})
    assume(made["prompt"])
    assert extract_prompt(chosen, rejected) == tuple(made.values())


# -- refusals, detection -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("trl", {"chosen": "a"}, "missing field `rejected`"),
        ("trl", {"chosen": "same", "rejected": "same"}, "are the same"),
        ("trl", {"chosen": "x", "rejected": "y"}, "share no beginning"),
        ("trl", {"chosen": "", "rejected": ""}, "are the same"),
        ("trl", {"chosen": "", "rejected": "y"}, "share no beginning"),
        ("trl", {"chosen": "x", "rejected": [said("y")]}, "both be strings"),
        ("trl", {"completion": "x"}, "missing field `prompt`"),
        ("openai", {"messages": []}, r"field `messages`: unexpected \[\]"),
        ("openai", {"messages": ["hi"]}, r"field `messages\[0\]`"),
        ("openai", {"messages": [said("A")]}, "without a question"),
        ("openai", {"messages": [{"role": "user", "content": None}]}, "field `prompt"),
        ("sharegpt", {"conversations": [user("Q")]}, "no message with `from` and `value`"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}], "chosen": 3}, "chosen"),
        ("nemo", {"context": "Q"}, "missing field `completions`"),
        ("nemo", {"context": "Q", "completions": [{"rank": "a"}]}, r"`completions\[0\]`"),
        ("llama-factory", {"instruction": "Q", "history": [["a"]]}, "field `history`"),
        ("llama-factory", {"instruction": 3}, "field `instruction`: unexpected 3"),
        ("gsm8k", {"question": "Q"}, "missing field `answer`"),
        ("gsm8k-solutions", {"question": "Q", "ground_truth": "A"}, "no field holds a policy's"),
        ("native", {"prompt": "Q", "chosen": "a", "rejected": "b"}, "missing field `reference`"),
        ("native", {"prompt": 3}, "field `prompt`"),
    ],
)
def test_a_row_that_does_not_fit_is_a_record_error(name, row, message):
    with pytest.raises(RecordError, match=message):
        read(name, row)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("openai", {"prompt": "Q", "candidates": [{"output": "A"}]}, "no place for candidates"),
        ("nemo", {"prompt": "Q", "output": "A"}, "none to rank"),
        ("nemo", {"prompt": "Q", "candidates": [{"output": "A"}]}, "no `label`"),
        ("llama-factory", {"prompt": [said("A"), user("Q")]}, "turns of user and assistant"),
        (
            "sharegpt",
            {"prompt": "Q", "reference": "R", "chosen": [said("a"), said("b")], "rejected": "c"},
            "room for one message",
        ),
    ],
)
def test_what_a_format_cannot_carry_is_a_record_error(name, record, message):
    with pytest.raises(RecordError, match=message):
        write(name, record)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nemo", "context completions"),
        ("sharegpt", "conversations chosen rejected"),
        ("llama-factory", "instruction input output"),
        ("gsm8k-solutions", "question ground_truth 6b"),
        ("gsm8k", "question answer"),
        ("native", "prompt reference chosen rejected"),
        ("native", "prompt candidates"),
        ("native", "prompt reference output"),
        ("native", "prompt reference"),
        ("trl", "prompt chosen rejected messages"),
        ("trl", "chosen rejected reference"),
        ("trl", "prompt completion"),
        ("openai", "prompt messages"),
    ],
)
def test_the_format_is_told_from_the_fields(name, fields):
    found, reason = detect(dict.fromkeys(fields.split(), "x"))
    assert found == name
    assert reason.startswith("rows have `")


def test_unknown_fields_and_names_are_refused():
    with pytest.raises(RecordError, match="no known format") as caught:
        detect({"text": "x"})
    assert "sharegpt" in caught.value.hint
    with pytest.raises(UsageError, match="no such format") as near:
        require("--from", "share-gpt", readable())
    assert near.value.hint == "did you mean `sharegpt`?"
    with pytest.raises(UsageError, match="no such format"):
        require("--from", "verll", readable())
    with pytest.raises(UsageError, match="only read"):
        require("--to", "gsm8k", writable())
