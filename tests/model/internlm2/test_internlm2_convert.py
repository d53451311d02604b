"""Folders go from the published format to ours and back, bit by bit."""

import json
import os
import shutil
import stat

import pytest
import torch
from huggingface_hub import constants
from model.internlm2.official import build_official, weights
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from polarctl.errors import MissingError, UsageError
from polarctl.model import reward_model
from polarctl.model.internlm2.convert import to_internlm2, to_llama
from polarctl.scoring.scorer import Item, ModelScorer

ITEMS = [Item("What is the sum?", "The sum is 7.", x) for x in ("It is 7.", "Paris", "")]


def rewards(folder):
    return [x.reward for x in ModelScorer(reward_model.load(str(folder))).score(ITEMS)]


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("tokenizer", ["json", "model"])
@pytest.mark.parametrize(("format", "dtype"), [("bin", "float16"), ("safetensors", "bfloat16")])
def test_there_and_back_every_weight_is_as_it_was(tmp_path, format, dtype, tokenizer):
    source = build_official(
        tmp_path / "a", format=format, sharded=True, dtype=dtype, tokenizer=tokenizer, bias=True
    )
    to_llama(str(source), tmp_path / "b")
    to_internlm2(str(tmp_path / "b"), tmp_path / "c")
    before = json.loads((source / "config.json").read_text())
    wanted, found = weights(before), tensors(tmp_path / "c")
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(found[name], tensor), name
    after = json.loads((tmp_path / "c/config.json").read_text())
    assert "auto_map" not in after
    lost = {key for key in before if before[key] != after.get(key)}
    assert lost == {"auto_map", "attn_implementation"}
    assert not [x for x in os.listdir(tmp_path / "c") if x.endswith(".py")]
    for folder in ("b", "c"):
        assert rewards(tmp_path / folder) == pytest.approx(rewards(source), abs=1e-5)


@pytest.mark.parametrize("max_positions", [64, 32768])
def test_the_converted_folder_needs_nothing_of_ours(tmp_path, max_positions):
    source = build_official(tmp_path / "a", tokenizer="model", max_positions=max_positions)
    to_llama(str(source), tmp_path / "b")
    made = reward_model.load(str(source))
    text = made.encoder.text("What is the sum?", "The sum is 7.", "Paris")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "b", dtype=torch.float32
    )
    with torch.inference_mode():
        plain = classifier(**tokenizer(text, return_tensors="pt")).logits.item()
    (ours,) = ModelScorer(made).score([Item("What is the sum?", "The sum is 7.", "Paris")])
    assert ours.reward == pytest.approx(plain, abs=1e-5)
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression" and list(config["id2label"]) == ["0"]
    assert config["polar"]["separator"] == "<|reward|>"
    assert config["polar"]["reward_token"] == "[UNUSED_TOKEN_130]"
    kind = "dynamic" if max_positions == 64 else "default"
    assert config["rope_parameters"]["rope_type"] == kind


def test_files_get_the_permissions_of_the_umask(tmp_path):
    to_llama(str(build_official(tmp_path / "a")), tmp_path / "b")
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "b").iterdir()}
    assert modes == {0o666 & ~umask}


def test_large_weights_are_sharded(tmp_path):
    source = build_official(tmp_path / "a")
    to_llama(str(source), tmp_path / "b", shard_bytes=20_000)
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {x.name for x in shards}
    held = tensors(tmp_path / "b").values()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in held)
    for shard in shards:
        held = load_file(shard)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 20_000
    assert rewards(tmp_path / "b") == pytest.approx(rewards(source), abs=1e-5)
    to_internlm2(str(tmp_path / "b"), tmp_path / "c", shard_bytes=20_000)
    assert rewards(tmp_path / "c") == pytest.approx(rewards(source), abs=1e-5)


def test_a_model_of_ours_goes_to_the_published_layout(tiny_rm, tmp_path):
    to_internlm2(str(tiny_rm), tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert config["architectures"] == ["InternLM2ForRewardModel"]
    assert rewards(tmp_path / "c") == pytest.approx(rewards(tiny_rm), abs=1e-6)
    to_llama(str(tmp_path / "c"), tmp_path / "d")
    before, after = tensors(tiny_rm), tensors(tmp_path / "d")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_of_neither_kind_is_refused(tiny_lm, tiny_rm, tmp_path):
    base = build_official(tmp_path / "lm", architecture="InternLM2ForCausalLM")
    official = build_official(tmp_path / "rm")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    for call, source, error, words in (
        (to_llama, tiny_rm, UsageError, "no InternLM2"),
        (to_llama, base, UsageError, "no reward head"),
        (to_llama, empty, MissingError, r"no config\.json"),
        (to_llama, tmp_path / "nowhere", MissingError, r"no config\.json"),
        (to_internlm2, official, UsageError, "no Llama reward model"),
        (to_internlm2, tiny_lm, UsageError, "no Llama reward model"),
        (to_internlm2, empty, MissingError, r"no config\.json"),
    ):
        with pytest.raises(error, match=words):
            call(str(source), out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_llama_with_no_place_in_the_layout_is_refused(tiny_rm, tmp_path):
    config = json.loads((tiny_rm / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_type": "llama3", "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    changes = [({"mlp_bias": True}, "MLP"), ({"head_dim": 16}, "heads")]
    changes.append(({"rope_parameters": rope}, "llama3"))
    for number, (change, words) in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_rm, folder)
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UsageError, match=words):
            to_internlm2(str(folder), tmp_path / "out")


def test_a_taken_target_is_refused_and_a_failed_run_leaves_nothing(tmp_path):
    source = build_official(tmp_path / "a")
    target = tmp_path / "b"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists"):
        to_llama(str(source), target)
    assert (target / "mine").read_text() == "x"
    (target / "mine").unlink()
    (source / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(MissingError, match=r"model\.safetensors"):
        to_llama(str(source), target)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "b"]
    build_official(source)
    (tmp_path / ".b.part").mkdir()  # a killed run's
    (tmp_path / ".b.part/model.safetensors").write_bytes(b"half")
    to_llama(str(source), target)
    assert rewards(target) == pytest.approx(rewards(source), abs=1e-5)
    with pytest.raises(UsageError, match="is no folder"):
        to_llama(str(source), tmp_path / "x/y")


def test_a_hub_id_is_read_from_the_cache_without_its_code(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--rm/snapshots/0123456789012345678901234567890123456789"
    canary = tmp_path / "canary"
    build_official(snapshot, format="bin", canary=canary)
    refs = tmp_path / "models--org--rm/refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert rewards("org/rm") == pytest.approx(rewards(snapshot), abs=1e-5)
    to_llama("org/rm", tmp_path / "b")
    assert rewards(tmp_path / "b") == pytest.approx(rewards(snapshot), abs=1e-5)
    assert not canary.exists()
