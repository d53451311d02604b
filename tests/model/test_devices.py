"""Threads: one for small models while they compute, and the old number afterwards."""

import os
import subprocess
import sys

import pytest
import torch

from polarctl import console
from polarctl.model import devices


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Two threads, nothing asked for by the environment, no choice said yet."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, state = torch.get_num_threads(), console.snapshot()
    console.configure(quiet=False, verbose=False, color=False, json_lines=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    console.restore(state)


def model_of(parameters):
    return torch.nn.Linear(parameters, 1, bias=False, device="meta").to_empty(device="cpu")


def test_a_small_model_has_one_thread_as_long_as_it_computes(capfd):
    with devices.threads_for(model_of(100)):
        assert torch.get_num_threads() == 1
        with devices.threads_for(model_of(200)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert list(console.choices()) == ["threads"]
    assert capfd.readouterr().err.count("threads: 1 (") == 1


def test_the_old_number_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), devices.threads_for(model_of(100)):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_models_that_are_large_together_keep_their_threads():
    half = model_of(devices.SMALL_TO_COMPUTE // 2)
    with devices.threads_for(half, half):
        assert torch.get_num_threads() == 2
    assert not console.choices()
    with devices.threads_for(half, half, under=devices.SMALL_TO_DECODE):
        assert torch.get_num_threads() == 1


def test_a_model_elsewhere_than_on_the_cpu_changes_nothing():
    with devices.threads_for(torch.nn.Linear(8, 1, device="meta")):
        assert torch.get_num_threads() == 2


def test_omp_num_threads_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with devices.threads_for(model_of(100)):
        assert torch.get_num_threads() == 2


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch):
    """What torch says on a V100 or T4: yes with emulation, no without."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert devices.dtype_of("auto", "cuda") == torch.float32
    assert devices.dtype_of("bfloat16", "cuda") == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "visible", "shown"),
    [
        ("cuda:1", None, "1"),
        ("cuda:1", "4,6", "6"),
        ("cuda", "4,6", "4"),
        ("auto", None, "0"),
        ("auto", "", ""),
        ("cpu", "4,6", "4,6"),
        ("cuda:2", "4,6", None),
    ],
)
def test_rft_chooses_its_gpu_before_torch_is_there(device, visible, shown, tmp_path):
    """CUDA reads the variable when it is first asked, which needs torch."""
    program = (
        "import os, sys\n"
        "def hook(event, given):\n"
        "    if event == 'import' and given[0] == 'torch':\n"
        "        print('VISIBLE', repr(os.environ.get('CUDA_VISIBLE_DEVICES')), flush=True)\n"
        "        os._exit(9)\n"
        "sys.addaudithook(hook)\n"
        "from polarctl import cli\n"
        "os._exit(cli.run(sys.argv[1:]))\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    command = ["rft", "p.jsonl", "-m", "m", "--reward-model", "r", "-o", "out", "--device", device]
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    if shown is None:
        assert done.returncode == 4 and "CUDA_VISIBLE_DEVICES names 2 GPUs" in done.stderr
    else:
        assert (done.returncode, done.stdout + done.stderr) == (9, f"VISIBLE {shown!r}\n")
