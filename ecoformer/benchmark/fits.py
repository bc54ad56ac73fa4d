"""The hash fit, beside the dense reference.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ecoformer.benchmark.compare import Contender, Setup, compare
from ecoformer.benchmark.cores import NUM_BITS, CoreInputs
from ecoformer.benchmark.report import Row
from ecoformer.hashing import fit_hash
from ecoformer.measure import Call, Timing, free_bytes, time_interleaved
from ecoformer.ops import reference

_NUM_STEPS = 100
# The reference takes minutes, so it is timed at one bit of 1 and of 11 steps and at two bits of
# 1 step, and the rest follows: each bit costs the same, and so does each step.
_TIMED_STEPS = 11
# N x N matrices that the reference holds at once, in floats.
_DENSE_MATRICES = 8


def build_fit(inputs: CoreInputs, *, num_steps: int = _NUM_STEPS) -> Call:
    """Prepare the shipped fit.

    Args:
        inputs: the calibration rows.
        num_steps: steps a bit.

    Returns:
        A call that fits once.
    """
    x, anchors, weight = _fit_inputs(inputs)
    return lambda: fit_hash(x, anchors=anchors, weight=weight, num_steps=num_steps)


def build_dense_fit(inputs: CoreInputs, *, num_bits: int, num_steps: int) -> Call:
    """Prepare the reference's fit of the first bits.

    Args:
        inputs: the calibration rows.
        num_bits: how many.
        num_steps: steps a bit.

    Returns:
        A call that fits once.
    """
    x, anchors, weight = _fit_inputs(inputs)
    weight = weight[:, :num_bits]
    return lambda: reference.fit_hash(x, anchors=anchors, weight=weight, num_steps=num_steps)


def _fit_inputs(inputs: CoreInputs) -> tuple[Tensor, Tensor, Tensor]:
    q, _, _ = inputs.draw_rows()
    anchors, weight, _ = inputs.draw_hash_functions(q)
    return reference.normalize_rows(q.float()), anchors, weight


def measure_fit(setup: Setup, *, batch_size: int, num_tokens: int) -> list[Row]:
    """One layer's fit, H=1 D=32 K=16 M=25, 100 steps a bit.

    Args:
        setup: where and how often.
        batch_size: B.
        num_tokens: N.

    Returns:
        A row of the shipped fit, and one of the reference where it fits into memory.
    """
    task = f"hash fit, {_NUM_STEPS} steps"
    inputs = CoreInputs(batch_size, num_tokens, 1, 32, setup.device, torch.float32)
    shipped = Contender("ecoformer", partial(build_fit, inputs))
    if 4 * _DENSE_MATRICES * batch_size * num_tokens**2 > free_bytes(setup.device):
        return compare(setup, task, [shipped], batch_size=batch_size, num_tokens=num_tokens)

    dense = partial(build_dense_fit, inputs)
    pieces = {
        "one": partial(dense, num_bits=1, num_steps=1),
        "steps": partial(dense, num_bits=1, num_steps=_TIMED_STEPS),
        "bits": partial(dense, num_bits=2, num_steps=1),
    }
    calls = {name: build() for name, build in pieces.items()} | {"ecoformer": shipped.build()}
    timings = time_interleaved(
        calls,
        num_rounds=setup.num_rounds,
        device=setup.device,
    )
    one, steps, bits = (timings[name].median_ms for name in pieces)
    per_step = (steps - one) / (_TIMED_STEPS - 1)
    whole = one + (NUM_BITS - 1) * (bits - one) + NUM_BITS * (_NUM_STEPS - 1) * per_step
    return [
        Row(
            task,
            "ecoformer",
            batch_size,
            num_tokens,
            timings["ecoformer"],
            setup.memory.measure(shipped.build),
        ),
        Row(
            task,
            "reference",
            batch_size,
            num_tokens,
            Timing(whole, whole, whole, 0),
            setup.memory.measure(pieces["one"]),
            note=f"extrapolated from 1 and 2 bits, 1 and {_TIMED_STEPS} steps",
        ),
    ]
