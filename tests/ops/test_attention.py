"""Hash attention against the dense reference: output, gradients, precision and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ecoformer import ops
from ecoformer.hash_config import ValueBias
from ecoformer.ops import reference, use_backend
from tests.problems import (
    SIZES,
    LargestTensor,
    Problem,
    draw,
    draw_problem,
    skip_what_cannot_run,
    solve,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VALUE_BIASES = ["released", "normalized"]


def assert_solves(problem: Problem, value_bias: str) -> None:
    """Compare with the reference on the same inputs in float64, to the accuracy of their dtype."""
    actual = solve(ops.kernelized_hash_attention, problem, value_bias=value_bias)
    expected = solve(reference.kernelized_hash_attention, problem.upcast(), value_bias=value_bias)
    for tensor, truth in zip(actual, expected, strict=True):
        assert tensor.dtype == problem.v.dtype
        torch.testing.assert_close(tensor, truth.to(tensor.dtype))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_equal_the_reference(
    dtype: torch.dtype, value_bias: str, size: dict[str, Any]
) -> None:
    assert_solves(draw_problem(**size, dtype=dtype), value_bias)


def test_float64_agrees_to_rounding() -> None:
    problem = draw_problem(tokens=101, dim=32, bits=16, anchors=25)
    actual = solve(ops.kernelized_hash_attention, problem)
    expected = solve(reference.kernelized_hash_attention, problem)
    for tensor, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_zero_rows_are_finite_and_equal_the_reference(value_bias: str) -> None:
    problem = draw_problem()
    problem.q[0, 1, 3] = 0
    problem.q[1] = 0
    assert all(t.isfinite().all() for t in solve(ops.kernelized_hash_attention, problem))
    assert_solves(problem, value_bias)


def test_a_row_too_short_to_become_a_unit_row_equals_the_reference() -> None:
    problem = draw_problem()
    problem.q[0, 1, 3] *= 1e-13 / problem.q[0, 1, 3].norm()
    actual = solve(ops.kernelized_hash_attention, problem)
    expected = solve(reference.kernelized_hash_attention, problem)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1][0, 1, 3], expected[1][0, 1, 3])


@pytest.mark.parametrize("name", ["eager", "blocked", "native"])
@pytest.mark.parametrize("value", [1e20, 3e38])
def test_a_row_of_infinite_norm_is_a_zero_row(name: str, value: float) -> None:
    """Its values are finite; products of the larger ones with it are not."""
    problem = draw_problem(dtype=torch.float32)
    skip_what_cannot_run(name, problem)
    problem.q[0, 1, 3] = problem.q[0, 1, 3].sign() * value
    assert problem.q[0, 1, 3].isfinite().all() and problem.q[0, 1, 3].norm().isinf()
    expected = solve(reference.kernelized_hash_attention, problem)
    with use_backend(name):
        found = solve(ops.kernelized_hash_attention, problem)
    for tensor, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, truth, rtol=1e-4, atol=1e-5)


def test_contiguous_inputs_give_what_strided_ones_give() -> None:
    problem = draw_problem(heads=3)
    assert not problem.q.is_contiguous()
    strided = ops.kernelized_hash_attention(problem.q, problem.v, **problem.functions)
    packed = ops.kernelized_hash_attention(
        problem.q.contiguous(), problem.v.contiguous(), **problem.functions
    )
    torch.testing.assert_close(strided, packed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_gradients_of_hash_attention_are_true_ones(value_bias: Any) -> None:
    codes = draw(2, 2, 5, 3).sign().requires_grad_()
    v = draw(2, 2, 5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, values: ops.hash_attention(h, values, value_bias), (codes, v)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_normalized_form_is_a_mean(dtype: torch.dtype) -> None:
    # Summed in half precision, 3,136 ones do not make 3,136.
    codes = draw(1, 1, 3136, 16).sign().float()
    out = ops.hash_attention(codes, torch.ones(1, 1, 3136, 2, dtype=dtype), "normalized")
    torch.testing.assert_close(out, torch.ones_like(out))


# bfloat16 rows are what the projections of a layer give there.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    problem = draw_problem(tokens=300, dtype=dtype)
    outside = solve(ops.kernelized_hash_attention, problem)
    inside = solve(ops.kernelized_hash_attention, problem, is_autocast=True)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_an_unknown_value_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="'released' or 'normalized', not 'mean'"):
        ops.hash_attention(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 4), "mean")  # type: ignore[arg-type]


def test_memory_is_linear_in_tokens_forward_and_backward() -> None:
    images, heads, tokens, anchors = 2, 3, 150, 25
    problem = draw_problem(images=images, heads=heads, tokens=tokens, dim=16, anchors=anchors)
    with LargestTensor() as shipped:
        solve(ops.kernelized_hash_attention, problem)
    assert 0 < shipped.numel <= images * heads * tokens * anchors
    with LargestTensor() as dense:
        solve(reference.kernelized_hash_attention, problem)
    assert dense.numel >= images * heads * tokens * max(tokens, anchors * 16)


@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_weights_of_chosen_queries_give_their_outputs_without_n_by_n(value_bias: ValueBias) -> None:
    codes, v = draw(2, 3, 101, 5).sign(), draw(2, 3, 101, 4, seed=1)
    queries = torch.tensor([100, 0, 7])
    with LargestTensor() as largest:
        weights = ops.hash_attention_weights(codes, queries, value_bias)
    assert weights.shape == (2, 3, 3, 101)
    expected = reference.hash_attention(codes, v, value_bias)[:, :, queries]
    torch.testing.assert_close(weights @ v, expected)
    assert largest.numel <= 2 * 3 * 101 * 5
