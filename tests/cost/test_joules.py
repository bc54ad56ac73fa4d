"""Measured energy, on counters of our own, and the count of what is executed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ecoformer.attention import EcoFormerAttention, SoftmaxAttention
from ecoformer.cost import joules
from ecoformer.cost.executed import count_executed
from ecoformer.cost.joules import EnergyMeter, EnergyNotMeasurable, find_meter
from ecoformer.hashing import HashConfig
from ecoformer.tables.energy import describe_energy

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


@pytest.mark.parametrize("is_available", [True, False])
def test_the_energy_table_names_its_source(
    is_available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(device: torch.device) -> EnergyMeter:
        if not is_available:
            raise EnergyNotMeasurable("nobody knows")
        return EnergyMeter("a test", lambda: [0], [1])

    monkeypatch.setattr("ecoformer.tables.energy.find_meter", find)
    monkeypatch.setattr(joules, "_MIN_SECONDS", 0.001)
    rows, notes = describe_energy("pvt_v2_b2_li", input_size=32, batch_size=2, device=CPU)
    assert [row["name"] for row in rows] == ["sra"]
    assert ("measured_j" in rows[0]) is is_available
    assert ("a test" if is_available else "not available here: nobody knows") in notes[-1]


class Tokens(nn.Module):
    """An attention layer over the values of an image, 12 a token."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.reshape(1, -1, 12)
        return self.attention(x, (1, x.shape[1]))


def test_executed_products_are_those_of_the_shapes() -> None:
    convolution = nn.Conv2d(3, 6, kernel_size=3, padding=1)
    assert count_executed(convolution, 8) == 3 * 3 * 3 * 6 * 8 * 8
    num_tokens, width = 3 * 8 * 8 // 12, 12
    softmax = Tokens(SoftmaxAttention(width, 2))
    assert count_executed(softmax, 8) == 4 * num_tokens * width**2 + 2 * num_tokens**2 * width


def test_products_with_codes_are_executed_too() -> None:
    num_tokens, width, heads, bits, anchors = 3 * 8 * 8 // 12, 12, 2, 5, 7
    hashing = HashConfig(num_bits=bits, num_anchors=anchors)
    layer = Tokens(EcoFormerAttention(width, heads, hashing=hashing))
    distances = heads * num_tokens * anchors * (width // heads)
    to_bits = heads * num_tokens * anchors * bits
    through_codes = heads * num_tokens * 2 * bits * (width // heads + 1)
    projections = 3 * num_tokens * width**2
    assert count_executed(layer, 8) == projections + distances + to_bits + through_codes
