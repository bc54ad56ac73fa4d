"""Measured energy, on counters of our own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
    (domain / "max_energy_range_uj").write_text("9000000000\n")
    return domain


@dataclass
class Clock:
    """Time that passes by calls alone, in which two packages take 3 W each, and 1 J more a call."""

    domains: Sequence[Path]
    seconds: float = 0.0
    num_calls: int = 0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self._spend(seconds, joules=0)

    def work(self) -> None:
        self.num_calls += 1
        self._spend(7.0, joules=1)

    def _spend(self, seconds: float, joules: float) -> None:
        self.seconds += seconds
        for domain in self.domains:
            spent_uj = int((domain / "energy_uj").read_text()) + (3 * seconds + joules) * 1e6
            (domain / "energy_uj").write_text(f"{round(spent_uj) % 9_000_000_000}\n")


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    packages = [write_domain(tmp_path, number, f"package-{number}") for number in "01"]
    clock = Clock([*packages, write_domain(tmp_path, "0:0", "core")])
    monkeypatch.setattr(joules, "time", clock)
    return clock


def test_joules_are_those_of_a_window_of_a_minute(tmp_path: Path, clock: Clock) -> None:
    meter = find_meter(CPU, tmp_path)
    assert meter.source.startswith("RAPL")
    energy = meter.measure(clock.work, CPU)
    # One call, and two of 7 s to warm up; nine cover the window.
    assert (clock.num_calls, energy.num_calls, energy.seconds) == (12, 9, 63)
    # On each of two packages 21 J of idle power and one of work; the core is a part of one.
    assert energy.joules_per_call == pytest.approx(44)
    assert energy.watts == pytest.approx(44 / 7)


def test_idle_power_is_counted_as_long(tmp_path: Path, clock: Clock) -> None:
    idle = find_meter(CPU, tmp_path).measure_idle()
    assert idle.seconds >= 60
    assert idle.watts == pytest.approx(6)
    assert clock.num_calls == 0


def test_counters_start_over(tmp_path: Path, clock: Clock) -> None:
    for package in tmp_path.glob("*:[01]"):
        (package / "energy_uj").write_text("8999000000\n")
    assert find_meter(CPU, tmp_path).measure(clock.work, CPU).joules_per_call == pytest.approx(44)


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
