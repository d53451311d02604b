"""A model that is not what was saved gives no reward: other bytes, another config, other names."""

import hashlib
import json
import random
import shutil

import pytest
from safetensors.torch import load_file, save_file

from polarctl import cli
from polarctl.errors import UsageError
from polarctl.model import reward_model
from polarctl.storage import manifest


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "candidates.jsonl"
    path.write_text('{"prompt": "a", "reference": "b", "output": "c"}\n')
    return path


def copied(model, folder, *, named=True):
    """A copy of a model with a manifest that is written here, not by the program."""
    shutil.copytree(model, folder)
    outputs = {
        file.name: {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "bytes": file.stat().st_size,
        }
        for file in folder.iterdir()
    }
    if named:
        (folder / "manifest.json").write_text(json.dumps({"stage": "x", "outputs": outputs}))
    return folder


def score(candidates, model):
    return cli.run(["score", str(candidates), "-m", str(model), "--device", "cpu", "-q"])


def refusal(model):
    """Why its config, which everything that loads a model asks for first, is not given."""
    try:
        reward_model.load_config(str(model))
    except UsageError as error:
        assert error.exit_status == 2 and error.hint
        return str(error)
    return None


def change_config(model, **fields):
    content = json.loads((model / "config.json").read_bytes())
    for name, value in fields.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    (model / "config.json").write_text(json.dumps(content))


def test_a_flipped_bit_in_any_file_is_found_before_anything_is_loaded(
    tmp_path, tiny_rm, candidates, capfd
):
    model = copied(tiny_rm, tmp_path / "rm")
    assert refusal(model) is None
    chance = random.Random(14)
    for file in [f for f in model.iterdir() if f.name != "manifest.json"] * 3:
        whole = file.read_bytes()
        broken, place = bytearray(whole), chance.randrange(len(whole) * 8)
        broken[place // 8] ^= 1 << place % 8
        file.write_bytes(broken)
        assert refusal(model) == f"{file}: is not the file that {model}/manifest.json names", place
        if file.name == "model.safetensors":
            assert score(candidates, model) == 2
            assert not capfd.readouterr().out
        file.write_bytes(whole)
    assert refusal(model) is None


@pytest.mark.parametrize(
    "fields", [{"polar": None}, {"num_hidden_layers": 1}, {"rms_norm_eps": 0.5}]
)
def test_a_changed_config_is_found_where_there_is_a_manifest(tmp_path, tiny_rm, fields):
    model = copied(tiny_rm, tmp_path / "rm")
    change_config(model, **fields)
    assert (refusal(model) or "").startswith(f"{model}/config.json: is not the file")
    (model / "manifest.json").unlink()  # as the hint says, for who has changed it himself
    assert refusal(model) is None


def test_a_file_that_the_manifest_names_and_that_is_gone_is_found(tmp_path, tiny_rm):
    model = copied(tiny_rm, tmp_path / "rm")
    (model / "tokenizer_config.json").unlink()
    assert (refusal(model) or "").startswith(f"{model}/tokenizer_config.json: is not the file")


def test_other_files_and_other_programs_manifests_are_no_fault(tmp_path, tiny_rm):
    model = copied(tiny_rm, tmp_path / "rm")
    (model / "notes.txt").write_text("mine")
    assert refusal(model) is None
    for content in ("[]", "{", '{"name": "a web page"}', '{"outputs": {"a.txt": 3}}'):
        (model / "manifest.json").write_text(content)
        assert refusal(model) is None


def test_a_large_model_is_compared_by_size_and_that_is_said(tmp_path, tiny_rm, capfd, monkeypatch):
    monkeypatch.setattr(manifest, "_WHOLE_MODEL_BYTES", 10)
    model = copied(tiny_rm, tmp_path / "rm")
    assert refusal(model) is None
    assert "model files: sizes compared with the manifest, not hashes" in capfd.readouterr().err
    with open(model / "model.safetensors", "ab") as stream:
        stream.write(b"\0")
    assert refusal(model) is not None


def test_weights_that_the_config_has_no_place_for_are_refused(tmp_path, tiny_rm, candidates, capfd):
    """Without a manifest: a config with fewer layers, and weights of Qwen3 under Llama's name."""
    model = copied(tiny_rm, tmp_path / "rm", named=False)
    change_config(model, num_hidden_layers=1)
    assert score(candidates, model) == 4
    err = capfd.readouterr().err
    assert "has no place for 9 weights, such as model.layers.1." in err
    model = copied(tiny_rm, tmp_path / "qwen", named=False)
    weights = load_file(model / "model.safetensors")
    norm = weights["model.layers.0.input_layernorm.weight"][:8].clone()
    weights["model.layers.0.self_attn.q_norm.weight"] = norm
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert score(candidates, model) == 4
    err = capfd.readouterr().err
    assert "has no place for 1 weights, such as model.layers.0.self_attn.q_norm.weight" in err


def test_a_base_model_that_is_used_in_part_is_said(tmp_path, tiny_lm, capfd):
    base = copied(tiny_lm, tmp_path / "base", named=False)
    reward_model.create(base=str(base))
    assert "no place" not in capfd.readouterr().err
    change_config(base, num_hidden_layers=1)
    made = reward_model.create(base=str(base))
    assert made.model.config.num_hidden_layers == 1
    assert "has no place for 9 weights, such as model.layers.1." in capfd.readouterr().err
