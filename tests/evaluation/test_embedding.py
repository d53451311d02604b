"""The embedding baseline against transformers, one text at a time and without padding."""

import json

import pytest
import torch
from tiny import build_lm

from polarctl.cli import run
from polarctl.evaluation.embedding import Embedder
from polarctl.records import Record


def test_similarity_is_the_cosine_of_mean_hidden_states(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    build_lm(tmp_path / "lm", seed=3)
    model = AutoModel.from_pretrained(tmp_path / "lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")

    def embed(text):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            return model(ids).last_hidden_state[0].mean(0)

    texts = ["yes", "yes it is so, and more than that", "no", ""]
    records = [
        Record({"prompt": "q", "reference": ref, "chosen": a, "rejected": b})
        for ref, a, b in [(texts[0], texts[1], texts[2]), (texts[1], texts[1], texts[3])]
    ]
    records.append(Record({"prompt": "q", "chosen": "a", "rejected": "b"}))
    found = Embedder(str(tmp_path / "lm"), "cpu").similarities(records)
    for record, near in zip(records[:2], found[:2], strict=True):
        for side, value in zip(("chosen", "rejected"), near, strict=True):
            expected = 0.0
            if record[side]:
                pair = embed(record["reference"]), embed(record[side])
                expected = float(torch.nn.functional.cosine_similarity(*pair, dim=0))
            assert value == pytest.approx(expected, abs=1e-5)
    assert found[1][0] == pytest.approx(1)
    assert found[2] is None

    rows = [{**record, "rewards": [1, 0]} for record in records[:2]]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "v.jsonl"
    assert run(["eval", str(path), "--embedding", str(tmp_path / "lm"), "-o", str(out), "-q"]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [v["baselines"]["embedding"] for v in verdicts] == [
        float(near[0] > near[1]) for near in found[:2]
    ]
    assert run(["eval", str(path), "--embedding", str(tmp_path / "none"), "-o", "-", "-q"]) == 4
