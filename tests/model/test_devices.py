"""Threads: one for small models while they compute, and the old number afterwards."""

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
