"""A published checkpoint gives the rewards of its architecture, and nothing of it is executed."""

import json

import pytest
import torch
from model.internlm2 import oracle
from model.internlm2.official import REWARD, build_official, weights, write_weights

from polarctl.errors import MissingError, UsageError
from polarctl.model import reward_model
from polarctl.model.internlm2 import layout
from polarctl.model.internlm2.layout import Heads
from polarctl.model.positions import kind_of_length


def content(folder):
    return json.loads((folder / "config.json").read_text())


def ids_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (length,), generator=generator).tolist()


def ours(made, *sequences):
    with torch.inference_mode():
        return reward_model.rewards(made.model, *reward_model.pad(sequences, 0, "cpu")).tolist()


@pytest.mark.parametrize("format", ["bin", "safetensors"])
@pytest.mark.parametrize("sharded", [False, True])
def test_rewards_are_those_of_the_architecture_below_and_beyond_the_longest_position(
    tmp_path, format, sharded
):
    folder = build_official(tmp_path, format=format, sharded=sharded, max_positions=32)
    made = reward_model.load(str(folder))
    assert type(made.model).__name__ == "LlamaForSequenceClassification"
    settings = content(folder)
    state = weights(settings)
    for length in (1, 20, 32, 33, 50):
        ids = ids_of(length, seed=length)
        wanted = oracle.reward(state, settings, ids)
        assert ours(made, ids) == pytest.approx([wanted], abs=1e-5), length


def test_the_oracle_sees_the_scaling_beyond_the_longest_position(tmp_path):
    settings = content(build_official(tmp_path, max_positions=32))
    state, unscaled = weights(settings), {**settings, "rope_scaling": None}
    for length, same in ((32, True), (50, False)):
        both = [oracle.reward(state, x, ids_of(length)) for x in (settings, unscaled)]
        assert (abs(both[0] - both[1]) < 1e-6) is same
    # 10000 * (2 * 50 / 32 - 1) ** (8 / 6) = 10000 * 2.125 ** (4 / 3) = 27321
    assert oracle.frequencies(settings, 50)[1] == pytest.approx(27321 ** (-2 / 8), rel=1e-4)


@pytest.mark.parametrize(
    ("bias", "scaling"), [(True, None), (False, {"rope_type": "linear", "type": "linear"})]
)
def test_biases_and_linear_scaling(tmp_path, bias, scaling):
    folder = build_official(
        tmp_path, bias=bias, scaling=scaling and {**scaling, "factor": 4.0}, max_positions=32
    )
    made, settings, ids = reward_model.load(str(folder)), content(folder), ids_of(20)
    wanted = oracle.reward(weights(settings), settings, ids)
    assert ours(made, ids) == pytest.approx([wanted], abs=1e-5)


def test_a_long_input_does_not_change_what_comes_after_it(tmp_path):
    made = reward_model.load(str(build_official(tmp_path, max_positions=32)))
    lengths = (20, 32, 40, 50)
    # Each by a model that has seen nothing else.
    fresh = [ours(reward_model.load(str(tmp_path)), ids_of(length)) for length in lengths]
    for length, wanted in zip(lengths, fresh, strict=True):
        ours(made, ids_of(60))
        assert ours(made, ids_of(length)) == wanted, length


def test_a_reward_does_not_depend_on_its_batch_up_to_the_limit_and_beyond_it(tmp_path):
    folder = build_official(tmp_path, max_positions=32)
    made, settings = reward_model.load(str(folder)), content(folder)
    batch = [ids_of(20), ids_of(32, 1), ids_of(50, 2), ids_of(60, 3), ids_of(33, 4)]
    wanted = [oracle.reward(weights(settings), settings, ids) for ids in batch]
    assert ours(made, *batch) == pytest.approx(wanted, abs=1e-5)


def test_scaling_that_no_input_reaches_is_left_out_and_said(tmp_path, capsys):
    folder = build_official(tmp_path, max_positions=32768)
    made = reward_model.load(str(folder))
    assert made.model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert kind_of_length(made.model.config) is None
    assert "32,768" in capsys.readouterr().err
    settings, ids = content(folder), ids_of(40)
    wanted = oracle.reward(weights(settings), settings, ids)
    assert ours(made, ids) == pytest.approx([wanted], abs=1e-5)


def test_a_config_that_transformers_5_has_saved_again_means_the_same(tmp_path):
    folder = build_official(tmp_path, max_positions=32)
    before = ours(reward_model.load(str(folder)), ids_of(50))
    settings = content(folder)
    scaling = settings.pop("rope_scaling")
    settings["rope_parameters"] = {
        "rope_type": scaling["type"],
        "factor": scaling["factor"],
        "rope_theta": settings.pop("rope_theta"),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    assert ours(reward_model.load(str(folder)), ids_of(50)) == before


def test_the_template_is_the_published_one_with_the_token_that_the_config_names(tmp_path):
    folder = build_official(tmp_path / "a", tokenizer="model", max_positions=32768)
    made = reward_model.load(str(folder))
    wanted = ("<|reward|>", REWARD, 16384, 4096, "right")
    encoder = made.encoder
    assert wanted == (
        encoder.separator,
        encoder.reward_token,
        encoder.max_length,
        encoder.max_response_length,
        encoder.cut_side,
    )
    assert made.encoder.encode("q", "r", "o")[-1] == content(folder)["reward_token_id"]
    assert made.tokenizer.pad_token_id == 2

    other = {**content(folder), "reward_token_id": content(folder)["reward_token_id"] - 1}
    (folder / "config.json").write_text(json.dumps(other))
    made = reward_model.load(str(folder))
    assert made.encoder.reward_token == "[UNUSED_TOKEN_13]"
    assert made.encoder.encode("q", "r", "o")[-1] == other["reward_token_id"]


def test_a_fused_weight_is_divided_by_key_value_heads():
    heads = Heads(kv=2, group=2, dim=1)  # rows: q1 q2 k v of head 1, then of head 2
    fused = torch.tensor([[10.0], [11], [12], [13], [20], [21], [22], [23]])
    parts = [layout.split(fused, which, heads) for which in "qkv"]
    assert [part.flatten().tolist() for part in parts] == [[10, 11, 20, 21], [12, 22], [13, 23]]
    assert torch.equal(layout.fuse(*parts, heads), fused)


def test_training_goes_on_from_a_reward_model_and_starts_from_a_causal_lm(tmp_path):
    rm = build_official(tmp_path / "rm")
    again = reward_model.create(base=str(rm))
    assert torch.equal(again.model.score.weight, weights(content(rm))["v_head.weight"])
    base = build_official(tmp_path / "lm", architecture="InternLM2ForCausalLM", seed=5)
    made = reward_model.create(base=str(base))
    assert made.model.score.weight.abs().sum().item() == 0
    kept = weights(content(base), seed=5)["model.layers.1.feed_forward.w2.weight"]
    assert torch.equal(made.model.model.layers[1].mlp.down_proj.weight, kept)
    made.model(torch.tensor([ids_of(4)])).logits.sum().backward()
    made.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["polar"]["separator"]
    reward_model.load(str(tmp_path / "saved"))


def test_missing_unknown_and_misshaped_weights_are_named(tmp_path):
    folder = build_official(tmp_path)
    whole = weights(content(folder))

    def refused(change, *words):
        tensors = dict(whole)
        change(tensors)
        write_weights(folder, tensors, format="safetensors", sharded=False)
        with pytest.raises(MissingError) as caught:
            reward_model.load(str(folder))
        assert all(word in str(caught.value) for word in words), caught.value

    wqkv = "model.layers.1.attention.wqkv.weight"
    refused(lambda x: x.pop("v_head.weight"), "missing", "v_head.weight")
    refused(lambda x: x.pop(wqkv), "missing", wqkv)
    refused(lambda x: x.update(Plora_A=torch.zeros(2)), "unknown", "Plora_A")
    refused(lambda x: x.update({wqkv: x[wqkv][:-8]}), wqkv, "(56, 32)")
    refused(lambda x: x.update({wqkv: x[wqkv][:-1]}), wqkv, "(63, 32)")
    refused(lambda x: x.update({"v_head.weight": torch.zeros(2, 32)}), "v_head", "(2, 32)")


def test_names_without_model_and_old_buffers_are_read_too(tmp_path):
    folder = build_official(tmp_path)
    before = ours(reward_model.load(str(folder)), ids_of(9))
    tensors = {k.removeprefix("model."): v for k, v in weights(content(folder)).items()}
    tensors["layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(4)
    write_weights(folder, tensors, format="safetensors", sharded=False)
    assert ours(reward_model.load(str(folder)), ids_of(9)) == before


def test_other_architectures_scalings_and_lost_shards_are_refused(tmp_path):
    folder = build_official(tmp_path, sharded=True)
    whole = content(folder)
    for change, error, words in (
        ({"architectures": ["InternLM2ForQuestionAnswering"]}, UsageError, "QuestionAnswering"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, UsageError, "yarn"),
        ({"hidden_size": None}, UsageError, "hidden_size"),
    ):
        (folder / "config.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(error, match=words):
            reward_model.load(str(folder))
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match="model-00002-of-00002"):
        reward_model.load(str(folder))


def test_an_index_cannot_point_out_of_its_folder(tmp_path):
    folder = build_official(tmp_path / "a", sharded=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../a/model-00001"))
    with pytest.raises(MissingError, match="not in its folder"):
        reward_model.load(str(folder))


# -- nothing is executed --------------------------------------------------------------------------


class Canary:
    """A pickle that makes a file when it is opened carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("tokenizer", ["json", "model"])
def test_code_in_the_folder_is_not_executed(tmp_path, tokenizer):
    canary = tmp_path / "canary"
    folder = build_official(tmp_path / "rm", format="bin", tokenizer=tokenizer, canary=canary)
    exec((folder / "modeling_internlm2.py").read_text(), {})  # the canary does sing
    assert canary.exists()
    canary.unlink()
    made = reward_model.load(str(folder))
    assert len(ours(made, made.encoder.encode("a", "b", "c"))) == 1
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_more_than_weights_is_refused_and_not_executed(tmp_path, zipped):
    canary = tmp_path / "canary"
    folder = build_official(tmp_path / "rm", format="bin")
    tensors = {**weights(content(folder)), "v_head.weight": Canary(canary)}
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(MissingError, match="more than weights") as caught:
        reward_model.load(str(folder))
    assert caught.value.exit_status == 4
    assert not canary.exists()
    torch.load(file, weights_only=False)  # the canary does sing
    assert canary.exists()


def test_a_broken_weight_file_is_one_line(tmp_path):
    for format, name in (("bin", "pytorch_model.bin"), ("safetensors", "model.safetensors")):
        folder = build_official(tmp_path / format, format=format)
        whole = (folder / name).read_bytes()
        for broken in (b"", b"no weights", whole[: len(whole) // 2]):
            (folder / name).write_bytes(broken)
            with pytest.raises(MissingError) as caught:
                reward_model.load(str(folder))
            assert name in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_old_torch_versions_are_read(tmp_path):
    folder = build_official(tmp_path, format="bin")
    before = ours(reward_model.load(str(folder)), ids_of(9))
    tensors = weights(content(folder))
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert ours(reward_model.load(str(folder)), ids_of(9)) == before
