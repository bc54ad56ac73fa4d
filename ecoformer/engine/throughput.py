"""How many samples a model takes in a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecoformer.engine.compiling import compile_model
from ecoformer.engine.precision import autocast
from ecoformer.engine.session import move_to
from ecoformer.hashing import with_random_hash_functions

_NUM_WARMUP = 50
_NUM_TIMED = 30
NUM_BATCHES = _NUM_WARMUP + _NUM_TIMED


@dataclass(frozen=True)
class Throughput:
    """Samples a second: the median of single batches, and what a tenth of them was slower and
    faster than. By the released protocol, all are the rate of all batches together.
    """

    median: float
    low: float
    high: float
    samples: str = "samples"

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.1f} {self.samples}/s"
        return (
            f"median {self.median:.1f} {self.samples}/s, "
            f"8 of 10 in {self.low:.1f} to {self.high:.1f}"
        )


@torch.inference_mode()
def measure_throughput(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    batch_size: int,
    protocol: str,
    amp_dtype: torch.dtype = torch.float32,
    compile_mode: str | None = None,
    samples: str = "samples",
) -> Throughput:
    """Time a copy of a model in eval mode, with random hash functions where it has no others.

    Args:
        inputs: arguments of the model, on any device, of ``batch_size`` samples.
        protocol: ``"released"`` times 30 batches as one after 50 to warm up, the device's queue
            full; ``"median"`` does the same and times each batch on its own.
        compile_mode: of ``torch.compile``; None does without it.

    Source: the released implementation.
    """
    model = with_random_hash_functions(model).eval()
    device = next(model.parameters()).device
    inputs = move_to(tuple(inputs), device)
    if compile_mode:
        model = compile_model(model, compile_mode)

    def run(num_batches: int) -> float:
        start = time.perf_counter()
        for _ in range(num_batches):
            with autocast(device, amp_dtype):
                model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run(_NUM_WARMUP)
    if protocol == "released":
        rate = _NUM_TIMED * batch_size / run(_NUM_TIMED)
        return Throughput(rate, rate, rate, samples)
    rates = [batch_size / run(1) for _ in range(_NUM_TIMED)]
    deciles = statistics.quantiles(rates, n=10)
    return Throughput(statistics.median(rates), deciles[0], deciles[-1], samples)
