"""Measure joules: by NVML on NVIDIA GPUs, by RAPL on CPUs where the kernel offers it.

Counters of energy are read before and after a window. Nothing is made of a power limit, or of
samples of power.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_POWERCAP = Path("/sys/class/powercap")
# Clocks and fans take seconds to settle, and counters tick ten to a thousand times a second.
WARMUP_SECONDS = 10.0
WINDOW_SECONDS = 60.0


class EnergyNotMeasurable(Exception):
    """This machine does not tell the energy that it takes; the message says why."""


@dataclass(frozen=True)
class Energy:
    """What counters saw in one window: all of the device, idle power and others at work, too."""

    joules: float
    seconds: float
    num_calls: int

    @property
    def joules_per_call(self) -> float:
        return self.joules / self.num_calls

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


@dataclass(frozen=True)
class EnergyMeter:
    """Counters of energy in microjoules, which only rise and start over at ``ranges_uj``."""

    source: str
    read_uj: Callable[[], list[int]]
    ranges_uj: list[int]

    def measure(self, call: Callable[[], object], device: torch.device) -> Energy:
        """Repeat a call until it has warmed up, then for a window that is counted."""
        # The first call allocates, and chooses kernels, for however long.
        call()
        _synchronize(device)
        self._repeat(call, device, WARMUP_SECONDS)
        return self._repeat(call, device, WINDOW_SECONDS)

    def measure_idle(self) -> Energy:
        """Count a window in which this process does nothing; a call is a nap."""
        return self._repeat(lambda: time.sleep(0.1), torch.device("cpu"), WINDOW_SECONDS)

    def _repeat(
        self, call: Callable[[], object], device: torch.device, min_seconds: float
    ) -> Energy:
        num_calls, began, before = 0, time.monotonic(), self.read_uj()
        while not num_calls or time.monotonic() - began < min_seconds:
            call()
            _synchronize(device)
            num_calls += 1
        spent = zip(before, self.read_uj(), self.ranges_uj, strict=True)
        joules = sum((end - start) % size for start, end, size in spent) / 1e6
        return Energy(joules, time.monotonic() - began, num_calls)


def find_meter(device: torch.device, powercap: Path = _POWERCAP) -> EnergyMeter:
    """Find the counters of the whole GPU, or of all CPU packages together.

    Raises:
        EnergyNotMeasurable: there are none, or they may not be read.
    """
    return _find_nvml(device) if device.type == "cuda" else _find_rapl(powercap)


def _find_nvml(device: torch.device) -> EnergyMeter:
    try:
        import pynvml
    except ImportError:
        raise EnergyNotMeasurable("nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        # Not by number: CUDA_VISIBLE_DEVICES renumbers what CUDA sees.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise EnergyNotMeasurable(f"NVML: {error}") from None
    return EnergyMeter(
        "NVML, the whole GPU",
        lambda: [1000 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)],
        [1000 * 2**64],
    )


def _find_rapl(powercap: Path) -> EnergyMeter:
    # The others are parts of these.
    packages = [
        domain
        for domain in sorted(powercap.glob("*-rapl:*"))
        if (domain / "name").exists() and (domain / "name").read_text().startswith("package")
    ]
    if not packages:
        raise EnergyNotMeasurable(f"the kernel offers no RAPL counter in {powercap}")

    def read(name: str) -> list[int]:
        return [int((package / name).read_text()) for package in packages]

    try:
        read("energy_uj")
        ranges = read("max_energy_range_uj")
    except (OSError, ValueError) as error:
        raise EnergyNotMeasurable(f"RAPL cannot be read ({error}); try as root") from None
    return EnergyMeter("RAPL, whole CPU packages", lambda: read("energy_uj"), ranges)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
