"""Measure time, peak memory and bandwidth so that a comparison is fair.

What is compared takes turns, so that a busy machine slows all of it alike.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from ecoformer import __version__
from ecoformer.hashing import with_random_hash_functions
from ecoformer.memory import give_memory_back

Call = Callable[[], object]
# Makes inputs and returns what is timed. It travels to another process, so it is a function of a
# module with its arguments bound, not a closure.
Build = Callable[[], Call]

# How long one contender may take its turn, unless a single call takes longer.
_TURN_SECONDS = 0.05
# A call this long is timed once.
_LONG_CALL_SECONDS = 4.0
# In a longer call the host keeps ahead of the device, and a graph would hold much memory.
_CAPTURED_SECONDS = 0.02
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
_LIBRARIES = ("torch", "triton", "timm")
_NUM_RATE_ROUNDS = 20
# Just below 32 MB, from which on the C library never keeps a block.
_SETTLING_BYTES = 31 * 2**20
# Read by the C library and by MKL when a process starts.
_RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MKL_DISABLE_FAST_MM": "1"}


@dataclass(frozen=True)
class Timing:
    """How long one call takes: median and quartiles of ``num_calls``."""

    median_ms: float
    low_ms: float
    high_ms: float
    num_calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise the seconds of each call."""
        low, median, high = seconds[0], seconds[0], seconds[0]
        if len(seconds) > 1:
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median * 1e3, low * 1e3, high * 1e3, len(seconds))


class Stopwatch:
    """Time a call, some repetitions a turn; it has run once by then, to warm up.

    Args:
        is_captured: on CUDA, capture a short call as a graph and replay it, so that what is timed
            is the device's work and not the host's; a call that cannot be captured is timed as it
            is.

    Attributes:
        once_s: what the call took when it had warmed up.
    """

    def __init__(self, call: Call, device: torch.device, *, is_captured: bool = True) -> None:
        is_cuda = device.type == "cuda"
        self._time_once = _cuda_timer(call, device) if is_cuda else _cpu_timer(call)
        # Compilers, autotuners and libraries do their first-time work here.
        self._time_once()
        if is_cuda and is_captured and self._time_once() < _CAPTURED_SECONDS:
            self._time_once = _cuda_timer(_capture(call, device), device)
            self._time_once()
        self.once_s = self._time_once()
        is_long = self.once_s > _LONG_CALL_SECONDS
        self._seconds = [self.once_s] if is_long else []
        self._num_repeats = 0 if is_long else max(1, min(20, int(_TURN_SECONDS / self.once_s)))

    def take_turn(self) -> None:
        """Time the call again, unless it takes so long that once has to do."""
        self._seconds += [self._time_once() for _ in range(self._num_repeats)]

    @property
    def timing(self) -> Timing:
        """Time of all turns so far."""
        return Timing.of(self._seconds)


def take_turns(watches: Iterable[Stopwatch], num_rounds: int) -> None:
    """Let each watch take a turn, then each another one."""
    watches = list(watches)
    for _ in range(num_rounds):
        for watch in watches:
            watch.take_turn()


def time_interleaved(
    calls: Mapping[str, Call], *, num_rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Time several calls in turns, by name."""
    watches = {name: Stopwatch(call, device) for name, call in calls.items()}
    take_turns(watches.values(), num_rounds)
    return {name: watch.timing for name, watch in watches.items()}


def measure_rates(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Time the evaluation of a batch by several models in turns.

    Speed needs no trained weights: a copy is timed, with random hash functions where there are
    no others.

    Args:
        images: [B, 3, height, width], float, on the models' device.

    Returns:
        Median images a second, by name.
    """
    timed = {name: with_random_hash_functions(model).eval() for name, model in models.items()}
    with torch.inference_mode():
        timings = time_interleaved(
            {name: partial(model, images) for name, model in timed.items()},
            num_rounds=_NUM_RATE_ROUNDS,
            device=images.device,
        )
    return {name: len(images) * 1e3 / timing.median_ms for name, timing in timings.items()}


def _cpu_timer(call: Call) -> Callable[[], float]:
    def timer() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timer


def _cuda_timer(call: Call, device: torch.device) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        # Streams, and the events on them, are of the current device.
        with torch.cuda.device(device):
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

    return timer


def _capture(call: Call, device: torch.device) -> Call:
    """Return a replay of the call's kernels, or the call itself where it cannot be captured."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # On the stream of the capture, as PyTorch asks for.
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # By default it takes one of the device that the first capture was on.
            with torch.cuda.graph(graph, stream=stream):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return call
    return graph.replay


def settle_allocator() -> None:
    """Let the C library keep the pages of freed tensors, as it does after a batch of images.

    A block that is freed sets how much it keeps from then on. Before, small calls give their pages
    back and clear new ones, or do not, by chance.
    """
    torch.empty(_SETTLING_BYTES, dtype=torch.uint8)


def copy_bandwidth(device: torch.device) -> float:
    """Time a large copy; returns bytes a second, read and written ones together."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, num_rounds=5, device=device)
    return 2 * source.numel() / (timing["copy"].median_ms / 1e3)


class PeakMemory:
    """Measure the memory that a call takes at its peak, above what stood before it.

    On CUDA that is what the allocator hands out. On the CPU it is the resident memory of a
    process of its own, as the kernel counts it, scratch space of libraries included. There the
    allocator returns what is freed at once, and the call has run before, so that what it loads
    or keeps for good does not count. Elsewhere than on Linux there is no such counter. Used in a
    ``with`` block, at whose end that process ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> PeakMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def measure(self, build: Build, call: Call | None = None) -> int | None:
        """Build a call and run it; returns bytes, or None where they cannot be told.

        Args:
            call: what ``build`` returned before, if it is still there: on CUDA that serves.
        """
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                return _cuda_peak(call or build())
        if not Path("/proc/self/clear_refs").exists():
            return None
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context)
        try:
            # The process starts with its first task.
            with _environment(_RETURNS_MEMORY):
                peak = self._pool.submit(_resident_peak, build, torch.get_num_threads())
            return peak.result()
        except BrokenExecutor:
            # The process took too much and was killed; the next call has another one.
            self._pool = None
            raise


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for what starts in a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cuda_peak(call: Call) -> int:
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_peak(build: Build, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    call = build()
    call()
    gc.collect()
    give_memory_back()
    # Sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kernel_bytes("self/status", "VmRSS")
    call()
    return _kernel_bytes("self/status", "VmHWM") - before


def free_bytes(device: torch.device) -> int:
    """Look how much memory of the GPU, or of the machine, can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kernel_bytes("meminfo", "MemAvailable")


def _kernel_bytes(file: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", (Path("/proc") / file).read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def describe_environment(command: str, device: torch.device) -> dict[str, str]:
    """Note in words the command as typed, date, hardware, load and versions of a measurement."""
    versions = [f"ecoformer {__version__}", f"Python {platform.python_version()}"]
    for library in _LIBRARIES:
        try:
            versions.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{library} not installed")
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": describe_hardware(device),
        # More than the threads in use means that others were at work.
        "load": f"{os.getloadavg()[0]:.1f} before the start",
        "versions": ", ".join(versions),
    }


def describe_hardware(device: torch.device) -> str:
    """Name the GPU, if that is the device, the processor and the threads."""
    hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}; {hardware}"
    return hardware


def _processor() -> str:
    """Name the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
