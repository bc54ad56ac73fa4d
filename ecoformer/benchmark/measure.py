"""Time, peak memory and bandwidth, measured so that a comparison is fair.

What is compared takes turns, so that a busy machine slows all of it alike.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
# Makes inputs and returns what is timed. It travels to another process, so it is a function of a
# module with its arguments bound, not a closure.
Build = Callable[[], Call]

# How long one contender may take its turn, unless a single call takes longer.
_TURN_SECONDS = 0.05
# A call this long is timed once, and its warm-up is that once.
_LONG_CALL_SECONDS = 4.0
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Args:
        median_ms: of all calls.
        low_ms: lower quartile.
        high_ms: upper quartile.
        num_calls: how many were timed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    num_calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise calls.

        Args:
            seconds: of each call.

        Returns:
            Their median and quartiles.
        """
        low, median, high = seconds[0], seconds[0], seconds[0]
        if len(seconds) > 1:
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median * 1e3, low * 1e3, high * 1e3, len(seconds))


def time_interleaved(
    calls: Mapping[str, Call], *, num_rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Time several calls in turns: all of them in the first round, then all again.

    On CUDA a call is captured as a graph and replayed, so that what is timed is the device's
    work and not the host's; a call that cannot be captured is timed as it is.

    Args:
        calls: what to time, by name.
        num_rounds: turns of each.
        device: where they run.

    Returns:
        Timings by name.
    """
    timers: dict[str, Callable[[], float]] = {}
    seconds: dict[str, list[float]] = {}
    turns: dict[str, int] = {}
    for name, call in calls.items():
        timers[name] = timer = _cuda_timer(call) if device.type == "cuda" else _cpu_timer(call)
        first = timer()
        seconds[name] = [first] if first > _LONG_CALL_SECONDS else []
        turns[name] = 0 if seconds[name] else max(1, min(20, int(_TURN_SECONDS / timer())))
    for _ in range(num_rounds):
        for name, timer in timers.items():
            seconds[name] += [timer() for _ in range(turns[name])]
    return {name: Timing.of(values) for name, values in seconds.items()}


def _cpu_timer(call: Call) -> Callable[[], float]:
    def timer() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timer


def _cuda_timer(call: Call) -> Callable[[], float]:
    replay = _capture(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timer


def _capture(call: Call) -> Call:
    """A replay of the call's kernels, or the call itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compilers, autotuners and libraries do their first-time work here.
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Time a large copy.

    Args:
        device: whose memory.

    Returns:
        Bytes a second, read and written ones together.
    """
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, num_rounds=5, device=device)
    return 2 * source.numel() / (timing["copy"].median_ms / 1e3)


class PeakMemory:
    """Memory that a call takes at its peak, above what stood before it: inputs do not count.

    On CUDA that is what the allocator hands out. On the CPU it is the resident memory of a
    process of its own, as the kernel counts it, scratch space of libraries included. There the
    allocator returns what is freed at once, and the call has run before, so that what it loads
    or keeps for good does not count. Elsewhere than on Linux there is no such counter. Used in a
    ``with`` block, at whose end that process ends.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> PeakMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def measure(self, build: Build) -> int | None:
        """Build a call and run it.

        Args:
            build: returns the call.

        Returns:
            Bytes, or None where they cannot be told.
        """
        if self._device.type == "cuda":
            return _cuda_peak(build)
        if not Path("/proc/self/clear_refs").exists():
            return None
        if self._pool is None:
            # Read by the C library and by MKL when the process starts.
            os.environ.update(MALLOC_MMAP_THRESHOLD_="131072", MKL_DISABLE_FAST_MM="1")
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context)
        return self._pool.submit(_resident_peak, build, torch.get_num_threads()).result()


def _cuda_peak(build: Build) -> int:
    call = build()
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
    ctypes.CDLL(None).malloc_trim(0)
    # Sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kernel_bytes("self/status", "VmRSS")
    call()
    return _kernel_bytes("self/status", "VmHWM") - before


def free_bytes(device: torch.device) -> int:
    """Look how much memory can still be had.

    Args:
        device: where.

    Returns:
        Bytes of the GPU, or of the machine.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kernel_bytes("meminfo", "MemAvailable")


def _kernel_bytes(file: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", (Path("/proc") / file).read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
