"""The kernels of the depthwise convolution, compiled for GPUs that are not here.

``python -m tests.ops.test_depthwise_compiled`` prints what the compiler makes of each.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

import triton

from ecoformer.ops.backends.triton import depthwise
from tests.ops.compiled import Started, inspect, stand_in

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

# Of a thread: three blocks of four warps share a processor's, or two of those that sum.
MAX_REGISTERS = {"convolve": 168, "sum_gradients": 255}
MAX_SHARED_BYTES = 8192
# ``Compiled.instructions`` for bfloat16, GELU and 256 channels, with Triton 3.8.0: the convolution,
# the sums, and the gradient of the map, which is a convolution with turned taps.
INSTRUCTIONS = {80: (44.1, 60.9, 21.6), 90: (44.6, 60.4, 21.2), 100: (36.8, 48.9, 18.8)}


@dataclass(frozen=True)
class Compiled:
    kernel: str
    registers: int  # of a thread
    stack_bytes: int  # of a thread: what did not fit into registers
    shared_bytes: int  # of a block
    instructions: float  # of a thread in the innermost loop, for each value


def compile_all(
    capability: int, dtype: torch.dtype, form: str, num_channels: int
) -> list[Compiled]:
    """Compile what a forward and a backward of a first stage start, at 224 px."""
    x = torch.empty(128, 56, 56, num_channels, dtype=dtype, device="meta")
    weight = torch.empty(num_channels, 1, 3, 3, device="meta")
    bias = torch.empty(num_channels, device="meta")
    with stand_in(capability) as device:
        depthwise.forward(x, weight, bias, form)
        depthwise.backward(x, x, weight, bias, form)
    return [_count(kernel) for kernel in device.started]


def _count(kernel: Started) -> Compiled:
    registers, stack_bytes, loops = inspect(kernel.binary)
    num_values = 2 * kernel.constants["BLOCK_P"] * kernel.constants["BLOCK_C"]
    thread_values = num_values / (32 * kernel.metadata.num_warps)
    shared_bytes = kernel.metadata.shared
    return Compiled(
        kernel.name, registers, stack_bytes, shared_bytes, round(min(loops) / thread_values, 1)
    )


# Hidden maps of PVTv2; maps of Twins, in float32 under autocast; what neither has.
CASES = [
    *((c, torch.bfloat16, "gelu", 256) for c in (90, 80, 100)),
    *((c, d, "gelu", 256) for c in (80, 90, 100) for d in (torch.float16, torch.float32)),
    *((c, torch.float32, "residual", 64) for c in (80, 90, 100)),
    *((c, torch.bfloat16, "relu gelu", 70) for c in (80, 90, 100)),
]


@pytest.mark.parametrize(
    ("capability", "dtype", "form", "num_channels"),
    [
        case if not i else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_kernels_compile_without_spills(
    capability: int, dtype: torch.dtype, form: str, num_channels: int
) -> None:
    found = compile_all(capability, dtype, form, num_channels)
    assert [kernel.kernel for kernel in found] == ["convolve", "sum_gradients", "convolve"]
    for kernel in found:
        assert kernel.stack_bytes == 0, kernel
        assert kernel.registers <= MAX_REGISTERS[kernel.kernel], kernel
        assert kernel.shared_bytes <= MAX_SHARED_BYTES, kernel
    # Another version may compile otherwise.
    if (dtype, form) == (torch.bfloat16, "gelu") and triton.__version__ == "3.8.0":
        for kernel, count in zip(found, INSTRUCTIONS[capability], strict=True):
            assert kernel.instructions <= 1.1 * count, kernel


if __name__ == "__main__":
    for case in CASES:
        print(case)
        for kernel in compile_all(*case):
            print("  ", kernel)
