"""Measured energy, on counters of our own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ecoformer.cost import joules
from ecoformer.cost.joules import EnergyNotMeasurable, find_meter

CPU = torch.device("cpu")


def write_domain(powercap: Path, number: str, name: str, energy_uj: str = "5000000") -> Path:
    domain = powercap / f"intel-rapl:{number}"
    domain.mkdir(parents=True)
    (domain / "name").write_text(f"{name}\n")
    (domain / "energy_uj").write_text(f"{energy_uj}\n")
    (domain / "max_energy_range_uj").write_text("9000000\n")
    return domain


def test_joules_of_packages_are_shared_out_over_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Until the sixth call.
    monkeypatch.setattr(joules, "_MIN_SECONDS", 1e9)
    packages = [write_domain(tmp_path, number, f"package-{number}") for number in "01"]
    core = write_domain(tmp_path, "0:0", "core")
    num_calls = 0

    def call() -> None:
        nonlocal num_calls
        num_calls += 1
        # The call that is not counted costs a joule too. Counters start over at 9 J.
        for domain in (*packages, core):
            (domain / "energy_uj").write_text(str((5_000_000 + 1_000_000 * num_calls) % 9_000_000))
        if num_calls == 6:
            monkeypatch.setattr(joules, "_MIN_SECONDS", 0.0)

    meter = find_meter(CPU, tmp_path)
    assert meter.source.startswith("RAPL")
    # Five counted calls, each a joule on each of two packages, across the counters' end.
    assert meter.measure(call, CPU) == pytest.approx(2.0)
    assert num_calls == 6


def test_no_counter_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnergyNotMeasurable, match="no RAPL counter"):
        find_meter(CPU, tmp_path)
    write_domain(tmp_path, "0", "package-0", energy_uj="")
    with pytest.raises(EnergyNotMeasurable, match="RAPL cannot be read"):
        find_meter(CPU, tmp_path)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An NVML of one GPU that has taken 1,234 mJ so far."""
    module: Any = ModuleType("pynvml")
    module.NVMLError = RuntimeError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = {"GPU-abc": 7}.__getitem__
    module.nvmlDeviceGetTotalEnergyConsumption = {7: 1234}.__getitem__
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )
    return module


def test_a_gpu_is_found_by_its_own_name(nvml: Any) -> None:
    meter = find_meter(torch.device("cuda"))
    assert meter.source == "NVML, the whole GPU"
    assert meter.read_uj() == [1_234_000]


def test_a_gpu_without_a_counter(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> int:
        raise RuntimeError("Not Supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    with pytest.raises(EnergyNotMeasurable, match="NVML: Not Supported"):
        find_meter(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(EnergyNotMeasurable, match="nvidia-ml-py is not installed"):
        find_meter(torch.device("cuda"))
