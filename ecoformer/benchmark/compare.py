"""Contenders for one task, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ecoformer.benchmark.report import Row
from ecoformer.measure import Build, PeakMemory, time_interleaved


@dataclass(frozen=True)
class Setup:
    """Where and how often things are measured.

    Args:
        device: CPU or CUDA.
        dtype: of attention's inputs, and of autocast around models.
        num_rounds: turns that each contender takes.
        memory: measures peak memory on the device.
    """

    device: torch.device
    dtype: torch.dtype
    num_rounds: int
    memory: PeakMemory


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Args:
        name: in tables.
        build: makes the call.
        pass_bytes: what its passes read and write, where that is known.
    """

    name: str
    build: Build
    pass_bytes: int | None = None


def compare(
    setup: Setup,
    task: str,
    contenders: Sequence[Contender],
    *,
    batch_size: int,
    num_tokens: int,
    least_bytes: int | None = None,
) -> list[Row]:
    """Time contenders in turns, then measure the memory of each.

    Args:
        setup: where and how often.
        task: what they all do.
        contenders: the shipped implementation first.
        batch_size: B.
        num_tokens: N.
        least_bytes: what any of them must read and write.

    Returns:
        A row each.
    """
    calls = {contender.name: contender.build() for contender in contenders}
    timings = time_interleaved(calls, num_rounds=setup.num_rounds, device=setup.device)
    # What the calls hold would be in the way of the measurement of memory.
    calls.clear()
    return [
        Row(
            task,
            contender.name,
            batch_size,
            num_tokens,
            timings[contender.name],
            setup.memory.measure(contender.build),
            least_bytes,
            contender.pass_bytes,
        )
        for contender in contenders
    ]
