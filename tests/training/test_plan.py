"""Plans against models that are made, tensors that autograd keeps, and DeepSpeed's estimates."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import download_hub
import pytest
import torch
from tiny import build_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig, Qwen3Config

from polarctl import cli
from polarctl.model import reward_model
from polarctl.model.forward import RowInput, module_of
from polarctl.model.packing import pack
from polarctl.training import lora
from polarctl.training.memory import Memory, Model, disk, memory, per_token
from polarctl.training.speeds import published
from tests.model.internlm2.official import build_official

GIB = 2**30
# Llama 3.1 8B's own config.json.
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def bare(folder, config):
    """A folder as it is before any weights are there: config.json and a tokenizer."""
    folder.mkdir()
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "triples.jsonl"
    draw = random.Random(0)

    def text(words):
        return " ".join(draw.choice(["sea", "boat", "sum", "seven", "Paris"]) for _ in range(words))

    rows = [
        {"prompt": text(9), "reference": text(40), "chosen": text(40), "rejected": text(30)}
        for _ in range(32)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- the model, from its config alone -------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["causal LM", "larger vocabulary", "reward model", "published", "random"]
)
def test_a_model_without_weights_has_the_parameters_of_the_real_one(
    kind, tiny_lm, tiny_rm, tmp_path
):
    source = {"reward model": tiny_rm}.get(kind, tiny_lm)
    folder = tmp_path / "model"
    if kind == "published":
        build_official(folder, hidden=128, max_positions=512)
    else:
        shutil.copytree(source, folder)
    if kind == "larger vocabulary":  # as many models have it: nothing has to grow
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.resize_token_embeddings(400)
        model.save_pretrained(folder)
    given = {"config_path": str(folder)} if kind == "random" else {"base": str(folder)}
    whole = reward_model.create(**given)
    (folder / "model.safetensors").unlink()
    planned = reward_model.create(**given, device="meta")
    wanted = {name: tuple(p.shape) for name, p in whole.model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in planned.model.named_parameters()} == wanted
    assert {p.device.type for p in planned.model.parameters()} == {"meta"}
    assert planned.new_tokens == whole.new_tokens
    assert planned.model.config.polar == whole.model.config.polar
    group = ("What is it?", "It is 7.", ["The sum is 7.", "Paris"], "sft")
    assert [e.ids for e in planned.encoder.report_group(*group)] == [
        e.ids for e in whole.encoder.report_group(*group)
    ]


def test_adapters_are_counted_as_peft_makes_them(tiny_lm):
    made = reward_model.create(base=str(tiny_lm))
    model = Model.of(made.model, len(made.new_tokens))
    wrapped = lora.adapt(made.model, rank=3, alpha=None, new_tokens=made.new_tokens, quiet=True)
    weights = list(wrapped.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    assert model.adapted(3) == (sum(p.numel() for p in weights), trained)


def test_a_plan_of_8b_takes_no_memory_to_speak_of(triples, tmp_path, capfd):
    """As float32 the weights are 30 GB; a peak can only grow, so its growth is what this took."""
    model = bare(tmp_path / "8b", LLAMA_8B)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command = ["finetune", str(triples), "-m", str(model), "--dry-run", "--plan-for", "H100"]
    assert cli.run([*command, "--gpus", "8", "--lr", "1e-5", "--json"]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    # Per layer: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336, two norms.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    # 128,256 rows are enough for the tokenizer here; the last norm and the head are 4,096 each.
    (found,) = [line["parameters"] for line in said if "parameters" in line]
    assert found == 32 * layer + 128256 * 4096 + 2 * 4096 == 7_504_928_768


@pytest.mark.slow
def test_a_plan_of_a_hub_id_downloads_no_weights(triples, tmp_path):
    """Of the 8B model the Hub has config and tokenizer alone, and the program stays small."""
    folder = bare(tmp_path / "8b", LLAMA_8B)
    with download_hub.serving("acme/llama-8b", folder) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = ["pretrain", str(triples), "-m", "acme/llama-8b", "--dry-run"]
        program = [sys.executable, "-m", "polarctl", *command, "--lr", "1e-5", "--batch-size", "8"]
        done = subprocess.run(
            program, env={**os.environ, **hub}, capture_output=True, text=True, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    assert "model: 7,504,928,768 weights" in done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1_500_000  # KiB


# -- memory ---------------------------------------------------------------------------------------


def kept_by_autograd(kind, layers, computing):
    """Bytes that a forward pass over one row keeps for the backward pass, and its tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    config = kind(**sizes, **heads, max_position_embeddings=512, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config)
    model.to(torch.bfloat16 if computing == "bfloat16" else torch.float32)
    cast = sum(p.numel() for n, p in model.named_parameters() if "layers.0" in n and p.dim() == 2)
    facts = Model.of(model)
    module = module_of(model).train()
    groups = [[[*range(1, 90), *range(1, 40 + own)] for own in (1, 4)] for _ in range(3)]
    (row,) = pack(groups, 10_000)
    made = RowInput.of(row, "cpu")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    half = torch.autocast("cpu", torch.bfloat16)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, half if computing == "autocast" else contextlib.nullcontext():
        module(made.ids, made.positions, made.layout)
    # Autocast's copies of the weights are kept too; the formula counts them with the weights.
    copies = 2 * cast * layers if computing == "autocast" else 0
    return sum(size for size, _ in kept.values()) - copies, len(row.ids), facts


@pytest.mark.parametrize(
    ("kind", "computing"),
    [
        (LlamaConfig, "autocast"),
        (LlamaConfig, "bfloat16"),
        (LlamaConfig, "float32"),
        (Qwen3Config, "autocast"),
    ],
)
def test_activations_of_a_layer_are_what_autograd_keeps(kind, computing):
    """Within 12 %: on a CPU the attention keeps copies of queries and outputs as well."""
    few, tokens, _ = kept_by_autograd(kind, 2, computing)
    many, _, model = kept_by_autograd(kind, 4, computing)
    assert per_token(model, computing) == pytest.approx((many - few) / 2 / tokens, rel=0.12)


def a_model(parameters, **other):
    sizes = {"layers": 32, "width": 4096, "queries": 4096, "keys": 1024, "mlp": 14336}
    return Model(parameters=parameters, **sizes, **other)


def test_memory_by_hand():
    """One process, float32, N = 1e9: 4 N + 4 N + 8 N, and a layer's token keeps

    24 x 4096 + 8 x 4096 + 16 x 1024 + 16 x 14336 = 376,832 bytes, of which 32 layers and 1,000
    tokens make 12,058,624,000. The step's 4 N come when these are gone.
    """
    plain = {"half": False, "checkpointing": False, "zero": 0, "processes": 1}
    found = memory(a_model(10**9), 1000, **plain)
    assert (found.weights, found.gradients, found.optimizer) == (4e9, 4e9, 8e9)
    assert found.activations == 32 * 1000 * 376_832
    assert found.total == 16e9 + 12_058_624_000
    few = memory(a_model(10**9), 1, **plain)
    assert few.total == 16e9 + 4e9  # AdamW's step is the worst moment
    # With checkpointing one layer, and the float32 input of each.
    again = memory(a_model(10**9), 1000, **{**plain, "checkpointing": True})
    assert again.activations == 1000 * 376_832 + 32 * 1000 * 4 * 4096
    # Two processes have each gradient once more, in the buckets of the exchange.
    assert memory(a_model(10**9), 1000, **{**plain, "processes": 2}).gradients == 8e9
    # Half precision: a copy of the weights, during the pass alone.
    half = memory(a_model(10**9), 1, **{**plain, "half": True})
    assert half.weights == 6e9 and half.total == 16e9 + 4e9


def test_the_start_can_be_the_worst_moment():
    """64 processes hold 18 N / 64 each under ZeRO-3, but all of 4 N at the start."""
    way = {"half": True, "checkpointing": True, "zero": 3, "processes": 64}
    found = memory(a_model(10**11), 1, **way)
    assert found.total == found.start == 4e11


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 8])
@pytest.mark.parametrize("zero", [2, 3])
def test_zero_agrees_with_deepspeeds_own_estimators(zero, machines):
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    count = 7_358_652_416
    way = {"half": True, "checkpointing": True, "zero": zero, "processes": 8 * machines}
    found = memory(a_model(count), 1, **way)
    if zero == 2:
        _, theirs = stage_1_and_2.estimate_zero2_model_states_mem_needs(
            count, 8, machines, cpu_offload=False
        )
    else:  # what they add for the largest layer is counted with the buffers here
        _, both, layer = stage3.estimate_zero3_model_states_mem_needs(
            count, 379_060_224, 8, machines, cpu_offload=False, cpu_offload_params=False
        )
        theirs = both - layer
    assert found.weights + found.gradients + found.optimizer == pytest.approx(theirs, rel=1e-6)


# -- room, hours, flags ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "zero2", "zero3"])
def test_a_checkpoint_takes_the_room_that_is_planned(way, tiny_lm, tmp_path):
    rows = [{"prompt": f"q{i}", "reference": "a", "chosen": "a", "rejected": "b"} for i in range(8)]
    data, out = tmp_path / "t.jsonl", tmp_path / "rm"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [] if way == "plain" else ["--deepspeed", way]
    command = ["pretrain", str(data), "-m", str(tiny_lm), "-o", str(out), "--device", "cpu", *own]
    command += ["--batch-size", "4", "--max-steps", "99999", "--save-steps", "1", "--lr", "1e-3"]
    child = subprocess.Popen([sys.executable, "-m", "polarctl", *command])
    while child.poll() is None and not list((out / "checkpoints").glob("*/checkpoint.json")):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 75
    newest = max((out / "checkpoints").glob("step-*"))
    took = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    made = reward_model.create(base=str(tiny_lm))
    zero = int(way[-1]) if way.startswith("zero") else 0
    model = Model.of(made.model, len(made.new_tokens))
    wanted = disk(model, half=False, zero=zero, lora_rank=None, validated=False)
    # Names and shapes are a third of it, in a model of 30,000 weights.
    assert wanted.checkpoint <= took <= wanted.checkpoint + 60_000


def test_speeds_are_published_ones_carried_over_by_size():
    # llm-foundry: 8,611 tokens a second on an H100 for 6.67e9 weights; twice as many, half as fast.
    assert published("NVIDIA H100 80GB HBM3", 6.67e9).tokens_per_s == 8_611
    assert published("H100", 7.5e9).tokens_per_s == pytest.approx(8_611 * 6.67 / 7.5)
    assert published("H800", 1.8e9).tokens_per_s == 14_300
    # 0.94e12 tokens / (57 h x 3,600 x 320), and 3.6e12 / (175 x 3,600 x 912).
    assert 0.94e12 / (57 * 3600 * 320) == pytest.approx(14_300, rel=0.01)
    assert 3.6e12 / (175 * 3600 * 912) == pytest.approx(6_300, rel=0.01)
    assert published("H100", 1e6) is None and published("L40S", 7e9) is None
    assert published("A1000", 1.3e9) is None  # an A1000 is no A100


def plan_of(model, triples, capfd, *options):
    command = ["pretrain", str(triples), "-m", str(model), "--dry-run", "--lr", "1e-5"]
    assert cli.run([*command, *options]) == 0
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def polar_7b(tmp_path_factory):
    """The shape of InternLM2.5-7B, of which POLAR-7B was made."""
    folder = tmp_path_factory.mktemp("models") / "7b"
    return bare(folder, {**LLAMA_8B, "vocab_size": 92544, "max_position_embeddings": 32768})


def test_hours_are_tokens_through_the_model_by_speed_and_gpus(polar_7b, triples, capfd):
    options = ["--plan-for", "L40S", "--max-steps", "100", "--batch-size", "64", "--gpus", "4"]
    assert "time: not known: give --tokens-per-s" in plan_of(polar_7b, triples, capfd, *options)
    said = plan_of(polar_7b, triples, capfd, *options, "--tokens-per-s", "500", "--json")
    (found,) = [line for line in map(json.loads, said.splitlines()) if "hours" in line]
    computed = 100 * 64 * found["computed_per_triple"]
    assert found["hours"] == pytest.approx(computed / (500 * 4) / 3600)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # 16 N are 110 GiB: nothing helps on one GPU of 80 GB ...
        (["--plan-for", "H100"], "(but this does not fit into H100: more GPUs, or --lora-rank 16)"),
        # ... but adapters, of 6 N = 41 GiB and 8,192 tokens with checkpointing.
        (["--plan-for", "H100", "--lora-rank", "16"], "--gradient-checkpointing --lora-rank 16"),
        # 2 N + 4 N + 20 N / 8 are 58 GiB, and 8,192 tokens with checkpointing 5.
        (["--plan-for", "H100", "--gpus", "8"], "--gpus 8 --deepspeed zero1 --gradient-check"),
    ],
)
def test_the_flags_are_the_simplest_that_fit(options, wanted, polar_7b, triples, capfd):
    said = plan_of(polar_7b, triples, capfd, "--max-steps", "9", "--batch-size", "64", *options)
    flags = next(line for line in said.splitlines() if line.startswith("  flags: "))
    assert flags.startswith("  flags: --lr 1e-05 --batch-size 64 --max-steps 9")
    assert wanted in flags


def test_the_flags_of_a_plan_are_options(triples, tiny_lm, tmp_path, capfd):
    said = plan_of(tiny_lm, triples, capfd, "--device", "cpu", "--batch-size", "8")
    flags = next(line for line in said.splitlines() if line.startswith("  flags: ")).split()[1:]
    out = tmp_path / "rm"
    command = ["pretrain", str(triples), "-m", str(tiny_lm), "-o", str(out), "--device", "cpu"]
    assert cli.run([*command, *flags, "-q"]) == 0
    assert len((out / "metrics.jsonl").read_bytes().splitlines()) == 4  # of 8, over 32 triples


def test_a_total_is_never_below_its_parts():
    need = Memory(weights=6.0, cast=2.0, gradients=1.0, optimizer=2.0, activations=0.5, step=1.0)
    assert need.total == 4 + 1 + 2 + 2.5  # the cast and the activations outweigh the step
