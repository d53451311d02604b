"""`finetune --prompt-style chat`: a plain reward model, held against transformers alone."""

import json
import math

import pytest
import torch
from tiny import build_chat_rm, build_lm, build_rm
from torch.nn import functional as F

from polarctl import cli

TRAIN = ["--prompt-style", "chat", "--device", "cpu", "--dtype", "float32", "-q"]
ROWS = [
    {"prompt": "Why?", "chosen": "Because it helps.", "rejected": "It is Paris."},
    {
        "prompt": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Why not?"},
            {"role": "user", "content": "What is the sum of 3 and 4?"},
        ],
        "chosen": "The sum is 7.",
        "rejected": "",
    },
    {"prompt": "né 🙂", "chosen": [{"role": "assistant", "content": "So."}], "rejected": "No."},
    {"prompt": "The sea was", "chosen": "calm that day", "rejected": "calm that day. Why?"},
]


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(value, role):
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def by_transformers(folder, rows, dtype):
    """Rewards of chosen and rejected, each alone, by the library's own classes. Shape: (B, 2)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    found = []
    for row in rows:
        for side in ("chosen", "rejected"):
            messages = turns(row["prompt"], "user") + turns(row[side], "assistant")
            given = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            found.append(model(**given).logits[0, 0])
    return torch.stack(found).view(-1, 2)


@pytest.fixture(scope="module")
def chat_lm(tmp_path_factory):
    """Its padding is the token that a conversation ends in, as in many chat models."""
    return build_lm(tmp_path_factory.mktemp("models") / "chat", chat=True)


@pytest.fixture(scope="module")
def plain_rm(tmp_path_factory):
    """A plain reward model with a head of its own."""
    return build_chat_rm(tmp_path_factory.mktemp("models") / "rm", pad="<|pad|>")


@pytest.fixture(scope="module")
def trained(chat_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    rows = put(folder / "pairs.jsonl", ROWS)
    made = folder / "rm"
    options = ["--max-steps", "12", "--batch-size", "4", "--lr", "1e-2", "-o", str(made)]
    assert cli.run(["finetune", rows, "-m", str(chat_lm), *options, *TRAIN]) == 0
    return made


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_loss_is_bradley_terry_of_transformers_own_rewards(plain_rm, tmp_path, shared):
    rows = put(tmp_path / "pairs.jsonl", ROWS)
    options = ["--max-steps", "1", "--batch-size", "4", "--lr", "0", "-o", str(tmp_path / "rm")]
    options += [] if shared else ["--no-shared-prefix"]
    assert cli.run(["finetune", rows, "-m", str(plain_rm), *options, *TRAIN]) == 0
    (step,) = map(json.loads, (tmp_path / "rm" / "metrics.jsonl").read_text().splitlines())
    wanted = by_transformers(plain_rm, ROWS, torch.float64)
    difference = wanted[:, 0] - wanted[:, 1]
    assert step["loss"] == pytest.approx(-F.logsigmoid(difference).mean().item(), abs=1e-5)
    assert step["margin"] == pytest.approx(difference.mean().item(), abs=1e-5)
    assert (step["computed"] < step["tokens"]) == shared
    # A rate of 0 changes nothing: what was loaded is what is saved, head included.
    again = by_transformers(tmp_path / "rm", ROWS, torch.float64)
    assert torch.allclose(again, wanted, atol=1e-5)


def test_a_trained_model_is_plain_and_scored_as_transformers_scores_it(trained, tmp_path, capfd):
    config = json.loads((trained / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert not any("polar" in name for name in config)
    steps = list(map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["loss"] < 0.3 and steps[-1]["accuracy"] == 1
    wanted = by_transformers(trained, ROWS, torch.float32)
    assert (wanted[:, 0] > wanted[:, 1]).all()
    scored = tmp_path / "scored.jsonl"
    command = ["score", put(tmp_path / "rows.jsonl", ROWS), "-m", str(trained), "-o", str(scored)]
    assert cli.run([*command, "--device", "cpu", "--dtype", "float32"]) == 0
    found = [json.loads(line)["rewards"] for line in scored.read_text().splitlines()]
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-5)
    assert "input: chat template" in capfd.readouterr().err


def test_eval_reads_it_too_and_what_needs_a_polar_model_refuses_it(trained, tmp_path, capfd):
    rows = put(tmp_path / "rows.jsonl", ROWS)
    assert cli.run(["eval", rows, "-m", str(trained), "--device", "cpu", "-q"]) == 0
    verdicts = map(json.loads, capfd.readouterr().out.splitlines())
    assert all(row["correct"] for row in verdicts)
    from polarctl.errors import UsageError
    from polarctl.rewards import PolarReward

    with pytest.raises(UsageError, match="reads conversations"):
        PolarReward.load(str(trained), device="cpu")
    rows = put(tmp_path / "with.jsonl", [{**row, "reference": "Yes."} for row in ROWS])
    assert cli.run(["score", rows, "-m", str(trained), "--backend", "vllm"]) == 2
    assert "reads conversations" in capfd.readouterr().err


def test_a_longer_input_is_cut_and_the_limit_is_kept_in_the_tokenizer(chat_lm, tmp_path, capfd):
    from transformers import AutoTokenizer

    long = [{**ROWS[0], "prompt": "the sea was calm that day " * 20}]
    command = ["finetune", put(tmp_path / "p.jsonl", long), "-m", str(chat_lm), *TRAIN[:-1]]
    command += ["--max-steps", "1", "--batch-size", "2", "--max-length", "40", "--lr", "1e-3"]
    assert cli.run([*command, "-o", str(tmp_path / "rm")]) == 0
    assert "(prompt: 1)" in capfd.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "rm").model_max_length == 40


def test_candidates_share_the_shorter_prompt_when_one_is_cut(plain_rm):
    from polarctl.model.conversation import ChatEncoder
    from polarctl.model.reward_model import load_tokenizer

    encoder = ChatEncoder(load_tokenizer(str(plain_rm)), 60)
    prompt, outputs = "storm " * 30, ["So.", "calm " * 12]
    alone = [encoder.report(prompt, "", output) for output in outputs]
    asked = [encoder.tokenizer.decode(one.ids).split("<|end|>")[0] for one in alone]
    assert asked[0] != asked[1] and all(one.truncated_prompt for one in alone)
    group = encoder.report_group(prompt, "", outputs)
    assert {encoder.tokenizer.decode(one.ids).split("<|end|>")[0] for one in group} == {asked[1]}
    assert len(group[0].ids) < len(alone[0].ids) and group[1].ids == alone[1].ids


MISTAKES = {
    "no chat template": (["-m", "lm"], 4, "lm: its tokenizer has no chat template", "--tokenizer"),
    "a POLAR model": (["-m", "polar"], 2, "polar is a POLAR model", "the base model"),
    "references": (
        ["-m", "chat", "--reference-field", "x"],
        2,
        "`--reference-field` has no effect here: it is for runs with references",
        "leave it out",
    ),
    "no reference": (["-m", "chat", "--no-reference"], 2, "is for --prompt-style polar", "leave"),
    "too long": (["-m", "chat", "--max-length", "4096"], 2, "takes 128 tokens at most", None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_is_one_line_with_its_remedy(mistake, tmp_path, monkeypatch, capfd):
    options, status, said, hint = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    build_lm(tmp_path / "lm")
    build_lm(tmp_path / "chat", chat=True)
    if "polar" in options:
        build_rm(tmp_path / "polar", tmp_path / "chat")
    put(tmp_path / "pairs.jsonl", ROWS)
    command = ["finetune", "pairs.jsonl", *options, "-o", "made", "--max-steps", "1", *TRAIN]
    assert cli.run(command) == status
    told = capfd.readouterr().err
    assert said in told and (hint is None or hint in told)
    assert "Traceback" not in told and not (tmp_path / "made").exists()


def test_its_card_shows_code_that_gives_its_rewards(trained):
    from polarctl.hub import cards

    card = cards.model_card(
        str(trained), json.loads((trained / "config.json").read_text()), None, {}
    )
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict = {"print": lambda reward: scope.update(reward=reward)}
    exec(code, scope)
    row = {"prompt": "What is the capital of France?", "chosen": "The capital is Paris."}
    wanted = by_transformers(trained, [{**row, "rejected": ""}], torch.float32)
    assert scope["reward"] == pytest.approx(wanted[0, 0].item(), abs=1e-5)
    assert "reference" not in card.split("## Use")[0].replace("reads no reference", "")


@pytest.mark.slow
def test_adapters_are_merged_into_a_plain_model(chat_lm, tmp_path):
    rows = put(tmp_path / "pairs.jsonl", ROWS)
    base = ["finetune", rows, "-m", str(chat_lm), "--max-steps", "2", "--batch-size", "4", *TRAIN]
    base += ["--lr", "1e-2", "--lora-rank", "2"]
    assert cli.run([*base, "-o", str(tmp_path / "rm")]) == 0
    rewards = by_transformers(tmp_path / "rm", ROWS, torch.float32)
    assert rewards.abs().max() > 1e-4
