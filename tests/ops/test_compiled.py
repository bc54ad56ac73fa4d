"""The Triton kernels as compiled for GPUs that are not here: they fit, and get no slower."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

import triton

from ecoformer.ops.backends.triton import launch
from tests.ops.compiled import (
    DTYPES,
    RESULTS,
    SHARED_BYTES,
    compile_all,
    describe,
    fill_results,
    make_functions,
    read_table,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
slow = pytest.mark.slow

# Head dims of PVTv2-B0 and Twins, and of PVTv2-B1 to B5.
PUBLISHED = [(chip, dtype, dim) for chip in (80, 90, 100) for dtype in DTYPES for dim in (32, 64)]
QUICK = {(80, "float16", 64), (90, "bfloat16", 32), (100, "bfloat16", 32)}


@pytest.mark.parametrize(
    ("capability", "dtype", "dim"),
    [case if case in QUICK else pytest.param(*case, marks=slow) for case in PUBLISHED],
)
def test_published_sizes_fit_and_get_no_slower(capability: int, dtype: str, dim: int) -> None:
    version, rows = read_table()
    found = compile_all(capability, dtype, dim)
    assert len(found) == 5
    for kernel in found:
        row = rows[capability, dtype, dim, kernel.kernel]
        assert kernel.shared_bytes <= SHARED_BYTES[capability], kernel
        # Each version compiles otherwise, and the table is of one.
        if triton.__version__ == version:
            assert kernel.stack_bytes <= int(row["stack_bytes"]), kernel
            assert kernel.instructions <= 1.1 * float(row["instructions"]), kernel


def test_the_table_holds_what_was_aimed_at() -> None:
    _, rows = read_table()
    kernels = {key[3]: row for key, row in rows.items() if key[:3] == (90, "bfloat16", 32)}
    instructions = {name: float(row["instructions"]) for name, row in kernels.items()}
    assert instructions["sum_values"] + instructions["write_output"] <= 45
    assert instructions["sum_gradients"] + instructions["write_gradients"] <= 145
    # Of all published sizes.
    spilled = {key: int(row["stack_bytes"]) for key, row in rows.items() if int(row["stack_bytes"])}
    assert spilled == {(100, "float32", 64, "sum_gradients"): 160}
    for name in ("sum_gradients", "write_gradients"):
        row = rows[90, "bfloat16", 64, name]
        # Of an H100's processor: 228 KiB, of which each block has one for itself.
        assert 2 * (int(row["shared_bytes"]) + 1024) <= 228 * 1024
        assert 2 * int(row["registers"]) * 32 * int(row["num_warps"]) <= 65_536


def test_the_results_say_what_the_table_says() -> None:
    results = RESULTS.read_text()
    assert results.count("| now |") == len(PUBLISHED)
    assert fill_results(results) == results


# Head dim, bits, anchors.
OTHERS = [
    (80, "float32", (128, 16, 25)),
    (86, "float32", (64, 16, 25)),
    (89, "bfloat16", (64, 16, 25)),
    (90, "bfloat16", (96, 32, 49)),
    (90, "float16", (64, 64, 64)),
    (100, "float32", (8, 5, 7)),
]


@slow
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("capability", "dtype", "sizes"), OTHERS)
def test_other_sizes_fit(
    capability: int, dtype: str, sizes: tuple[int, int, int], is_masked: bool
) -> None:
    dim, bits, anchors = sizes
    found = compile_all(
        capability,
        dtype,
        dim,
        num_bits=bits,
        num_anchors=anchors,
        is_normalized=is_masked,
        is_masked=is_masked,
    )
    assert len(found) == 5
    assert all(kernel.shared_bytes <= SHARED_BYTES[capability] for kernel in found)


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "tile"),
    [
        (80, torch.float32, (64, 16, 25), 64),
        (86, torch.float32, (64, 16, 25), 32),
        (89, torch.bfloat16, (64, 16, 25), 64),
        (90, torch.float32, (128, 16, 25), 32),
        (89, torch.float32, (128, 16, 25), None),
        (90, torch.float32, (128, 64, 64), None),
    ],
)
def test_shared_memory_decides_what_runs(
    capability: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    tile: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "find_device", lambda device: describe(capability))
    dim, *others = sizes
    q, functions = torch.empty(1, 1, 1, dim, dtype=dtype), make_functions(1, dim, *others)
    fitting = [tokens for tokens in launch.TILES if launch.fits(q, functions, tokens)]
    assert (fitting[0] if fitting else None) == tile
    assert launch.fits(q, functions) == (tile is not None)


@slow
def test_a_kernel_that_does_not_fit_takes_a_smaller_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the estimate were too low.
    monkeypatch.setattr(launch, "fits", lambda *_: True)
    tiles = {kernel.kernel: kernel.tile_tokens for kernel in compile_all(89, "float32", 64)}
    assert tiles["measure_rows"] == 64
    assert tiles["sum_values"] == 32
