"""How many images a model classifies in a second."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from ecoformer.engine.compiling import compile_model
from ecoformer.engine.precision import autocast
from ecoformer.hashing import with_random_hash_functions

_NUM_WARMUP = 50
_NUM_TIMED = 30
NUM_BATCHES = _NUM_WARMUP + _NUM_TIMED


@dataclass(frozen=True)
class Throughput:
    """Images a second, as measured.

    Args:
        median: of single batches; by the released protocol, of all of them together.
        low: a tenth of the batches was slower.
        high: a tenth of the batches was faster.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.1f} images/s"
        return f"median {self.median:.1f} images/s, 8 of 10 in {self.low:.1f} to {self.high:.1f}"


@torch.inference_mode()
def measure_throughput(
    model: nn.Module,
    *,
    protocol: str,
    batch_size: int,
    input_size: int,
    device: torch.device,
    amp_dtype: torch.dtype = torch.float32,
    is_compiled: bool = False,
) -> Throughput:
    """Time a model on random images, in eval mode.

    No fit is needed: a copy is timed, with random hash functions where there are no others.

    Args:
        model: the bare model, on the device.
        protocol: ``"released"`` times 30 batches as one after 50 to warm up, the device's queue
            full; ``"median"`` does the same and times each batch on its own.
        batch_size: images a batch.
        input_size: image side, pixels.
        device: where the model is.
        amp_dtype: from ``choose_amp_dtype``.
        is_compiled: time it under ``torch.compile``.

    Returns:
        Images a second; without a spread for ``"released"``.

    Source: the released implementation.
    """
    model = with_random_hash_functions(model).eval()
    if is_compiled:
        model = compile_model(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, input_size, input_size, generator=generator).to(device)

    def run(num_batches: int) -> float:
        """Seconds that some batches take, to the end of the last."""
        start = time.perf_counter()
        for _ in range(num_batches):
            with autocast(device, amp_dtype):
                model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run(_NUM_WARMUP)
    if protocol == "released":
        rate = _NUM_TIMED * batch_size / run(_NUM_TIMED)
        return Throughput(rate, rate, rate)
    rates = [batch_size / run(1) for _ in range(_NUM_TIMED)]
    deciles = statistics.quantiles(rates, n=10)
    return Throughput(statistics.median(rates), deciles[0], deciles[-1])
