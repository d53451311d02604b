import pytest

from polarctl.errors import PolarctlError, UsageError
from polarctl.scoring.answers import floor_of, strip_thinking
from polarctl.scoring.reward_function import PolarReward, normalise
from polarctl.scoring.scorer import Scored


class FakeScorer:
    """The reward is minus the length of the output; remembers what it was asked."""

    def score(self, items):
        self.items = list(items)
        return [Scored(-float(len(item.output)), 1, ()) for item in items]


def test_presets_give_the_papers_numbers():
    # (-8 - -5)/10 = -0.3; (0 - -10)/10 = 1; (-200 - -10)/10 = -19, clipped; (105 + 5)/10 = 11
    assert normalise([-8.0, 0.0], "polar-7b") == pytest.approx([-0.3, 0.5])
    assert normalise([-8.0, 0.0, -200.0], "polar-1.8b") == pytest.approx([0.2, 1.0, -10.0])
    assert normalise([105.0], "polar-7b") == [10.0]
    assert normalise([-8.5, 3.0], "none") == [-8.5, 3.0]


def test_an_unknown_preset_is_a_usage_error():
    with pytest.raises(UsageError, match="polar-70b"):
        normalise([1.0], "polar-70b")
    with pytest.raises(UsageError):
        PolarReward(FakeScorer(), normalize="polar-70b")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("plain", "plain"),
        ("<think>a</think>b", "b"),
        ("<think>a\nb</think>\n\nthe answer ", "the answer "),
        ("x <think>a</think>y<think>b</think>z", "x yz"),
        ("<think>never closed", ""),
        ("<think>a</think>b<think>never closed", "b"),
        ("opened by the prompt</think> b", "b"),
        ("a < b and b > c", "a < b and b > c"),
        ("", ""),
    ],
)
def test_thinking_is_removed(text, kept):
    assert strip_thinking(text) == kept


def test_a_part_that_the_prompt_opened_ends_at_its_closing_tag():
    assert strip_thinking("a</think>b", opened=True) == "b"
    assert strip_thinking("a that never ends", opened=True) == ""


def test_the_callable_takes_what_trl_passes():
    scorer, logged = FakeScorer(), {}
    reward = PolarReward(scorer, normalize="polar-7b", strip_thinking=True)
    rewards = reward(
        prompts=[[{"role": "user", "content": "q"}]] * 2,
        completions=[
            [{"role": "assistant", "content": "<think>long</think>12345"}],
            [{"role": "assistant", "content": "12345" * 3}],
        ],
        completion_ids=[[1], [2]],
        trainer_state=None,
        reference=["r", [{"role": "assistant", "content": "r"}]],
        wrapper=["pretrain", None],
        log_metric=lambda name, value: logged.update({name: value}),
        log_extra=lambda name, values: logged.update({f"{name}s": values}),
    )
    assert rewards == [0.0, -1.0]  # (-5 + 5)/10, (-15 + 5)/10
    assert logged.pop("polar_floored") == 0 and logged.pop("polar_flooreds") == ["", ""]
    assert logged == {"polar_raw": -10.0, "polar_raws": [-5.0, -15.0]}
    assert [item.wrapper for item in scorer.items] == ["pretrain", "sft"]
    assert scorer.items[0].output == "12345"
    assert reward.__name__ == "polar"


@pytest.mark.parametrize(
    ("text", "ended", "wrapper", "fault"),
    [
        ("yes", True, "sft", ""),
        ("<think>a</think>yes", True, "sft", ""),
        ("", True, "sft", "empty"),
        (" \n", True, "pretrain", "empty"),
        ("<think>a</think>\n", True, "sft", "empty"),
        ("<think>never closed", True, "sft", "unclosed"),
        ("<think>never closed", False, "sft", "unclosed"),
        ("<think>a</think>yes <think>never closed", True, "sft", "unclosed"),
        ("yes, and", False, "sft", "cut_off"),
        ("yes, and", False, "pretrain", ""),  # a continuation has no end to reach
    ],
)
def test_an_output_without_an_answer_gets_the_floor(text, ended, wrapper, fault):
    logged = {}
    reward = PolarReward(FakeScorer(), strip_thinking=True, normalize="polar-7b")
    good, found = reward(
        ["p", "p"],
        ["an answer", [{"role": "assistant", "content": text}]],
        reference=["r", "r"],
        wrapper=["sft", wrapper],
        ended=[True, ended],
        log_extra=lambda name, values: logged.update({name: values}),
    )
    assert good == pytest.approx(-0.4)  # (-9 + 5)/10
    assert logged["polar_floored"] == ["", fault]
    assert (found == pytest.approx(-1.5)) == bool(fault)  # (-20 + 5)/10
    assert reward.floored["outputs"] == 2 and reward.floored[fault] == bool(fault)


def test_the_prompt_may_have_opened_the_thought_that_is_not_closed():
    reward = PolarReward(FakeScorer(), strip_thinking=True, thinking_opened=True, reward_floor=-7)
    texts = ["thinking and no answer", "thinking</think>so"]
    assert reward(["p"] * 2, texts, reference=["r"] * 2) == [-7, -2]


def test_without_a_floor_what_is_left_is_scored():
    reward = PolarReward(FakeScorer(), strip_thinking=True, reward_floor=None)
    found = reward(["p"] * 2, ["<think>x", "yes"], reference=["r"] * 2, ended=[False, False])
    assert found == [0, -3]  # of an empty text, and of "yes"


def test_a_thought_is_judged_only_where_thoughts_are_stripped():
    reward = PolarReward(FakeScorer())
    assert reward(["p"] * 2, ["<think>x", ""], reference=["r"] * 2) == [-8, -20]


@pytest.mark.parametrize(
    ("option", "value"), [("auto", -20.0), ("none", None), ("-3.5", -3.5), ("0", 0.0)]
)
def test_a_floor_is_a_number_none_or_the_default(option, value):
    assert floor_of(option, -20.0) == value


@pytest.mark.parametrize("option", ["nan", "-inf", "low", ""])
def test_another_floor_is_a_usage_error(option):
    with pytest.raises(UsageError, match="--reward-floor"):
        floor_of(option, None)


def test_a_failure_is_an_error_and_never_a_reward():
    class Broken:
        def score(self, items):
            raise PolarctlError("the model gave a reward that is not finite")

    class Short:
        def score(self, items):
            return []

    with pytest.raises(PolarctlError, match="not finite"):
        PolarReward(Broken())(["p"], ["c"], reference=["r"])
    with pytest.raises(PolarctlError, match="0 rewards for 1"):
        PolarReward(Short())(["p"], ["c"], reference=["r"])
    with pytest.raises(PolarctlError, match="reference"):
        PolarReward(FakeScorer())(["p"], ["c"])
    with pytest.raises(PolarctlError, match="reference"):
        PolarReward(FakeScorer())(["p"], ["c"], reference=[None])
