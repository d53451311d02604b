"""DeepSpeed ZeRO, for real: two processes with gloo against one with plain AdamW."""

import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
import zero_worker
from safetensors.torch import load_file

from polarctl.errors import MissingError, UsageError
from polarctl.training import zero
from polarctl.training.zero import config_of

WORKER = Path(__file__).with_name("zero_worker.py")
ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
EXACT = ["zero1:float32", "zero2:float32", "zero3:float32"]
HALF = ["zero1:bfloat16", "zero2:bfloat16", "zero3:bfloat16"]
CONFIGS = EXACT + HALF


def launch(folder, *tasks, processes=2):
    """Run the worker; what it printed on stderr. Nothing may come on stdout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(TORCHRUN if processes == 2 else ()), str(WORKER), str(folder)]
    done = subprocess.run(
        [*command, *tasks], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four steps of every config in two processes, and its last two again in two new ones."""
    made = tmp_path_factory.mktemp("zero")
    launch(made, *(f"train:{config}" for config in CONFIGS))
    launch(made, *(f"resume:{config}" for config in CONFIGS))
    return made


@pytest.fixture(scope="module")
def plain():
    """(weights, norms) of one process with AdamW on the whole batch, by autograd alone."""
    module = zero_worker.model()
    optimizer = zero_worker.optimizer_of(module)
    norms = []
    for step, rate in enumerate(zero_worker.RATES):
        optimizer.zero_grad()
        losses = [zero_worker.loss_of(module, step, r, part) for r in range(2) for part in range(3)]
        (sum(losses) / zero_worker.GLOBAL_PAIRS).backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, zero_worker.CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return module.classifier.state_dict(), norms


def weights_of(folder, config, mode="train"):
    return load_file(folder / config.replace(":", "-") / f"{mode}.safetensors")


def facts_of(folder, config, mode="train"):
    return json.loads((folder / config.replace(":", "-") / f"{mode}.json").read_text())


def largest_difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in other)


@pytest.mark.slow
@pytest.mark.parametrize("config", EXACT)
def test_two_processes_do_what_one_does_with_plain_adamw(folder, plain, config):
    weights, norms = plain
    start = zero_worker.model().classifier.state_dict()
    assert largest_difference(weights, start) > 5e-3  # rates add up to 7e-3: the steps are real
    assert min(norms) > zero_worker.CLIP
    assert largest_difference(weights_of(folder, config), weights) < 1e-5
    facts = facts_of(folder, config)
    assert facts["processes"] == 2
    assert facts["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", HALF)
def test_bfloat16_keeps_float32_weights_and_moves_them_alike(folder, plain, config):
    weights, norms = plain
    found = weights_of(folder, config)
    assert not any(torch.equal(found[n], found[n].bfloat16().float()) for n in trained_names(found))
    # bfloat16 has 8 bits: 2^-8 = 0.4 % of a norm, a few of them over the steps.
    assert facts_of(folder, config)["norms"] == pytest.approx(norms, rel=0.02)


def trained_names(weights):
    """Names of the matrices that were trained; a norm's weights start as ones."""
    return [name for name, value in weights.items() if value.ndim == 2]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_resume_in_new_processes_ends_with_the_same_bits(folder, config):
    whole, resumed = weights_of(folder, config), weights_of(folder, config, "resume")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert facts_of(folder, config, "resume")["norms"] == facts_of(folder, config)["norms"][2:]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_gathered_weights_have_all_names_and_shapes_in_float32(folder, config):
    wanted = zero_worker.model().classifier.state_dict()
    found = weights_of(folder, config)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}
    assert {value.dtype for value in found.values()} == {torch.float32}
    frozen = "model.layers.0.input_layernorm.weight"
    assert torch.equal(found[frozen], wanted[frozen])


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_gradient_that_is_not_a_number_never_reaches_the_weights(folder, config):
    facts = facts_of(folder, config)
    assert facts["bad_norm"] == "inf"
    assert facts["kept"]


@pytest.mark.slow
def test_one_process_needs_no_torchrun_and_refuses_the_state_of_two(folder, plain, tmp_path):
    own = tmp_path / "own.json"
    own.write_bytes(
        orjson.dumps(
            {
                "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
                "train_micro_batch_size_per_gpu": "auto",
                "bf16": {"enabled": "auto"},
            }
        )
    )
    said = launch(folder, f"train:{own}:float32", "foreign:zero2:float32", processes=1)
    assert [line for line in said.splitlines() if "OVERFLOW" not in line] == []
    assert facts_of(folder, "own:float32")["processes"] == 1
    assert largest_difference(weights_of(folder, "own:float32"), plain[0]) < 1e-5
    refused = facts_of(folder, "zero2:float32", "foreign")["refused"]
    assert refused.endswith("saved by 2 processes, and here are 1")


# -- the config -----------------------------------------------------------------------------------


def written(tmp_path, **config):
    path = tmp_path / "ds.json"
    path.write_bytes(orjson.dumps(config))
    return str(path)


def test_a_name_gives_the_stage_and_what_the_run_decides():
    config = config_of("zero2", dtype="bfloat16", clip=0.5)
    assert config["zero_optimization"] == {"stage": 2}
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config_of("zero3", dtype="float32", clip=1.0)["bf16"] == {"enabled": False}


def test_a_file_keeps_its_own_keys_and_leaves_auto_to_us(tmp_path):
    offload = {"device": "cpu", "pin_memory": "auto"}
    path = written(
        tmp_path,
        zero_optimization={"stage": 3, "offload_optimizer": offload},
        gradient_clipping="auto",
        bf16={"enabled": "auto"},
        steps_per_print=7,
    )
    config = config_of(path, dtype="bfloat16", clip=1.0)
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert (config["gradient_clipping"], config["bf16"]) == (1.0, {"enabled": True})
    assert config["steps_per_print"] == 7


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("train_batch_size", {"train_batch_size": 64}),
        ("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": 4}),
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 8}),
        ("gradient_clipping", {"gradient_clipping": 0.3}),
        ("bf16.enabled", {"bf16": {"enabled": False}}),
        ("bf16.check_grad_overflow", {"bf16": {"check_grad_overflow": False}}),
        ("fp16.enabled", {"fp16": {"enabled": True}}),
        ("optimizer", {"optimizer": {"type": "AdamW"}}),
        ("scheduler", {"scheduler": {"type": "WarmupLR"}}),
        ("gradient_allreduce_op", {"gradient_allreduce_op": "sum"}),
        ("tensor_parallel", {"tensor_parallel": {"autotp_size": 2}}),
    ],
)
def test_a_file_that_disagrees_with_the_run_is_refused_by_the_key(tmp_path, key, entry):
    path = written(tmp_path, zero_optimization={"stage": 2}, **entry)
    with pytest.raises(UsageError, match=f"`{key}` disagrees"):
        config_of(path, dtype="bfloat16", clip=1.0)


def test_what_is_no_config_is_refused(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for name, said in (
        ("zero4", "no such DeepSpeed config"),
        (str(tmp_path), "not a DeepSpeed config"),
        (str(broken), "not a DeepSpeed config"),
        (written(tmp_path, zero_optimization={"stage": 0}), "has to be 1, 2 or 3"),
    ):
        with pytest.raises(UsageError, match=said):
            config_of(name, dtype="float32", clip=1.0)
    with pytest.raises(UsageError, match="float16"):
        config_of("zero1", dtype="float16", clip=1.0)


def test_a_missing_deepspeed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    for name in ("DS_ACCELERATOR", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.setenv(name, "cpu")  # so that they are put back
    with pytest.raises(MissingError) as caught:
        zero.accelerator(config_of("zero1", dtype="float32", clip=1.0), cpu=True)
    assert caught.value.hint == "pip install 'polarctl[deepspeed]'"
