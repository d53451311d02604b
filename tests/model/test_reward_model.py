"""The reward model: zero head, template in the checkpoint, plain transformers loads it."""

import json
import shutil
import stat

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from polarctl import console
from polarctl.errors import MissingError, UsageError
from polarctl.model import reward_model
from polarctl.scoring.scorer import Item, ModelScorer


def plain_reward(folder, text):
    """The reward by transformers alone, from the glued text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return classifier(**tokenizer(text, return_tensors="pt")).logits.item()


def test_a_new_model_has_a_zero_head_and_single_template_tokens(tiny_lm):
    made = reward_model.create(base=str(tiny_lm))
    assert made.model.score.weight.abs().sum().item() == 0
    for token in (reward_model.SEPARATOR, reward_model.REWARD_TOKEN):
        assert len(made.tokenizer.encode(token, add_special_tokens=False)) == 1
    ids = made.encoder.encode("a question", "yes", "no")
    assert ids[-1] == made.model.config.reward_token_id


def test_lengths_fit_the_model_and_the_stage(tiny_lm):
    made = reward_model.create(base=str(tiny_lm))
    longest = made.model.config.max_position_embeddings
    assert made.encoder.max_length == longest
    assert made.encoder.max_response_length == longest // 4
    assert (
        reward_model.create(
            base=str(tiny_lm), default_response_length=7
        ).encoder.max_response_length
        == 7
    )


def test_plain_transformers_loads_a_checkpoint_and_gives_the_same_rewards(tiny_rm):
    made = reward_model.load(str(tiny_rm))
    texts = [("a question", "yes", "no"), ("another, longer question", "a b c", "c b a b c")]
    scored = ModelScorer(made).score([Item(*text) for text in texts])
    for text, ours in zip(texts, scored, strict=True):
        assert ours.reward == pytest.approx(
            plain_reward(tiny_rm, made.encoder.text(*text)), abs=1e-5
        )
    assert scored[0].reward != scored[1].reward


def test_a_checkpoint_is_the_architectures_own_classifier_with_its_template(tiny_rm):
    config = json.loads((tiny_rm / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["problem_type"] == "regression"
    assert list(config["id2label"]) == ["0"]  # one label
    assert config["polar"]["separator"] == "<|reward|>"
    mode = stat.S_IMODE((tiny_rm / "model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((tiny_rm / "config.json").stat().st_mode)


def test_padding_does_not_change_a_reward(tiny_rm):
    made = reward_model.load(str(tiny_rm))
    sequences = [made.encoder.encode("q", "r", "o" * n) for n in (1, 30)]
    alone = [
        reward_model.rewards(made.model, *reward_model.pad([ids], 0, "cpu")).item()
        for ids in sequences
    ]
    together = reward_model.rewards(made.model, *reward_model.pad(sequences, 0, "cpu")).tolist()
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_reward_model_goes_on_as_it_is(tiny_rm):
    again = reward_model.create(base=str(tiny_rm), default_response_length=7)
    assert again.model.score.weight.abs().sum().item() > 0
    before = reward_model.load(str(tiny_rm)).encoder
    assert again.encoder.max_length == before.max_length == 128
    assert again.encoder.max_response_length == before.max_response_length == 32


def test_a_reward_models_template_can_be_changed_and_is_saved_with_it(tiny_rm, tmp_path, capfd):
    console.configure(quiet=False, verbose=False, color=False, json_lines=False)
    changed = {"max_length": 100, "max_response_length": 3, "cut_side": "left"}
    again = reward_model.create(base=str(tiny_rm), **changed)
    said = capfd.readouterr().err
    assert "template: max_length 100, max_response_length 3, cut_side left (asked for; " in said
    again.save(tmp_path / "rm")
    told = json.loads((tmp_path / "rm/config.json").read_text())["polar"]
    assert {name: told[name] for name in changed} == changed
    assert told["separator"] == "<|reward|>"
    # Both responses lose their first tokens, so what differs there alone makes no difference.
    loaded = reward_model.load(str(tmp_path / "rm"))
    one, other = (loaded.encoder.encode("q", "yes", text) for text in ("a b c d e", "f g c d e"))
    assert one == other
    assert again.encoder.encode("q", "yes", "a b c d e") == one
    assert torch.equal(
        loaded.model.score.weight, reward_model.load(str(tiny_rm)).model.score.weight
    )


def test_a_template_that_cannot_be_is_refused(tiny_rm, tiny_lm):
    with pytest.raises(UsageError, match="128 tokens at most"):
        reward_model.create(base=str(tiny_rm), max_length=129)
    with pytest.raises(UsageError, match="leaves no room"):  # 2 * 32 + 4 + 2 = 70 at least
        reward_model.create(base=str(tiny_rm), max_length=69)
    assert reward_model.create(base=str(tiny_rm), max_length=70).encoder.max_length == 70
    with pytest.raises(UsageError, match="`--tokenizer`: .* keeps its own"):
        reward_model.create(base=str(tiny_rm), tokenizer_path=str(tiny_lm))


def test_a_config_alone_gives_random_weights_that_the_seed_decides(tiny_lm):
    weights = [
        reward_model.create(config_path=str(tiny_lm), seed=seed).model.get_input_embeddings().weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_neither_or_both_sources_are_refused(tiny_lm):
    for sources in ({}, {"base": str(tiny_lm), "config_path": str(tiny_lm)}):
        with pytest.raises(UsageError, match="either"):
            reward_model.create(**sources)


def test_a_causal_lm_is_no_reward_model(tiny_lm):
    with pytest.raises(MissingError, match="no reward head"):
        reward_model.load(str(tiny_lm))


def without(folder, target, *names):
    shutil.copytree(folder, target)
    for name in names:
        for file in target.glob(name):
            file.unlink()
    return str(target)


def test_missing_parts_are_named(tiny_rm, tmp_path):
    with pytest.raises(MissingError, match="no tokenizer"):
        reward_model.load(without(tiny_rm, tmp_path / "a", "tokenizer*"))
    with pytest.raises(MissingError, match="cannot be loaded"):
        reward_model.load(without(tiny_rm, tmp_path / "b", "*.safetensors"))
    with pytest.raises(MissingError, match="no model"):
        reward_model.load(without(tiny_rm, tmp_path / "c", "config.json"))
    with pytest.raises(MissingError, match="no such folder"):
        reward_model.load(str(tmp_path / "nowhere"))


def test_a_checkpoint_whose_head_was_lost_is_refused(tiny_rm, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    shutil.copytree(tiny_rm, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingError, match="score.weight"):
        reward_model.load(str(folder))
