"""Time the hash fit beside the dense reference.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ecoformer.hashing import fit_hash
from ecoformer.ops import reference
from ecoformer.tools.benchmark.comparison import (
    REFERENCE_FLOATS,
    Comparison,
    Contender,
    Setup,
    compare,
    lack_of_memory,
)
from ecoformer.tools.benchmark.cores import CoreInputs
from ecoformer.tools.benchmark.measurements import Measurement
from ecoformer.tools.measure import Call

NUM_STEPS = 100
TASK = f"hash fit, {NUM_STEPS} steps"
_FITS = {"ecoformer": fit_hash, "reference": reference.fit_hash}
# Pairs of tokens, over all images, from which on the reference takes minutes.
_MAX_PAIRS = {"cpu": 2**25, "cuda": 2**30}


def build_fit(name: str, inputs: CoreInputs) -> Call:
    """Prepare a fit of all bits to the rows of ``inputs``, ``"ecoformer"`` or ``"reference"``."""
    q, _, _ = inputs.draw_rows()
    functions = inputs.draw_hash_functions(q)
    x = reference.normalize_rows(q.float())
    return partial(
        _FITS[name], x, anchors=functions.anchors, weight=functions.weight, num_steps=NUM_STEPS
    )


def measure_fit(setup: Setup, *, batch_size: int, num_tokens: int) -> Iterator[list[Measurement]]:
    """Time one layer's fit, H=1 D=32 K=16 M=25, 100 steps a bit, beside the reference."""
    inputs = CoreInputs(batch_size, num_tokens, setup.device, torch.float32)
    num_pairs = batch_size * num_tokens**2
    why_not = lack_of_memory(4 * REFERENCE_FLOATS * num_pairs, setup.device)
    if num_pairs > _MAX_PAIRS[setup.device.type]:
        why_not = "takes minutes"
    comparison = Comparison(
        setup,
        TASK,
        [
            Contender("ecoformer", partial(build_fit, "ecoformer", inputs)),
            Contender("reference", partial(build_fit, "reference", inputs), why_not=why_not),
        ],
        batch_size=batch_size,
        num_tokens=num_tokens,
        # Both look at their results on the host, which no graph can hold.
        is_captured=False,
    )
    yield from compare(comparison)
