"""The Triton kernels: against the reference in the interpreter, compiled, and on a GPU.

The interpreter is chosen when Triton is imported, so what it runs has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ecoformer.ops import kernelized_hash_attention, operator, reference, use_backend
from ecoformer.ops.backends import HashFunctions, find_backend, find_fused_backend
from ecoformer.ops.backends.blocked import BlockedBackend
from tests.problems import (
    Problem,
    draw_alike_problem,
    draw_mask,
    draw_problem,
    skip_what_cannot_run,
    solve,
    solve_unpadded,
)

pytest.importorskip("triton")

import triton
import triton.language as tl

from ecoformer.ops.backends.triton import kernels, launch

ROOT = Path(__file__).parents[2]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="run by the test of all of them")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VALUE_BIASES = ["released", "normalized"]
# N is odd, one, or past a tile and past a range; sizes fill their tiles or do not.
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {"tokens": 37, "dim": 8, "bits": 5, "anchors": 7},
    "one token": {"images": 1, "tokens": 2, "dim": 16, "bits": 16, "anchors": 16},
    "published": {"heads": 1, "tokens": 80, "dim": 32, "bits": 16, "anchors": 25},
    "two ranges": {"images": 1, "heads": 2, "tokens": 131, "dim": 3, "bits": 2, "anchors": 3},
    "largest": {"images": 1, "heads": 1, "tokens": 33, "dim": 128, "bits": 64, "anchors": 64},
}
# Rounding of 16 bits; the interpreter's bfloat16 is cut off rather than rounded.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def test_all_in_the_interpreter() -> None:
    """Run the tests that are skipped here."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "interpreted",
            __file__,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all values together."""
    return float((value.double() - expected).norm() / expected.norm())


def check_against_reference(problem: Problem, value_bias: str, dtype: torch.dtype) -> None:
    """Output and gradients, against the reference in float64 on the same numbers."""
    functions = HashFunctions(**problem.functions)
    assert find_fused_backend("", problem.q, problem.v, functions).name == "triton"
    expected = solve(reference.kernelized_hash_attention, problem.upcast(), value_bias=value_bias)
    found = solve(kernelized_hash_attention, problem, value_bias=value_bias)
    assert [tensor.dtype for tensor in found] == [dtype] * 3
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCES[dtype], errors


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_kernels_equal_the_reference(
    dtype: torch.dtype, value_bias: str, shape: dict[str, Any]
) -> None:
    check_against_reference(draw_problem(**shape, dtype=dtype), value_bias, dtype)


@interpreted
@pytest.mark.parametrize("name", ["triton", "blocked", "eager", "reference"])
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_interpreted_choice_gives_equal_results(name: str, value_bias: str) -> None:
    problem = draw_problem(tokens=37, dtype=torch.float32)
    expected = solve(reference.kernelized_hash_attention, problem.upcast(), value_bias=value_bias)
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem, value_bias=value_bias)
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCES[torch.float32], errors


@interpreted
@pytest.mark.parametrize("shape", ["odd", "published", "two ranges", "largest"])
@pytest.mark.parametrize(
    ("value_bias", "dtype"), [("released", torch.bfloat16), ("normalized", torch.float32)]
)
def test_interpreted_masked_equals_unpadded(
    value_bias: str, dtype: torch.dtype, shape: str
) -> None:
    problem = draw_problem(**SHAPES[shape], dtype=dtype)
    mask = draw_mask(len(problem.q), SHAPES[shape]["tokens"])
    expected = solve_unpadded(
        reference.kernelized_hash_attention, problem.upcast(), mask, value_bias=value_bias
    )
    is_masked = ~mask[:, None, :, None]
    # Whatever masked rows hold.
    rows = (x.masked_fill(is_masked, torch.nan) for x in (problem.q, problem.v, problem.grad))
    q, v, grad = rows
    spoilt = Problem(q, v, problem.functions, grad)
    found = solve(kernelized_hash_attention, spoilt, value_bias=value_bias, key_mask=mask)
    for tensor, truth in zip(found, expected, strict=True):
        assert relative_error(tensor, truth) < TOLERANCES[dtype]
        assert not tensor[is_masked.expand_as(tensor)].any()


@interpreted
def test_interpreted_image_without_a_real_token_is_zeros() -> None:
    problem, mask = draw_problem(images=3, dtype=torch.float32), draw_mask(3, 20)
    mask[1] = False
    expected = solve_unpadded(reference.kernelized_hash_attention, problem.upcast(), mask)
    found = solve(kernelized_hash_attention, problem, key_mask=mask)
    for tensor, truth in zip(found, expected, strict=True):
        assert relative_error(tensor, truth) < TOLERANCES[torch.float32]
        assert not tensor[1].any()


@interpreted
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("names", [("triton", "blocked"), ("blocked", "triton")])
def test_interpreted_backward_takes_the_sums_of_another(
    names: tuple[str, str], value_bias: str, is_masked: bool
) -> None:
    problem = draw_problem(tokens=37, dtype=torch.float32)
    key_mask = draw_mask(2, 37) if is_masked else None
    inputs = (problem.q, problem.v, HashFunctions(**problem.functions))
    first, second = (find_fused_backend(name, *inputs) for name in names)
    settings: dict[str, Any] = {
        "is_normalized": value_bias == "normalized",
        "key_mask": key_mask,
    }
    _, *left = first.forward(*inputs, **settings)
    found = second.backward(problem.grad, *inputs, *left, **settings)
    expected = solve(
        reference.kernelized_hash_attention,
        problem.upcast(),
        value_bias=value_bias,
        key_mask=key_mask,
    )
    for tensor, truth in zip(found, expected[1:], strict=True):
        assert relative_error(tensor, truth) < TOLERANCES[torch.float32]


@interpreted
@pytest.mark.parametrize("tile_tokens", [16, 32])
def test_interpreted_tiles_do_not_show(tile_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw_problem(dtype=torch.float32)
    functions, blocked = HashFunctions(**problem.functions), BlockedBackend()
    monkeypatch.setattr(launch, "TILES", (tile_tokens,))
    monkeypatch.setattr(launch, "_tiles", {})
    arguments = (problem.q, problem.v, functions)
    out, sums, scale = launch.forward(*arguments, is_normalized=True)
    expected = blocked.forward(*arguments, is_normalized=True)
    assert_close((out, sums, scale), expected)
    backward = (problem.grad, *arguments, sums, scale)
    assert_close(
        launch.backward(*backward, is_normalized=True),
        blocked.backward(*backward, is_normalized=True),
    )


@interpreted
def test_interpreted_rows_that_are_too_short_equal_the_reference() -> None:
    problem = draw_problem(tokens=9, dtype=torch.float32)
    problem.q[0, 0, 3] = 0
    problem.q[1, 1, 4] *= 1e-13
    expected = solve(reference.kernelized_hash_attention, problem.upcast())
    for value, truth in zip(solve(kernelized_hash_attention, problem), expected, strict=True):
        assert relative_error(value, truth) < 2e-6
    # What is small beside the gradients of short rows counts too.
    is_long = problem.q.norm(dim=-1) > 1e-6
    grad_q = solve(kernelized_hash_attention, problem)[1]
    assert relative_error(grad_q[is_long], expected[1][is_long]) < 2e-6


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e20, 3e38, torch.inf])
def test_interpreted_infinite_row_equals_the_reference(factor: float, dtype: torch.dtype) -> None:
    problem = draw_problem(dtype=dtype)
    # An infinite norm of finite numbers, products of these that overflow, infinite numbers.
    problem.q[0, 1, 3] = problem.q[0, 1, 3].sign() * factor
    with use_backend("reference"):
        expected = solve(kernelized_hash_attention, problem)
    found = solve(kernelized_hash_attention, problem)
    for tensor, truth in zip(found, expected, strict=True):
        assert tensor.isnan().equal(truth.isnan())
        error = relative_error(tensor.nan_to_num(), truth.double().nan_to_num())
        assert error < TOLERANCES[dtype]


@interpreted
@pytest.mark.parametrize("where", ["q", "anchors", "weight", "kernel_mean"])
def test_interpreted_nan_gives_nan(where: str) -> None:
    problem = draw_problem(dtype=torch.float32)
    rows = problem.q[1, 1] if where == "q" else problem.functions[where][1]
    rows.select(-1, 3).fill_(torch.nan)
    out, *_ = solve(kernelized_hash_attention, problem)
    is_nan = out.isnan().all(-1).all(-1)
    assert is_nan.tolist() == [[False, where != "q"], [False, True]]
    assert out.isnan().any(-1).any(-1).equal(is_nan)


@interpreted
@pytest.mark.parametrize("spread", [0.3, 0.05, 5e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_kernels_equal_the_reference_on_near_rows(
    spread: float, dtype: torch.dtype
) -> None:
    problem = draw_alike_problem(spread, dtype=dtype)
    expected = solve(reference.kernelized_hash_attention, problem.upcast())
    errors = map(relative_error, solve(kernelized_hash_attention, problem), expected)
    assert max(errors) < max(1e-4, TOLERANCES[dtype])


@interpreted
@pytest.mark.parametrize("spread", [1e-5, 1e-6, 1e-7, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_rows_alike_to_rounding_are_finite(spread: float, dtype: torch.dtype) -> None:
    found = solve(kernelized_hash_attention, draw_alike_problem(spread, dtype=dtype))
    assert all(tensor.isfinite().all() for tensor in found)


@interpreted
@pytest.mark.parametrize("is_zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_equal_rows_have_no_gradient(is_zero: bool, dtype: torch.dtype) -> None:
    problem = draw_alike_problem(0.0, dtype=dtype)
    if is_zero:
        problem.q.zero_()
        problem.functions["anchors"].zero_()
    with use_backend("blocked"):
        expected = solve(kernelized_hash_attention, problem)
    out, grad_q, grad_v = solve(kernelized_hash_attention, problem)
    assert not grad_q.any() and not expected[1].any()
    assert relative_error(out, expected[0].double()) < TOLERANCES[dtype]
    assert relative_error(grad_v, expected[2].double()) < TOLERANCES[dtype]


@interpreted
def test_interpreted_operator_passes_pytorchs_checks() -> None:
    problem = draw_problem(images=1, heads=2, tokens=5, dtype=torch.float32)
    rows = (row.requires_grad_() for row in (problem.q, problem.v))
    arguments = (*rows, *problem.functions.values(), False)
    torch.library.opcheck(operator.attend, arguments)
    torch.library.opcheck(operator.attend, (*arguments, "", draw_mask(1, 5)))


@triton.jit
def split_kernel(numbers, parts, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The three parts of each number, [3, SIZE]."""
    indices = tl.arange(0, SIZE)
    high, middle, low = kernels._split(tl.load(numbers + indices), 3)
    tl.store(parts + indices, high)
    tl.store(parts + SIZE + indices, middle)
    tl.store(parts + 2 * SIZE + indices, low)


@interpreted
def test_interpreted_parts_are_exact_in_bfloat16() -> None:
    numbers = torch.randn(64, generator=torch.Generator().manual_seed(0))
    parts = torch.empty(3, 64)
    split_kernel[(1,)](numbers, parts, SIZE=64)
    assert torch.equal(parts.double().sum(0).float(), numbers)
    assert torch.equal(parts.bfloat16().float(), parts)


def test_what_kernels_do_not_take_is_left_to_the_other_form() -> None:
    def can_run(dtype: torch.dtype = torch.float32, **sizes: int) -> bool:
        problem = draw_problem(tokens=2, dtype=dtype, **sizes)
        functions = HashFunctions(**problem.functions)
        return find_backend("triton").can_run(problem.q, problem.v, functions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert can_run(dim=128, bits=64, anchors=64)
        assert not can_run(torch.float64)
        assert not can_run(dim=129)
        assert not can_run(bits=65)
        assert not can_run(anchors=65)
        patch.setenv("TRITON_INTERPRET", "0")
        assert not can_run()


@pytest.mark.parametrize(
    ("groups", "tokens", "processors", "range_tokens"),
    [
        pytest.param(128, 3136, 132, 448, id="equal ranges"),
        pytest.param(640, 196, 132, 256, id="one range"),
        pytest.param(1, 3136, 132, 128, id="one image"),
        pytest.param(1, 65536, 132, 128, id="one long image"),
        pytest.param(8, 65536, 132, 512, id="many tokens"),
        pytest.param(1, 1, 1, 64, id="one token"),
    ],
)
def test_ranges_are_equal_and_fill_a_device(
    groups: int, tokens: int, processors: int, range_tokens: int
) -> None:
    assert launch.choose_range(groups, tokens, processors) == range_tokens


def on_gpu(problem: Problem) -> Problem:
    """The same numbers on the GPU, strided as they are."""
    functions = {name: tensor.cuda() for name, tensor in problem.functions.items()}
    return Problem(problem.q.cuda(), problem.v.cuda(), functions, problem.grad.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_a_gpu_equal_the_reference(
    dtype: torch.dtype, value_bias: str, shape: dict[str, Any]
) -> None:
    problem = on_gpu(draw_problem(**shape, dtype=dtype))
    skip_what_cannot_run("triton", problem)
    check_against_reference(problem, value_bias, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_on_a_gpu_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    problem = on_gpu(draw_problem(images=8, tokens=3136, dim=32, bits=16, anchors=25, dtype=dtype))
    first, second = (solve(kernelized_hash_attention, problem) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_call_compiled_on_a_gpu_is_one_graph_and_equal() -> None:
    compiled = torch.compile(kernelized_hash_attention, fullgraph=True)
    problem = on_gpu(draw_problem(tokens=64, dtype=torch.bfloat16))
    assert_close(solve(compiled, problem), solve(kernelized_hash_attention, problem))


@pytest.mark.gpu
def test_codes_on_a_gpu_flip_no_more_often_than_float32_rounds() -> None:
    problem = on_gpu(
        draw_problem(images=4, tokens=3136, dim=32, bits=16, anchors=25, dtype=torch.float32)
    )
    _, sums, _ = operator.attend(problem.q, problem.v, *problem.functions.values(), False)
    exact = problem.upcast()
    _, expected, _ = operator.attend(exact.q, exact.v, *exact.functions.values(), False)
    # Sums of signs differ by 2 for every code that flips; one in 100,000 may.
    flips = (sums[..., :-1, -1].double() - expected[..., :-1, -1]).abs().sum() / 2
    assert flips < 4 * 2 * 3136 * 16 * 1e-5
