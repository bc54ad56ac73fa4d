"""From rows to codes: against the literal reference, and the properties that define each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ecoformer import ops
from ecoformer.ops import reference
from tests.problems import SIZES, draw, draw_problem, draw_unit_rows


def test_normalized_rows_have_length_one_and_full_precision() -> None:
    rows = draw(2, 3, 5, 8).bfloat16()
    unit = ops.normalize_rows(rows)
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, 3, 5))
    assert ops.normalize_rows(rows.double()).dtype == torch.float64


def test_a_zero_row_stays_zero() -> None:
    assert torch.equal(ops.normalize_rows(torch.zeros(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_kernel_features_are_those_of_the_literal_distances(size: dict[str, Any]) -> None:
    problem = draw_problem(**size)
    x, anchors = ops.normalize_rows(problem.q), problem.functions["anchors"]
    expected = reference.kernel_features(x, anchors)
    torch.testing.assert_close(
        ops.kernel_features(x, anchors).transpose(-1, -2), expected, rtol=1e-12, atol=1e-12
    )


def test_kernel_features_count_the_length_of_a_row() -> None:
    # Not unit rows: a formula that takes |x| for 1 fails here.
    x, anchors = draw(2, 2, 9, 4), draw(2, 3, 4, seed=1)
    expected = reference.kernel_features(x, anchors)
    torch.testing.assert_close(ops.kernel_features(x, anchors).transpose(-1, -2), expected)


def test_gradient_of_kernel_features_passes_through_the_bandwidth() -> None:
    x = draw_unit_rows(2, 2, 5, 4).requires_grad_()
    anchors = draw_unit_rows(2, 3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda rows: ops.kernel_features(rows, anchors), x)


def test_the_sign_of_zero_is_minus() -> None:
    y = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])
    expected = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0])
    assert torch.equal(ops.binarize(y), expected)
    assert torch.equal(ops.sign_straight_through(y), expected)


def test_the_gradient_passes_strictly_inside_one() -> None:
    inside, outside = torch.nextafter(torch.ones(1), torch.zeros(1)).item(), 1.5
    y = torch.tensor([-outside, -1.0, -inside, 0.0, inside, 1.0, outside], requires_grad=True)
    grad = torch.arange(1.0, 8.0)
    ops.sign_straight_through(y).backward(grad)
    assert y.grad is not None
    assert y.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_equal_the_reference(size: dict[str, Any], dtype: torch.dtype) -> None:
    problem = draw_problem(**size, dtype=dtype)
    codes = ops.encode(ops.normalize_rows(problem.q), **problem.functions)
    upcast = problem.upcast()
    expected = reference.encode(reference.normalize_rows(upcast.q), **upcast.functions)
    assert torch.equal(codes.double(), expected)
    assert set(codes.unique().tolist()) <= {-1.0, 1.0}
    assert codes.dtype == torch.promote_types(dtype, torch.float32)


def test_autocast_flips_no_code() -> None:
    problem = draw_problem(tokens=500, dtype=torch.float32)
    x = ops.normalize_rows(problem.q)
    with torch.autocast("cpu", torch.bfloat16):
        codes = ops.encode(x, **problem.functions)
    assert torch.equal(codes, ops.encode(x, **problem.functions))


def test_no_gradient_reaches_the_hash_functions_as_buffers() -> None:
    problem = draw_problem()
    codes = ops.encode(ops.normalize_rows(problem.q), **problem.functions)
    assert not codes.requires_grad
