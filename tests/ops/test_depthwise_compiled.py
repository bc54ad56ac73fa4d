"""The kernels of the depthwise convolution, compiled for GPUs that are not here.

``python -m tests.ops.test_depthwise_compiled`` prints what the compiler makes of each.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ecoformer.ops.backends.triton import depthwise

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


class StandIn:
    """Take the place of a GPU's driver: keep what is started, and run nothing."""

    def __init__(self, capability: int) -> None:
        self.started: list[Compiled] = []
        self._capability = capability
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**17},
            load_binary=lambda name, binary, *_: (None, binary, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names, constants = source.fn.arg_names, source.constants
        sizes = {names[path[0]]: value for path, value in constants.items() if len(path) == 1}
        thread_values = 2 * sizes["BLOCK_P"] * sizes["BLOCK_C"] / (32 * metadata.num_warps)

        def start(_x: int, _y: int, _z: int, _stream: int, binary: bytes, *_: Any) -> None:
            registers, stack, loop = inspect(binary)
            name = source.fn.__name__.removesuffix("_kernel")
            figures = (registers, stack, metadata.shared, round(loop / thread_values, 1))
            self.started.append(Compiled(name, *figures))

        return start


def inspect(binary: bytes) -> tuple[int, int, int]:
    """Registers and bytes of stack of a thread, and instructions of the innermost loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage
    code = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", dump)
    addresses = [int(address, 16) for address, _ in code]
    loops = []
    for address, (_, text) in zip(addresses, code, strict=True):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append(sum(int(jump[1], 16) <= other <= address for other in addresses))
    return int(usage[1]), int(usage[2]), min(loops)


@contextmanager
def stand_in(capability: int) -> Iterator[StandIn]:
    with pytest.MonkeyPatch.context() as patch:
        device = StandIn(capability)
        patch.setattr(driver, "_active", device)
        yield device


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
    return device.started


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
