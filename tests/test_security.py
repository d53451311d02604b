"""A model folder is data: no pickle and no code in it runs, whichever stage reads it.

`docs/SECURITY.md` names the test of each of its promises; these are those that no other file has.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from polarctl.cli import run

ROOT = Path(__file__).parent.parent
CODE = """
open({canary!r}, "w")
from transformers import AutoConfig as Config, AutoTokenizer as Tokenizer, LlamaForCausalLM as Model
"""
ROWS = {
    "prompts": {"prompt": "The sum is"},
    "candidates": {"prompt": "q", "reference": "a", "output": "b"},
    "triples": {"prompt": "q", "reference": "a", "chosen": "a", "rejected": "b"},
    "judged": {"prompt": "q", "principle": "Be kind", "output": "b"},
}
COMMANDS = {
    "sample": "sample prompts.jsonl -m model -o out.jsonl --samples 1 --max-new-tokens 2",
    "score": "score candidates.jsonl -m model -o out.jsonl",
    "judge": "score judged.jsonl -m model --backend principle -o out.jsonl",
    "pretrain": "pretrain triples.jsonl -m model -o out --max-steps 1",
    "serve": "serve -m model --port 0",
}


class Canary:
    """A pickle that makes a file when it is opened carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def model(tiny_chat_lm, tiny_rm, tmp_path, monkeypatch):
    """Makes the folder that a stage reads, with a manifest of nobody; and the records."""
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    def make(stage):
        source = tiny_rm if stage in ("score", "serve") else tiny_chat_lm
        shutil.copytree(source, "model")
        Path("model/manifest.json").unlink(missing_ok=True)
        config = json.loads(Path("model/config.json").read_text())
        config["max_position_embeddings"] = 4096  # room for a judge's question
        Path("model/config.json").write_text(json.dumps(config))
        return Path("model")

    return make


@pytest.mark.parametrize("stage", COMMANDS)
def test_pickled_weights_are_refused_and_not_opened(stage, model, tmp_path, capfd):
    folder = model(stage)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"weight": Canary(tmp_path / "canary")}, folder / name)
    assert run(COMMANDS[stage].split()) == 4
    assert not (tmp_path / "canary").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the canary does sing
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(
    stage, model, tmp_path, capfd
):
    folder = model(stage)
    code = CODE.format(canary=str(tmp_path / "canary"))
    (folder / "own.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        fields["auto_map"] = {
            "AutoConfig": "own.Config",
            "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"],
            "AutoModelForCausalLM": "own.Model",
            "AutoModelForSequenceClassification": "own.Model",
        }
        (folder / name).write_text(json.dumps({**fields, "model_type": "own"}))
    assert run(COMMANDS[stage].split()) == 4
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "canary").exists()
    exec(code, {})  # the canary does sing
    assert (tmp_path / "canary").exists()


def test_every_promise_names_a_test_that_is_there():
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)
    for promise in re.findall(r"^\* .+(?:\n  .+)*", text, re.MULTILINE):
        assert "`tests/" in promise or promise.startswith("* Records, model folders"), promise
