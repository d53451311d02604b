"""What each method of rft learns from, against plain torch and against arithmetic."""

import copy
import json
import os
import statistics
import subprocess
import sys
import time

import orjson
import pytest
import torch
from safetensors.torch import load_file
from scoring.faulty_server import serving
from tiny import build_rm, with_options
from transformers import AutoModelForCausalLM, AutoTokenizer

from polarctl import cli

GROUP = 4


@pytest.fixture(scope="module")
def reward_model(tiny_lm, tmp_path_factory):
    return build_rm(tmp_path_factory.mktemp("models") / "rm", tiny_lm)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(4)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


@pytest.fixture
def run(prompts, tiny_lm, reward_model):
    """Run rft; its exit status."""

    def of(out, *more):
        options = f"rft {prompts} -m {tiny_lm} -o {out} --reward-model {reward_model} "
        options += "--max-steps 1 --batch-size 16 --num-generations 4 --max-new-tokens 6 "
        options += "--lr 1e-3 --save-steps 100 --device cpu -q"
        words = options.split()
        if "sft" in more:
            for name in ("--reward-model", "--max-new-tokens"):
                del words[words.index(name) : words.index(name) + 2]
        return cli.run(with_options(words, [str(word) for word in more]))

    return of


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def likelihood_step(folder, texts, lr=1e-3):
    """One step of AdamW on the mean negative log-likelihood of answers: loss, norm, weights.

    Args:
        folder: The model.
        texts: (ids of the prompt, ids of the answer).
        lr: Learning rate.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for prompt, answer in texts:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(answer), reduction="none"
        ).unbind()
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0).step()
    return float(loss.detach()), float(norm), dict(model.named_parameters())


def assert_same_step(out, wanted):
    loss, norm, weights = wanted
    (entry,) = lines(out / "metrics.jsonl")
    assert entry["loss"] == pytest.approx(loss, rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4)
    found = load_file(out / "model.safetensors")
    for name, weight in weights.items():
        # AdamW's first step is the gradient's sign: one of nearly zero may have either.
        sure = weight.grad.abs() > 1e-4 * weight.grad.abs().max()
        assert sure.any() and (found[name] - weight).abs()[sure].max() < 1e-6, name


@pytest.mark.parametrize("micro", [[], ["--micro-batch-size", "1"]])
def test_sft_learns_the_references_and_their_end(micro, run, prompts, tiny_lm, tmp_path):
    out, tokenizer = tmp_path / "sft", AutoTokenizer.from_pretrained(tiny_lm)
    assert run(out, "--method", "sft", *micro) == 0
    texts = [
        (tokenizer(r["prompt"])["input_ids"], tokenizer(r["reference"])["input_ids"] + [0])
        for r in lines(prompts)
    ]
    assert tokenizer.eos_token_id == 0
    assert_same_step(out, likelihood_step(tiny_lm, texts))
    assert not (out / "rollouts.jsonl").exists()
    (entry,) = lines(out / "metrics.jsonl")
    assert entry["tokens"] == sum(len(a) + len(b) for a, b in texts)
    assert not {"reward", "floored"} & set(entry)


@pytest.mark.parametrize("micro", [[], ["--micro-batch-size", "2"]])
def test_distill_learns_the_best_of_each_group(micro, run, tiny_lm, tmp_path, monkeypatch):
    from polarctl.rl.callback import Recorder

    out, seen = tmp_path / "best", {}
    guarded = Recorder.guarded

    def watch(self, reward):
        def call(**given):
            seen.update(copy.deepcopy({k: given[k] for k in ("prompts", "completion_ids")}))
            return guarded(self, reward)(**given)

        call.__name__ = "polar"
        return call

    monkeypatch.setattr(Recorder, "guarded", watch)
    # However it was sampled, the likelihood that is raised is the policy's own.
    assert run(out, "--method", "distill", "--temperature", "0.7", *micro) == 0
    rollouts = lines(out / "rollouts.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    texts = []
    for first in range(0, 16, GROUP):
        rewards = [r["reward"] for r in rollouts[first : first + GROUP]]
        best = rewards.index(max(rewards))
        advantages = [r["advantage"] for r in rollouts[first : first + GROUP]]
        assert advantages == [float(place == best) for place in range(GROUP)]
        prompt = tokenizer(seen["prompts"][first + best])["input_ids"]
        texts.append((prompt, list(seen["completion_ids"][first + best])))
    assert_same_step(out, likelihood_step(tiny_lm, texts))


def test_the_first_of_equal_rollouts_is_the_best_and_one_without_an_answer_never():
    from polarctl.rl.methods import best_of

    assert best_of([1, 3, 3, 2, 9, 8], ["", "", "", "cut_off", "cut_off", ""], 3) == [
        *(0, 1, 0),
        *(0, 0, 1),
    ]
    assert best_of([-20, -20], ["empty", "cut_off"], 2) == [0, 0]


def test_rloo_compares_a_rollout_with_the_others_of_its_group(run, tmp_path):
    out = tmp_path / "rloo"
    assert run(out, "--method", "rloo", "--normalize", "polar-1.8b") == 0
    rollouts = lines(out / "rollouts.jsonl")
    for first in range(0, 16, GROUP):
        group = rollouts[first : first + GROUP]
        for record in group:
            others = [r["reward_normalized"] for r in group if r is not record]
            wanted = record["reward_normalized"] - statistics.fmean(others)
            assert record["advantage"] == pytest.approx(wanted, abs=1e-5)
            assert record["reward_normalized"] == pytest.approx((record["reward"] + 10) / 10)


def test_adapters_are_written_beside_the_policy_that_they_are_added_to(run, tiny_lm, tmp_path):
    out = tmp_path / "lora"
    assert run(out, "--lora-rank", "2", "--lora-alpha", "6", "--lr", "1e-2") == 0
    base, made = (load_file(folder / "model.safetensors") for folder in (tiny_lm, out))
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    assert made.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    assert changed == {name for name in base if "_proj.weight" in name}
    name = "model.layers.1.self_attn.v_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert a.shape[0] == b.shape[1] == 2 and b.abs().max() > 0
    torch.testing.assert_close(made[name + ".weight"], base[name + ".weight"] + 6 / 2 * b @ a)


@pytest.mark.parametrize("method", ["rloo", "distill", "sft"])
def test_a_loss_that_is_not_finite_leaves_no_policy(method, run, tmp_path, capsys):
    out = tmp_path / "broken"
    assert run(out, "--method", method, "--lr", "1e30", "--max-steps", "3") == 1
    assert "not finite" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


def dying(fault, after):
    """A scoring server that answers some requests and then fails at every one."""
    answered = []

    def reply(handler, rewards):
        answered.append(1)
        if len(answered) <= after:
            rows = [{"index": i, "probs": [r]} for i, r in enumerate(rewards)]
            handler.reply(200, {"data": rows, "model": "rm"})
        elif fault == "hangs":
            time.sleep(2)
            handler.close_connection = True
        else:
            handler.reply(*{"fails": (500, b"oops"), "garbage": (200, {"hello": 1})}[fault])

    return serving(hostile=reply, always=True)


@pytest.mark.parametrize("fault", ["fails", "hangs", "garbage"])
def test_a_server_that_dies_stops_the_run_and_no_step_is_lost(fault, run, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"

    def go(folder, server):
        options = f"--method distill --max-steps 4 --server {server.url} --server-deadline 0.5"
        return run(folder, *options.split())

    with serving() as server:
        assert go(whole, server) == 0
        a_step = (server.seen["requests"] - 1) // 4  # the first one asks who is there
    with dying(fault, after=2 * a_step) as server:
        assert go(out, server) in (1, 4)
    said = capsys.readouterr().err
    assert "polarctl: " in said and server.url in said and "Traceback" not in said
    saved = [path.parent.name for path in out.glob("checkpoints/*/checkpoint.json")]
    assert saved == ["checkpoint-2"]
    with dying(fault, after=0) as server:  # still gone: nothing more is lost
        assert go(out, server) in (1, 4)
    with serving() as server:
        assert go(out, server) == 0
    for name in ("model.safetensors", "metrics.jsonl", "rollouts.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_zero2_in_two_processes_learns_what_one_process_does(run, prompts, tiny_lm, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "zero2"
    options = "--method sft --max-steps 3 --lr 1e-3"
    assert run(plain, *options.split()) == 0
    command = f"polarctl rft {prompts} -m {tiny_lm} -o {out} {options} --batch-size 16 "
    command += "--num-generations 4 --device cpu --deepspeed zero2 --gpus 2 -q"
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{out}\n"
    one, two = (lines(folder / "metrics.jsonl") for folder in (plain, out))
    assert len(one) == 3
    for before, after in zip(one, two, strict=True):
        assert after == pytest.approx(before, rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (plain, out)]
    start = load_file(tiny_lm / "model.safetensors")
    for name, value in weights[0].items():
        assert ((value - weights[1][name]).abs() < 1e-4).float().mean() > 0.999, name
        assert (value - start[name]).abs().max() > 1e-3  # the steps are real


def test_a_preset_sets_what_is_not_given(run, tmp_path, capsys, tiny_lm, reward_model, prompts):
    from polarctl.config import with_given
    from polarctl.rl.presets import applied
    from polarctl.stages.rft import Config

    config = Config(model="m", reward_model=str(reward_model), preset="polar-paper", lr=2e-6)
    found = applied(with_given(config, {"lr": "command line"}))
    assert (found.lr, found.batch_size, found.kl_coef, found.temperature) == (2e-6, 1024, 0, 1)
    assert found.normalize == "none"  # not the shape of a published model
    said = capsys.readouterr().err
    assert "preset: polar-paper (batch_size 1024, " in said and "lr " not in said
    out = tmp_path / "laptop"
    options = ["--preset", "laptop", "--lora-rank", "2"]
    assert run(out, *options) == 0
    told = json.loads((out / "manifest.json").read_text())
    assert told["config"]["lora_rank"] == 2 and told["config"]["micro_batch_size"] == 4
    assert told["choices"]["preset"]["value"] == "laptop"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--method sft --temperature 0.5", "`--temperature` has no effect here"),
        ("--method rloo --loss-type grpo", "`--loss-type` has no effect here"),
        ("--method distill --kl-coef 0.1", "`--kl-coef` has no effect here"),
        ("--lora-alpha 2", "`--lora-alpha` has no effect here"),
        ("--vllm-server http://x", "`--vllm-server` has no effect here"),
        ("--rollouts vllm-server", "`--rollouts vllm-server` needs `--vllm-server URL`"),
        ("--deepspeed zero9", "zero9: no such DeepSpeed config"),
        ("--method sft --micro-batch-size 3", "multiple of `--num-generations 4` x 3 references"),
        ("--preset laptop --deepspeed zero2 --dtype float16", "does not train with ZeRO"),
    ],
)
def test_what_does_not_fit_is_refused(options, text, run, tmp_path, capsys):
    assert run(tmp_path / "out", *options.split()) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("package", "options"),
    [("vllm", "--rollouts vllm"), ("peft", "--lora-rank 1"), ("deepspeed", "--deepspeed zero2")],
)
def test_a_missing_package_is_named(package, options, run, tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name)
    )
    assert run(tmp_path / "out", *options.split()) == 4
    said = capsys.readouterr().err
    assert f"this needs the package `{package}`" in said and "hint: pip install 'polarctl[" in said


def test_a_reference_is_learned_where_the_policy_would_write_it(tiny_chat_lm):
    from polarctl.rl.references import encode

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_lm)
    row = {"prompt": [{"role": "user", "content": "q"}], "reference": "Paris."}
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("<|end|>", "<|assistant|>")}
    (plain,) = encode([row], tokenizer, None, False)
    assert tokenizer.decode(plain["input_ids"]) == "<|user|>q<|end|><|assistant|>Paris.<|end|>"
    start = plain["input_ids"].index(ids["<|assistant|>"]) + 1
    assert plain["labels"] == [-100] * start + plain["input_ids"][start:]
    (thinking,) = encode([row], tokenizer, None, True)
    answer = tokenizer.decode([label for label in thinking["labels"] if label >= 0])
    assert answer == "\n</think>\n\nParis.<|end|>"
    # The template ends answers with a token that is not the tokenizer's own end of a text.
    tokenizer.eos_token = "<|user|>"
    (other,) = encode([row], tokenizer, [ids["<|end|>"]], False)
    assert other["labels"][-1] == ids["<|end|>"]
