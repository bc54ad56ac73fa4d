"""Compile the Triton kernels for GPUs that are not here, and count what came out.

``python -m tests.ops.compiled`` rewrites ``compiled.csv``, which tests compare with, and with it
the lines of ``.github/results/kernels.md`` that say "now".
"""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ecoformer.ops.backends import HashFunctions
from ecoformer.ops.backends.triton import launch

TABLE = Path(__file__).with_name("compiled.csv")
RESULTS = Path(__file__).parents[2] / ".github/results/kernels.md"
GPUS = {"A100": 80, "H100": 90, "B200": 100}
KERNELS = ("measure_rows", "sum_values", "write_output", "sum_gradients", "write_gradients")
# Shared memory of a block at most, of an A100, RTX 3090, RTX 4090, H100 and B200.
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled."""

    capability: int
    dtype: str  # of rows
    dim: int
    kernel: str
    tile_tokens: int
    num_warps: int
    registers: int  # of a thread
    stack_bytes: int  # of a thread; registers that are spilled
    shared_bytes: int  # of a block
    instructions: float  # SASS instructions of all warps for each token of the inner loop


@dataclass(frozen=True)
class Started:
    """A kernel that was to run, and its constants by name."""

    name: str
    binary: bytes
    metadata: Any
    constants: dict[str, Any]


class StandInDriver:
    """Take the place of the driver of a GPU: kernels are compiled and kept, and not run.

    Raises:
        OutOfResources: of Triton, where a kernel needs more shared memory than there is.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.started: list[Started] = []
        properties = {"max_shared_mem": SHARED_BYTES[capability]}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # A module, a function, registers, spills, threads.
            load_binary=lambda name, binary, *_: (None, binary, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        name = source.fn.__name__.removesuffix("_kernel")
        constants = {
            source.fn.arg_names[path[0]]: value
            for path, value in source.constants.items()
            if len(path) == 1
        }

        def start(_x: int, _y: int, _z: int, _stream: int, binary: bytes, *_: Any) -> None:
            self.started.append(Started(name, binary, metadata, constants))

        return start


@contextmanager
def stand_in(capability: int) -> Iterator[StandInDriver]:
    """Let kernels be compiled for a chip in a block."""
    device = StandInDriver(capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", device)
        yield device


def describe(capability: int) -> launch.Device:
    """As the launcher sees it; with an H100's number of processors."""
    return launch.Device(divmod(capability, 10), SHARED_BYTES[capability], 132)


def make_functions(heads: int, dim: int, num_bits: int, num_anchors: int) -> HashFunctions:
    """Shapes without numbers."""
    return HashFunctions(
        torch.empty(heads, num_anchors, dim, device="meta"),
        torch.empty(heads, num_bits, num_anchors, device="meta"),
        torch.empty(heads, num_anchors, device="meta"),
    )


def compile_all(
    capability: int,
    dtype: str,
    dim: int,
    *,
    num_bits: int = 16,
    num_anchors: int = 25,
    is_normalized: bool = False,
    is_masked: bool = False,
) -> list[Compiled]:
    """Compile what a forward and a backward of stage 1 of PVTv2 start, at 224 px."""
    images, heads, tokens = 128, 1, 3136

    def rows() -> Tensor:
        rows = torch.empty(images, tokens, heads, dim, dtype=DTYPES[dtype], device="meta")
        return rows.transpose(1, 2)

    functions = make_functions(heads, dim, num_bits, num_anchors)
    key_mask = torch.empty(images, tokens, dtype=torch.bool, device="meta") if is_masked else None
    options: dict[str, Any] = {"is_normalized": is_normalized, "key_mask": key_mask}
    with stand_in(capability) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_tiles", {})
        patch.setattr(launch, "find_device", lambda _: describe(capability))
        q, v, grad = rows(), rows(), rows()
        _, *left = launch.forward(q, v, functions, **options)
        launch.backward(grad, q, v, functions, *left, **options)
    return [_count(kernel, capability, dtype, dim) for kernel in device.started]


def _count(kernel: Started, capability: int, dtype: str, dim: int) -> Compiled:
    registers, stack_bytes, loops = inspect(kernel.binary)
    tile, num_warps = kernel.constants["BLOCK_N"], kernel.metadata.num_warps
    return Compiled(
        *(capability, dtype, dim, kernel.name, tile, num_warps),
        *(registers, stack_bytes, kernel.metadata.shared),
        instructions=round(max(loops) * num_warps / tile, 1),
    )


def inspect(binary: bytes) -> tuple[int, int, list[int]]:
    """Registers and bytes of stack of a thread, and instructions of each loop."""
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
        # Jumps back are the ends of loops.
        if jump and int(jump[1], 16) < address:
            loops.append(sum(int(jump[1], 16) <= other <= address for other in addresses))
    return int(usage[1]), int(usage[2]), loops


def read_table() -> tuple[str, dict[tuple[int, str, int, str], dict[str, str]]]:
    """Triton's version, and rows by capability, dtype, head dim and kernel."""
    version, *lines = TABLE.read_text().splitlines()
    rows = csv.DictReader(lines)
    return version.removeprefix("# Triton "), {
        (int(row["capability"]), row["dtype"], int(row["dim"]), row["kernel"]): row for row in rows
    }


def write_table() -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# Triton {triton.__version__}\n")
        writer = csv.DictWriter(
            file, [field.name for field in fields(Compiled)], lineterminator="\n"
        )
        writer.writeheader()
        for capability in (80, 90, 100):
            for dtype in DTYPES:
                for dim in (32, 64):
                    writer.writerows(map(asdict, compile_all(capability, dtype, dim)))


def fill_results(results: str) -> str:
    """Put the figures of the table into results, in the line after each size's "before"."""
    _, rows = read_table()
    lines, cells = results.splitlines(), list[str]()
    for i, line in enumerate(lines):
        if line.startswith("| | now |"):
            gpu, dtype, dim = cells[1].strip().split(", ")
            size = (GPUS[gpu], dtype, int(dim.removeprefix("D = ")))
            figures = (_format(rows[(*size, kernel)]) for kernel in KERNELS)
            lines[i] = f"| | now | {' | '.join(figures)} |"
        cells = line.split("|")
    return "\n".join(lines) + "\n"


def _format(row: dict[str, str]) -> str:
    kib = int(row["shared_bytes"]) // 1024
    return f"{row['registers']}/{row['stack_bytes']}/{kib}/{row['instructions']}"


if __name__ == "__main__":
    write_table()
    RESULTS.write_text(fill_results(RESULTS.read_text()))
