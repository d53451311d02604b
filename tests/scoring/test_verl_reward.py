"""The reward function for verl, on the rows that `convert --to verl` writes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from scoring.faulty_server import reward_of, serving

from polarctl.errors import PolarctlError
from polarctl.formats.table import write_verl
from polarctl.model import reward_model
from polarctl.verl_reward import compute_score


def test_a_rollout_gets_the_reward_of_its_row(tiny_rm):
    encoder = reward_model.load_encoder(str(tiny_rm))
    turns = [{"role": "user", "content": "Why?"}]
    for record in (
        {"prompt": turns, "reference": "Because."},
        {"prompt": "Once", "reference": " upon a time", "wrapper": "pretrain"},
    ):
        (row,) = write_verl(record)
        given = {
            "data_source": row["data_source"],
            "ground_truth": row["reward_model"]["ground_truth"],
            "extra_info": {**row["extra_info"], "num_turns": 2},
            "model": str(tiny_rm),
        }
        wanted = reward_of(
            encoder.encode(
                record["prompt"], record["reference"], "So.", record.get("wrapper", "sft")
            )
        )
        with serving() as server:
            raw = compute_score(solution_str="So.", url=server.url, **given)
            assert raw == pytest.approx(wanted)
            told = compute_score(
                solution_str="<think>hm</think>So.",
                url=server.url,
                normalize="polar-7b",
                strip_thinking=True,
                **given,
            )
            assert told == pytest.approx((wanted + 5) / 10)
            assert server.seen["requests"] == 3  # the server is probed once
            assert compute_score(solution_str="So.", url=server.url, **given) == raw
            assert server.seen["requests"] == 4


def test_many_threads_share_one_scorer(tiny_rm):
    given = {"data_source": "x", "ground_truth": "Because.", "extra_info": {"prompt": "Why?"}}
    with serving() as server:

        def score(number):
            text = f"So {number % 4}."
            return compute_score(solution_str=text, url=server.url, model=str(tiny_rm), **given)

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(score, range(16)))
        assert server.seen["requests"] == 17  # and one probe
    assert found == found[:4] * 4


def test_a_rollout_without_an_answer_gets_the_floor(tiny_rm):
    given = {"ground_truth": "Because.", "extra_info": {"prompt": "Why?"}, "model": str(tiny_rm)}
    with serving() as server:
        for text, more, reward in (
            ("", {}, -20),
            ("<think>hm", {"strip_thinking": True}, -20),
            ("<think>hm", {"strip_thinking": True, "normalize": "polar-7b"}, -1.5),
            ("", {"reward_floor": -3}, -3),
        ):
            found = compute_score("x", text, url=server.url, **given, **more)
            assert found == pytest.approx(reward)
        assert compute_score("x", "", url=server.url, **given, reward_floor=None) not in (-20, 0)


def test_a_row_without_a_prompt_is_an_error_and_no_reward(tiny_rm):
    with pytest.raises(PolarctlError, match="extra_info.prompt"):
        compute_score("x", "So.", "Because.", {}, url="http://127.0.0.1:1", model=str(tiny_rm))


def test_a_dead_server_is_an_error_and_no_reward(tiny_rm):
    with pytest.raises(PolarctlError, match="no server answers"):
        compute_score(
            "x",
            "So.",
            "Because.",
            {"prompt": "Why?"},
            url="http://127.0.0.1:1",
            model=str(tiny_rm),
            server_deadline=0,
        )
