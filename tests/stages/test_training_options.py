"""What a training run's options do, as the user sees it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import with_options

from polarctl.cli import run

WORDS = ["yes", "no", "maybe so", "who knows"]


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    path = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    with open(path, "w") as stream:
        for i in range(64):
            right, *others = WORDS[i % 4 :] + WORDS[: i % 4]
            row = {
                "prompt": f"q{i}",
                "reference": right,
                "chosen": right,
                "rejected": others[0],
                "negatives": others[1:],
            }
            stream.write(json.dumps(row) + "\n")
    return path


def train(triples, tiny_lm, out, *options, stage="pretrain"):
    base = [stage, str(triples), "-m", str(tiny_lm), "-o", str(out), "--device", "cpu"]
    return run(with_options([*base, "--lr", "1e-3", "--batch-size", "8"], options))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_prefixes_shared_or_not_give_the_same_run(triples, tiny_lm, tmp_path):
    for name in ("shared", "no-shared"):
        assert train(triples, tiny_lm, tmp_path / name, f"--{name}-prefix", "-q") == 0
    shared, padded = metrics(tmp_path / "shared"), metrics(tmp_path / "no-shared")
    assert len(shared) == 8
    for a, b in zip(shared, padded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["tokens"] == b["tokens"] and a["computed"] < b["computed"]


def test_several_negatives_train_on_more_tokens(triples, tiny_lm, tmp_path):
    for negatives in ("1", "3"):
        assert train(triples, tiny_lm, tmp_path / negatives, "--negatives", negatives, "-q") == 0
    one, three = metrics(tmp_path / "1"), metrics(tmp_path / "3")
    assert one[0]["pairs"] == three[0]["pairs"] == 8
    assert one[0]["loss"] == pytest.approx(math.log(2)) == three[0]["loss"]
    # Four candidates in place of two.
    assert 1.7 < three[0]["tokens"] / one[0]["tokens"] < 2.3


def test_held_out_prompts_are_measured_and_the_best_model_is_kept(
    triples, tiny_lm, tmp_path, capfd
):
    out = tmp_path / "rm"
    options = ["--val-fraction", "0.25", "--val-steps", "4", "--epochs", "2"]
    assert train(triples, tiny_lm, out, *options) == 0
    assert "held out: loss" in capfd.readouterr().err
    rows = metrics(out)
    measured = [row["step"] for row in rows if "val_loss" in row]
    assert measured == [*range(4, len(rows) + 1, 4), *([len(rows)] if len(rows) % 4 else [])]
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["triples"] + counts["held_out"] == 64 and 4 <= counts["held_out"] <= 32
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    same = best["step"] == len(rows)
    ours, last = (load_file(path / "model.safetensors") for path in (out / "best", out))
    assert all((ours[k] == last[k]).all() for k in last) is same
    # The best model is whole: it scores.
    scores = tmp_path / "scores.jsonl"
    assert run(["score", str(triples), "-m", str(out / "best"), "-o", str(scores), "-q"]) == 0


def test_lora_trains_adapters_and_head_and_writes_a_plain_model(triples, tiny_lm, tmp_path, capfd):
    out = tmp_path / "rm"
    options = ["--lora-rank", "4", "--lr", "2e-2", "--epochs", "8"]
    assert train(triples, tiny_lm, out, *options) == 0
    assert "weights are trained" in capfd.readouterr().err
    assert metrics(out)[-1]["loss"] < 0.5
    weights = load_file(out / "model.safetensors")
    base = load_file(tiny_lm / "model.safetensors")
    assert weights["score.weight"].abs().max() > 0
    assert not any("lora" in name for name in weights)
    # Adapters are in the linear layers; what has none is as it was.
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not weights[name].equal(base[name])
    assert weights["model.norm.weight"].equal(base["model.norm.weight"])
    old = base["model.embed_tokens.weight"]
    assert weights["model.embed_tokens.weight"][: len(old)].equal(old)
    assert (out / "adapter/adapter_model.safetensors").exists()
    scores = tmp_path / "scores.jsonl"
    assert run(["score", str(triples), "-m", str(out), "-o", str(scores), "-q"]) == 0
    rewards = [json.loads(line)["rewards"] for line in scores.read_text().splitlines()]
    right = sum(chosen > rejected for chosen, rejected in rewards) / len(rewards)
    assert right == 1.0 or right >= metrics(out)[-1]["accuracy"] - 0.2


def test_workers_change_nothing(triples, tiny_lm, tmp_path):
    for workers in ("0", "2"):
        assert train(triples, tiny_lm, tmp_path / workers, "--workers", workers, "-q") == 0
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("0", "2"))
    assert first == second


def test_tensorboard_gets_the_figures(triples, tiny_lm, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "rm"
    assert train(triples, tiny_lm, out, "--report-to", "tensorboard", "-q") == 0
    found = EventAccumulator(str(out / "runs")).Reload().Scalars("loss")
    assert [point.step for point in found] == list(range(1, 9))
    assert [point.value for point in found] == pytest.approx(
        [row["loss"] for row in metrics(out)], rel=1e-6
    )


@pytest.mark.parametrize("name", ["nonsense", "trackio"])
def test_a_tracker_that_is_not_there_is_said_before_anything_is_read(
    name, triples, tiny_lm, tmp_path, capfd
):
    status = train(triples, tiny_lm, tmp_path / "rm", "--report-to", name)
    said = capfd.readouterr().err
    assert (status, f"--report-to {name}" in said) == (2 if name == "nonsense" else 4, True)
    assert "64" not in said


def test_a_preset_changes_the_loss(triples, tiny_lm, tmp_path):
    assert train(triples, tiny_lm, tmp_path / "rm", "--preset", "internlm2", "-q") == 0
    # Equal rewards of 0: P = 1/2, so the focal weight is 1; each barrier -(log 5 + log 5).
    wanted = math.log(2) + 0.02 * 2 * -2 * math.log(5)
    assert metrics(tmp_path / "rm")[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_what_is_given_beside_a_preset_wins(triples, tiny_lm, tmp_path):
    options = ["--preset", "internlm2", "--penalty", "none", "--margin", "1"]
    assert train(triples, tiny_lm, tmp_path / "rm", *options, "-q") == 0
    # d = 0 - 1: P < 1/2, so the weight is 1 and the loss -log sigmoid(-1) = log(1 + e).
    assert metrics(tmp_path / "rm")[0]["loss"] == pytest.approx(math.log(1 + math.e), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "polra"], "invalid value for `--preset`: `polra` is not one of"),
        (["--loss", "hinge"], "hinge"),
        (["--penalty", "l3"], "l3"),
        (["--dtype", "float16"], "`float16` is not one of"),
        (["--shard", "0/2"], "no such option: --shard"),
        (["--manifest", "m.json"], "no such option: --manifest"),
        (["--max-length", "129"], "takes 128 tokens at most"),
        (["--epochs", "0"], "invalid value for `--epochs`"),
        (["--deepspeed", "zero4"], "zero4"),
        (["--val-fraction", "0.000001"], "holds out 0 triples"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said, triples, tiny_lm, tmp_path, capfd):
    assert train(triples, tiny_lm, tmp_path / "rm", *options) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "rm/model.safetensors").exists()


def test_without_lr_and_batch_size_the_law_is_printed(triples, tiny_lm, tmp_path, capfd):
    arguments = ["pretrain", str(triples), "-m", str(tiny_lm), "-o", str(tmp_path / "rm")]
    assert run([*arguments, "--base-tokens", "4T", "--dry-run"]) == 0
    said = capfd.readouterr().err
    assert "lr: " in said and "D_p = 4e+12 tokens of the base model" in said
    assert "the law is extrapolated" in said


def test_finetuning_says_what_few_data_get(triples, tiny_lm, tmp_path, capfd):
    arguments = ["finetune", str(triples), "-m", str(tiny_lm), "-o", str(tmp_path / "rm")]
    assert run([*arguments, "--dry-run"]) == 0
    said = capfd.readouterr().err
    assert "lr: " in said and "batch size: 8 (64 triples" in said and "epochs: 4" in said


def test_a_dry_run_prints_the_plan(triples, tiny_lm, tmp_path, capfd):
    assert train(triples, tiny_lm, tmp_path / "rm", "--epochs", "3", "--dry-run") == 0
    said = capfd.readouterr().err
    for part in ("64 triples", "saved", "full", "steps: 24 of 8 triples", "memory: about"):
        assert part in said, part
    assert not (tmp_path / "rm").exists()


def test_the_batch_that_is_said_is_the_one_in_force(triples, tiny_lm, tmp_path, capfd):
    base = ["finetune", str(triples), "-m", str(tiny_lm), "-o", str(tmp_path / "rm")]
    assert run([*base, "--batch-size", "4", "--dry-run"]) == 0
    said = capfd.readouterr().err
    assert "of 4 triples" in said and "--batch-size 4" in said and "320" not in said


def test_triples_that_are_cut_are_said_with_the_limit_and_the_remedy(
    triples, tiny_lm, tmp_path, capfd
):
    options = ["--max-length", "64", "--max-response-length", "2", "--dry-run"]
    assert train(triples, tiny_lm, tmp_path / "rm", *options) == 0
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "are cut" in line]
    assert "longer than --max-length 64 and --max-response-length 2 allow" in said
    assert "larger values read more" in said


def test_rejects_of_another_run_are_not_overwritten(triples, tiny_lm, tmp_path, capfd):
    kept = tmp_path / "rejects.jsonl"
    kept.write_text("precious\n")
    assert train(triples, tiny_lm, tmp_path / "rm", "--rejects", str(kept)) == 2
    assert "is not replaced" in capfd.readouterr().err and kept.read_text() == "precious\n"


def test_gradient_checkpointing_gives_the_same_weights(triples, tiny_lm, tmp_path):
    for name, option in (("plain", []), ("again", ["--gradient-checkpointing"])):
        assert train(triples, tiny_lm, tmp_path / name, *option, "-q") == 0
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "again"))
    assert first == second


def test_bad_rows_are_set_aside_also_where_the_data_is_not_counted(triples, tiny_lm, tmp_path):
    data = tmp_path / "triples.jsonl"
    rows = triples.read_text().splitlines(keepends=True)
    data.write_text("".join([*rows, '{"prompt": 3}\n']))
    rejects = tmp_path / "rejects.jsonl"
    options = ["--max-steps", "2", "--rejects", str(rejects), "-q"]
    assert train(data, tiny_lm, tmp_path / "rm", *options) == 0
    (bad,) = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert bad["where"] == f"{data}:65"


@pytest.mark.parametrize(
    "saves", [("--save-steps", "1"), ("--save-steps", "1000", "--save-minutes", "1e-9")]
)
def test_a_run_that_diverges_stops_with_status_1_and_keeps_its_checkpoint(
    saves, triples, tiny_lm, tmp_path, capfd
):
    out = tmp_path / "rm"
    options = ["--lr", "1e30", "--epochs", "4", "--warmup", "0", *saves]
    assert train(triples, tiny_lm, out, *options) == 1
    assert "not finite, stopped" in capfd.readouterr().err
    last = metrics(out)[-1]
    assert last["loss"] in ("nan", "inf") or last["grad_norm"] in ("nan", "inf")
    assert not (out / "model.safetensors").exists()
    kept = sorted((out / "checkpoints").iterdir())
    assert kept and int(kept[-1].name[-8:]) == last["step"] - 1
    weights = load_file(kept[-1] / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_bfloat16_computes_in_half_and_keeps_whole_weights(triples, tiny_lm, tmp_path):
    out = tmp_path / "rm"
    options = ["--dtype", "bfloat16", "--epochs", "6", "--lr", "3e-3", "-q"]
    assert train(triples, tiny_lm, out, *options) == 0
    assert metrics(out)[-1]["accuracy"] > 0.9
    weights = load_file(out / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.bfloat16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(triples, tiny_lm, tmp_path):
    """Through the program: it starts the processes and passes on what the first one prints."""
    import subprocess
    import sys

    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--batch-size", "7", "--epochs", "2", "--negatives", "2", "--batch-tokens", "90"]
    assert train(triples, tiny_lm, one, *options, "-q") == 0
    result = subprocess.run(
        [
            *[sys.executable, "-m", "polarctl", "pretrain", str(triples), "-m", str(tiny_lm)],
            *["-o", str(two), "--lr", "1e-3", *options, "--gpus", "2", "--device", "cpu"],
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{two}\n"
    assert result.stderr.count("pretrain: done after") == 1
    assert "torchrun --standalone --nproc-per-node 2 -m polarctl pretrain" in result.stderr
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["pairs"] == b["pairs"] == 7 and a["tokens"] == b["tokens"]
        for key in ("loss", "accuracy", "margin", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    for name, value in first.items():
        assert (value - second[name]).abs().max() < 1e-4, name


def test_a_learning_rate_of_zero_trains_nothing(triples, tiny_rm, tmp_path):
    options = ["--lr", "0", "--max-steps", "2", "-q"]
    assert train(triples, tiny_rm, tmp_path / "rm", *options, stage="finetune") == 0
    assert [entry["lr"] for entry in metrics(tmp_path / "rm")] == [0.0, 0.0]
    before, after = (load_file(p / "model.safetensors") for p in (tiny_rm, tmp_path / "rm"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_learning_rate_of_zero_without_a_batch_size_stays_zero(
    stage, triples, tiny_lm, tmp_path, capfd
):
    base = [stage, str(triples), "-m", str(tiny_lm), "-o", str(tmp_path / "rm"), "--device", "cpu"]
    assert run([*base, "--lr", "0", "--dry-run"]) == 0
    assert "peak learning rate 0\n" in capfd.readouterr().err


def test_the_plan_of_adapters_counts_the_weights_that_they_train(triples, tiny_lm, tmp_path, capfd):
    """Per layer, rank 1: q 32+32, k and v 32+16, o 32+32, gate, up, down 32+64: 512.

    Two layers, a head of 32 and two new tokens of 32: 2 * 512 + 32 + 64 = 1,120 weights. Each has a
    gradient (4 bytes) and two moments (8): 4.4 KiB and 8.75 KiB, 0.0043 and 0.0085 MiB.
    """
    found = {}
    for name, options in (("all", []), ("lora", ["--lora-rank", "1"])):
        assert train(triples, tiny_lm, tmp_path / "rm", *options, "--dry-run", "--json") == 0
        said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        found[name] = next(line["memory_bytes"] for line in said if "memory_bytes" in line)
    config = json.loads((tiny_lm / "config.json").read_text())
    vocabulary, width = config["vocab_size"] + 2, 32
    per_layer = 2 * width * width + 2 * 16 * width + 3 * 64 * width + 2 * width
    everything = vocabulary * width + 2 * per_layer + width + width
    adapters = 2 * 512
    delta = adapters + 64  # copies of the new tokens' embeddings are weights, too
    assert found["all"] - found["lora"] == pytest.approx(
        12 * everything - 12 * (adapters + 32 + 64) - 4 * delta, abs=4 * 32 * 2
    )


def test_a_reward_model_is_tuned_with_the_lengths_that_are_asked_for(
    triples, tiny_rm, tmp_path, capfd
):
    options = ["--max-steps", "1", "--max-length", "100", "--max-response-length", "2"]
    assert train(triples, tiny_rm, tmp_path / "a", *options, stage="finetune") == 0
    assert "template: max_length 100, max_response_length 2 (asked for; " in capfd.readouterr().err
    told = json.loads((tmp_path / "a/config.json").read_text())["polar"]
    assert (told["max_length"], told["max_response_length"]) == (100, 2)
    assert train(triples, tiny_rm, tmp_path / "b", "--tokenizer", "x", stage="finetune") == 2
    assert "is a reward model and keeps its own" in capfd.readouterr().err
