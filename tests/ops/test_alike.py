"""Rows that are equal, or nearly so, have the distances of the literal form.

Squares of about 1 that cancel leave rounding, which the bandwidth then divides by rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecoformer import ops
from ecoformer.ops import kernelized_hash_attention, reference, use_backend
from ecoformer.ops.backends import blocked
from tests.problems import (
    Problem,
    draw,
    draw_alike_problem,
    draw_problem,
    draw_unit_rows,
    skip_what_cannot_run,
    solve,
)

# Of unit rows: from where nothing cancels to a few bits of float32, and to less than one.
SPREADS = [0.3, 0.05, 5e-4, 1e-5, 1e-6, 1e-7, 1e-9, 0.0]
DTYPES = [torch.float64, torch.float32]
VALUE_BIASES = ["released", "normalized"]
FAST = ["eager", "blocked", "native"]


def solve_reference(problem: Problem, value_bias: str = "released") -> tuple[Tensor, ...]:
    """The literal form in the precision that the method computes in."""
    dtype = problem.functions["weight"].dtype
    q, v, grad = (x.to(dtype) for x in (problem.q, problem.v, problem.grad))
    full = Problem(q, v, problem.functions, grad)
    return solve(reference.kernelized_hash_attention, full, value_bias=value_bias)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_features_are_those_of_the_literal_distances(
    spread: float, dtype: torch.dtype
) -> None:
    problem = draw_alike_problem(spread, dtype=dtype)
    x, anchors = ops.normalize_rows(problem.q), problem.functions["anchors"]
    expected = reference.kernel_features(x.double(), anchors.double())
    found = ops.kernel_features(x, anchors).transpose(-1, -2)
    assert_close(found.double(), expected, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_output_and_gradients_equal_the_literal_form(
    spread: float, name: str, value_bias: str, dtype: torch.dtype
) -> None:
    problem = draw_alike_problem(spread, dtype=dtype)
    skip_what_cannot_run(name, problem)
    expected = solve_reference(problem, value_bias)
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem, value_bias=value_bias)
    eps = torch.finfo(dtype).eps
    for tensor, truth in zip(found, expected, strict=True):
        assert tensor.isfinite().all()
        # The gradient of near rows is large, and that of equal ones 0.
        assert (tensor.to(truth.dtype) - truth).norm() <= 200 * eps * truth.norm()


@pytest.mark.parametrize("name", FAST)
def test_float32_is_no_farther_from_the_truth_than_the_literal_form(name: str) -> None:
    problem = draw_alike_problem(5e-4, dtype=torch.float32)
    skip_what_cannot_run(name, problem)
    truth = solve(reference.kernelized_hash_attention, problem.upcast())
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem)
    for tensor, exact in zip(found, truth, strict=True):
        assert (tensor.double() - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_have_features_of_one_and_no_gradient(dtype: torch.dtype) -> None:
    x = draw_unit_rows(1, 2, 1, 8, dtype=dtype).expand(2, 2, 9, 8).clone().requires_grad_()
    anchors = x[0, :, :3].detach()
    features = ops.kernel_features(x, anchors)
    assert torch.equal(features, torch.ones_like(features))
    (grad,) = torch.autograd.grad(features.sum(), x)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_zero_rows_at_zero_anchors_are_finite(name: str) -> None:
    problem = draw_problem(dtype=torch.float32)
    skip_what_cannot_run(name, problem)
    problem.q.zero_()
    problem.functions["anchors"].zero_()
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem)
    assert all(tensor.isfinite().all() for tensor in found)
    assert not found[1].any()


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_one_alike_image_beside_others(name: str) -> None:
    problem, alike = (
        draw_problem(tokens=40, dtype=torch.float32),
        draw_alike_problem(5e-4, dtype=torch.float32),
    )
    skip_what_cannot_run(name, problem)
    problem.q[1] = alike.q[0]
    mixed = Problem(problem.q, problem.v, alike.functions, problem.grad)
    expected = solve_reference(mixed)
    with use_backend(name):
        found = solve(kernelized_hash_attention, mixed)
    for tensor, truth in zip(found, expected, strict=True):
        assert (tensor - truth).norm() <= 1e-4 * truth.norm()


def test_a_row_that_is_an_anchor_has_a_feature_of_one() -> None:
    x = draw_unit_rows(2, 2, 50, 32, dtype=torch.float32)
    features = ops.kernel_features(x, x[0, :, :7].clone())[0, :, :, :7]
    assert_close(features.diagonal(dim1=-2, dim2=-1), torch.ones(2, 7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_the_gradient_of_near_rows_is_a_true_one(spread: float) -> None:
    x = draw_unit_rows(1, 2, 1, 4) + spread * draw(2, 2, 5, 4, seed=1)
    anchors = draw_unit_rows(1, 2, 1, 4)[0] + spread * draw(2, 3, 4, seed=2)
    assert torch.autograd.gradcheck(
        lambda rows: ops.kernel_features(rows, anchors), x.requires_grad_(), eps=1e-6 * spread
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_moved_rows_have_the_bits_of_normalized_ones(heads: int) -> None:
    q = draw(2, 50, heads, 32).float().transpose(1, 2)
    flat = blocked._flatten(q, torch.float32)
    moved = blocked._Rows.of(flat).move(flat.new_zeros(2 * heads, 1, 32)).q
    assert torch.equal(moved.view(q.shape), ops.normalize_rows(q))


@pytest.mark.parametrize(("rows", "cut"), [(24, (8, 5)), (5, (8, 1))])
def test_parts_and_chunks_of_near_rows_do_not_show(
    rows: int, cut: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = draw_alike_problem(1e-5)
    functions = {name: tensor[:1] for name, tensor in problem.functions.items()}
    one_head = Problem(problem.q[:, :1], problem.v[:, :1], functions, problem.grad[:, :1])
    expected = solve(kernelized_hash_attention, one_head)
    monkeypatch.setattr(blocked, "_ROWS_PER_THREAD", rows)
    monkeypatch.setattr(blocked, "_MAX_WHOLE_TOKENS", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert blocked._cut(one_head.q) == cut
    assert_close(solve(kernelized_hash_attention, one_head), expected)


@pytest.mark.parametrize("name", FAST)
def test_what_is_not_a_number_stays_none(name: str) -> None:
    problem = draw_alike_problem(5e-4, dtype=torch.float32)
    skip_what_cannot_run(name, problem)
    problem.q[0, 0, 3, 2] = float("nan")
    with use_backend(name):
        assert solve(kernelized_hash_attention, problem)[1][0, 0].isnan().any()
