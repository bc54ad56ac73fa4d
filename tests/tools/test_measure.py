"""Time and memory: fair turns, and that of the call alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from ecoformer.tools import measure
from ecoformer.tools.measure import Call, PeakMemory, Timing, time_interleaved

CPU = torch.device("cpu")


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # Turns of one call each.
    monkeypatch.setattr(measure, "_TURN_SECONDS", 0.0)
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "ab"}
    timings = time_interleaved(calls, num_rounds=3, device=CPU)
    assert "".join(order[-6:]) == "ababab"
    assert timings["a"].num_calls == 3


def test_long_calls_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_LONG_CALL_SECONDS", -1.0)
    order: list[str] = []
    timings = time_interleaved({"a": lambda: order.append("a")}, num_rounds=3, device=CPU)
    # Once to warm up, and once that counts.
    assert order == ["a", "a"]
    assert timings["a"].num_calls == 1


def test_timing_gives_quartiles() -> None:
    timing = Timing.of([0.003, 0.001, 0.002, 0.005, 0.004])
    assert (timing.low_ms, timing.median_ms, timing.high_ms) == pytest.approx((2, 3, 4))


def build_allocation(num_mib: int, has_temporary: bool) -> Call:
    """A call that fills so much memory, and lets go of as much before if asked to."""
    source = torch.ones(2**20, dtype=torch.uint8)

    def call() -> Tensor:
        if has_temporary:
            source.repeat(num_mib).add_(1)
            source.repeat(num_mib).add_(1)
        return source.repeat(num_mib)

    return call


def test_memory_is_that_of_the_call_alone() -> None:
    with PeakMemory(CPU) as memory:
        peaks = [
            memory.measure(partial(build_allocation, num_mib, has_temporary))
            for num_mib in (8, 64)
            for has_temporary in (False, True)
        ]
    assert [peak / 2**20 for peak in peaks if peak] == pytest.approx([8, 8, 64, 64], rel=0.1)


def test_a_gpu_is_timed_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current = "cuda:0"
    seen: list[str] = []

    @contextmanager
    def select(device: torch.device) -> Iterator[None]:
        nonlocal current
        before, current = current, str(device)
        yield
        current = before

    class Event:
        """One that notes the device of the stream that it is recorded on."""

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append(current)

        def synchronize(self) -> None:
            """Nothing runs."""

        def elapsed_time(self, end: Event) -> float:
            return 1000.0

    monkeypatch.setattr(torch.cuda, "device", select)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timings = time_interleaved(
        # So long that nothing is captured.
        {"a": lambda: seen.append(current)},
        num_rounds=1,
        device=torch.device("cuda", 1),
    )
    assert timings["a"].median_ms == 1000
    assert set(seen) == {"cuda:1"}
    assert current == "cuda:0"


def build_variables() -> Call:
    """Fail where the process was not started with the settings."""
    assert measure._RETURNS_MEMORY.items() <= os.environ.items()
    return int


def test_settings_of_the_other_process_do_not_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_DISABLE_FAST_MM", "0")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    before = dict(os.environ)
    with PeakMemory(CPU) as memory:
        memory.measure(build_variables)
        assert dict(os.environ) == before
