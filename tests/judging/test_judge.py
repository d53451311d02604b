"""A generative judge: scores come back to the right candidates, and never from nonsense."""

import json

import pytest
from judge_server import JudgeServer, rule

from polarctl.errors import MissingError, RecordError, UsageError
from polarctl.judging.chat import ChatServer
from polarctl.judging.judge import (
    LocalJudge,
    PrincipleScorer,
    judge_records,
    names_of,
    require_principle,
)
from polarctl.judging.parsing import Failure, Reply
from polarctl.records import Record


class Sink:
    """Keeps what is set aside."""

    def __init__(self):
        self.rows = []

    def reject(self, where, reason, raw=None):
        self.rows.append((where, reason, raw))


class Strict:
    """Refuses to set anything aside, as an output without --rejects does."""

    def reject(self, where, reason, raw=None):
        raise RecordError(reason, where=where)


def group(*outputs, record_id="r", names=True):
    candidates = [
        {"output": text, **({"name": f"policy-{i}"} if names else {})}
        for i, text in enumerate(outputs)
    ]
    fields = {"id": record_id, "prompt": "Say hi", "principle": "Be loud", "candidates": candidates}
    return Record(fields, f"in:{record_id}")


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


def scorer_at(server, **options):
    return PrincipleScorer(ChatServer(server.url, "judge", pause_s=0.01, deadline_s=2), **options)


def test_scores_find_their_candidates_through_the_masks(server):
    records = [group("hi", "hi!!!", "hi!", record_id=f"r{i}") for i in range(8)]
    found = list(judge_records(records, scorer_at(server), Strict().reject))
    for record, fields in zip(records, found, strict=True):
        assert fields["rewards"] == [1.0, 4.0, 2.0]  # 1 + the number of `!`
        assert fields["ranking"] == ["policy-1", "policy-2", "policy-0"]
        assert fields["reasoning"] == "policy-1 is the loudest"
        assert fields["parse_status"] == "ok"
        assert {key: fields[key] for key in record} == record
    shown = [list(json.loads(b["messages"][1]["content"])["responses"]) for b in server.bodies]
    texts = {
        tuple(json.loads(b["messages"][1]["content"])["responses"].values()) for b in server.bodies
    }
    assert all(names == ["model-1", "model-2", "model-3"] for names in shown)
    assert len(texts) > 1  # records are shuffled one by one
    assert "policy-" not in json.dumps(server.bodies)


def test_orders_are_averaged(server):
    def first_is_best(asked):
        """A judge that looks at the place alone: 5, 4, 3 from the first on."""
        names = list(asked["responses"])
        scores = {name: 5 - place for place, name in enumerate(names)}
        return json.dumps({"scores": scores, "best-to-worst": names})

    server.reply = first_is_best
    (one,) = judge_records([group("a", "b", "c")], scorer_at(server), Strict().reject)
    assert sorted(one["rewards"]) == [3.0, 4.0, 5.0]
    assert len(server.bodies) == 1
    (three,) = judge_records([group("a", "b", "c")], scorer_at(server, orders=3), Strict().reject)
    # Over three rotations each candidate has each place once: (5 + 4 + 3) / 3.
    assert three["rewards"] == [4.0, 4.0, 4.0]
    (two,) = judge_records([group("a", "b", "c")], scorer_at(server, orders=2), Strict().reject)
    # Places 1 and 3, 2 and 1, 3 and 2: 8 / 2, 9 / 2, 7 / 2, whoever stood there.
    assert sorted(two["rewards"]) == [3.5, 4.0, 4.5]
    best_first = sorted(range(3), key=lambda i: -two["rewards"][i])
    assert two["ranking"] == [f"policy-{i}" for i in best_first]


def test_equal_scores_are_ranked_as_the_judge_ranks_them(server):
    server.reply = lambda asked: json.dumps(
        {
            "scores": dict.fromkeys(asked["responses"], 3),
            "best-to-worst": sorted(asked["responses"], key=asked["responses"].get),
        }
    )
    (fields,) = judge_records([group("c", "a", "b")], scorer_at(server), Strict().reject)
    assert fields["rewards"] == [3.0, 3.0, 3.0]
    assert fields["ranking"] == ["policy-1", "policy-2", "policy-0"]


def test_a_ranking_against_the_scores_is_counted_and_the_scores_count(server, capsys):
    def backwards(asked):
        answer = json.loads(rule(asked).partition("</think>")[2])
        return json.dumps({**answer, "best-to-worst": answer["best-to-worst"][::-1]})

    server.reply = backwards
    scorer = scorer_at(server)
    (fields,) = judge_records([group("hi", "hi!")], scorer, Strict().reject)
    assert fields["ranking"] == ["policy-1", "policy-0"] and scorer.contradictions == 1
    scorer.close()
    assert "1 replies" in capsys.readouterr().err


def test_a_reply_that_cannot_be_read_sets_its_record_aside(server):
    def sometimes(asked):
        return "No." if "!" in "".join(asked["responses"].values()) else rule(asked)

    server.reply = sometimes
    records = [group("a", "b", record_id="0"), group("a!", "b", record_id="1"), group("c", "d")]
    sink = Sink()
    found = list(judge_records(records, scorer_at(server, orders=2), sink.reject))
    assert [fields["candidates"][0]["output"] for fields in found] == ["a", "c"]
    ((where, reason, raw),) = sink.rows
    assert where == "in:1" and "order 1 of 2" in reason and "no JSON object" in reason
    assert raw == records[1] and "rewards" not in raw
    with pytest.raises(RecordError, match="in:1: the judge's reply cannot be used") as caught:
        list(judge_records(records, scorer_at(server), Strict().reject))
    assert caught.value.exit_status == 3


def test_one_bad_order_is_enough(server):
    replies = iter([rule, lambda asked: "{}"])
    server.reply = lambda asked: next(replies)(asked)
    asker = ChatServer(server.url, "judge", concurrency=1)
    (found,) = PrincipleScorer(asker, orders=2).judge([group("a", "b")])
    assert isinstance(found, Failure) and "order 2 of 2" in found.reason


def test_triples_and_single_outputs_are_judged(server):
    base = {"prompt": "Say hi", "principle": "Be loud"}
    records = [
        Record({**base, "chosen": "hi!!", "rejected": "hi"}),
        Record({**base, "output": "hi!"}),
    ]
    triple, single = judge_records(records, scorer_at(server), Strict().reject)
    assert triple["rewards"] == [3.0, 1.0] and triple["ranking"] == ["chosen", "rejected"]
    assert single["reward"] == 2.0 and single["ranking"] == ["candidate-0"]


def test_names_must_tell_candidates_apart():
    assert names_of(group("a", "b")) == ["policy-0", "policy-1"]
    assert names_of(group("a", "b", names=False)) == ["candidate-0", "candidate-1"]
    same = Record({"prompt": "p", "candidates": [{"output": x, "name": "n"} for x in "ab"]})
    assert names_of(same) == ["candidate-0", "candidate-1"]


@pytest.mark.parametrize("given", [{}, {"principle": " "}, {"principle": 3}, {"principle": None}])
def test_a_record_needs_a_principle(given):
    with pytest.raises(RecordError, match="principle"):
        require_principle(Record({"prompt": "p", "output": "o", **given}))
    require_principle(group("a"))


def test_no_order_at_all_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        PrincipleScorer(None, orders=0)


# -- a judge in this process ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge_lm(tmp_path_factory):
    from tiny import build_lm

    folder = tmp_path_factory.mktemp("models") / "judge"
    return build_lm(folder, chat=True, seed=5, context=2048)


def test_the_nonsense_of_a_tiny_model_is_never_a_score(judge_lm):
    judge = LocalJudge(str(judge_lm), device="cpu", dtype="float32", max_new_tokens=12)
    sink = Sink()
    records = [group("hi", "hi!", record_id=str(i)) for i in range(3)]
    assert list(judge_records(records, PrincipleScorer(judge, orders=2), sink.reject)) == []
    assert [where for where, _, _ in sink.rows] == ["in:0", "in:1", "in:2"]
    assert all("cannot be used (order 1 of 2)" in reason for _, reason, _ in sink.rows)


def test_a_local_judge_writes_the_likeliest_text_whatever_the_seed(judge_lm):
    judge = LocalJudge(str(judge_lm), device="cpu", dtype="float32", max_new_tokens=6)
    asked = [[{"role": "user", "content": "Why?"}]]
    first, second = judge.ask(asked, [1]), judge.ask(asked, [2])
    assert first == second and isinstance(first[0], Reply) and first[0].text
    drawn = LocalJudge(
        str(judge_lm), device="cpu", dtype="float32", max_new_tokens=6, temperature=1.0
    )
    assert drawn.ask(asked, [1]) != drawn.ask(asked, [2])


def test_a_question_beyond_the_local_judges_context_is_its_records_error(tiny_chat_lm):
    judge = LocalJudge(str(tiny_chat_lm), device="cpu", dtype="float32", max_new_tokens=4)
    (found,) = PrincipleScorer(judge).judge([group("hi", "hi!")])
    assert isinstance(found, Failure) and "context of 128" in found.reason


def test_a_local_judge_needs_a_chat_template_and_a_folder(tiny_lm, tmp_path):
    with pytest.raises(UsageError, match="no chat template"):
        LocalJudge(str(tiny_lm), device="cpu", dtype="float32")
    with pytest.raises(MissingError, match="no such model folder"):
        LocalJudge(str(tmp_path / "absent"), device="cpu", dtype="float32")
