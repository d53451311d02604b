"""What a run says of itself at its end, and the pictures that it leaves."""

import json
from pathlib import Path

import pytest
from tiny import with_options

from polarctl import cli
from polarctl.evaluation import course
from polarctl.training import outcome


def entry(step, loss, accuracy, **more):
    return {"step": step, "loss": loss, "accuracy": accuracy, "lr": 1e-3, **more}


def test_figures_are_means_over_the_last_tenth_and_the_best_validation():
    # 40 steps: the last four have losses 4, 3, 2, 1, and the last batch alone would say 1.
    entries = [entry(i, 41 - i, i / 40) for i in range(1, 41)]
    entries[9] |= {"val_loss": 0.5, "val_accuracy": 0.75}
    entries[39] |= {"val_loss": 0.625, "val_accuracy": 0.875}
    assert outcome.figures(entries) == {
        "loss": 2.5,
        "accuracy": pytest.approx((37 + 38 + 39 + 40) / 4 / 40),
        "averaged_steps": 4,
        "held_out_loss": 0.625,
        "held_out_accuracy": 0.875,
        "held_out_step": 40,
        "best_loss": 0.5,
        "best_accuracy": 0.75,
        "best_step": 10,
    }
    assert outcome.figures(entries[:1]) == {"loss": 40, "accuracy": 1 / 40, "averaged_steps": 1}
    assert outcome.figures(entries * 20)["averaged_steps"] == 50


def test_a_page_escapes_what_it_is_called_and_a_short_run_has_none(tmp_path):
    entries = [entry(i, 1.0, 0.5) for i in range(1, course.FEW + 1)]
    found = outcome.figures(entries)
    assert course.draw(entries[:-1], found, tmp_path, "a") == []
    assert course.draw(entries, found, tmp_path, "pretrain: <b>") == ["curves.png", "training.html"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "training.html").read_text()
    assert "pretrain: &lt;b&gt;" in page and "data:image/png;base64," in page and "<b>" not in page


def test_a_run_ends_with_its_figures_its_pictures_and_the_next_command(tiny_lm, tmp_path, capfd):
    data, out = tmp_path / "t.jsonl", tmp_path / "my runs" / "rm"
    rows = [
        {"prompt": f"q{i}", "reference": right, "chosen": right, "rejected": wrong}
        for i in range(40)
        for right, wrong in [("yes", "no") if i % 2 else ("no", "yes")]
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["pretrain", str(data), "-m", str(tiny_lm), "-o", str(out), "--device", "cpu"]
    more = ["--lr", "1e-3", "--batch-size", "4", "--max-steps", "20", "--val-fraction", "0.3"]
    more += ["--val-steps", "5", "--report-to", "tensorboard"]
    assert cli.run(with_options(base, more)) == 0
    said = capfd.readouterr().err
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    mean = sum(e["loss"] for e in entries[-2:]) / 2
    assert f"training: loss {mean:.4f}" in said and "(mean of the last 2 steps)" in said
    best = min((e for e in entries if "val_loss" in e), key=lambda e: e["val_loss"])
    assert f"best after step {best['step']}: loss {best['val_loss']:.4f}" in said
    assert f"curves: {out}/curves.png, {out}/training.html" in said
    assert f"TensorBoard: tensorboard --logdir '{out}/runs'" in said and (out / "runs").is_dir()
    assert said.splitlines()[-1] == (
        f"next: polarctl finetune RANKED.jsonl -m '{out}' -o '{out}-tuned'"
    )
    counts = json.loads((out / "manifest.json").read_text())
    assert counts["counts"]["best_step"] == best["step"]
    assert {"curves.png", "training.html"} <= set(counts["outputs"])
    assert Path(out / "curves.png").stat().st_size > 10_000
