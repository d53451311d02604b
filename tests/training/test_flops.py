"""FLOPs, against an independent count of the same computation, and peaks by device name."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polarctl.training.flops import mfu, peak, per_token


def test_a_token_costs_six_flops_a_weight() -> None:
    # PyTorch's own count for two layers of 8 * 16 + 16 * 4 = 192 weights and 10 tokens:
    # 10 * 6 * 192 = 11,520.
    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)
    )
    with FlopCounterMode(display=False) as counter:
        layers(torch.ones(10, 8, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 11_520 == 10 * per_token(192)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H800", 989e12, 67e12),
        ("NVIDIA H800 PCIe", 756e12, 51e12),
        ("NVIDIA B200", 2250e12, 80e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A800-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
    ],
)
def test_peaks_by_the_names_that_cuda_gives(name, half, single) -> None:
    assert peak(name, half=True) == half
    assert peak(name, half=False) == single


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "Tesla T4",
        "NVIDIA A10G",  # fewer tensor cores than an A10
        "NVIDIA RTX A1000",  # not an A100
        "NVIDIA GB200",  # faster than a B200
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ],
)
def test_the_peak_of_other_devices_is_unknown_rather_than_wrong(name) -> None:
    assert peak(name, half=True) is None


def test_mfu_is_the_share_of_the_peak() -> None:
    # 1.8e9 weights at 45,000 tokens/s: 6 * 1.8e9 * 45e3 = 4.86e14 of 9.89e14 FLOP/s = 0.4914.
    assert mfu(45e3, 1.8e9, 989e12) == pytest.approx(0.491405, rel=1e-5)
