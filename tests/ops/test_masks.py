"""Key masks: output and gradients are those of the real tokens alone, with every backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecoformer import InputError, ops
from ecoformer.hash_config import ValueBias
from ecoformer.ops import kernelized_hash_attention, operator, reference, use_backend
from ecoformer.ops.backends import BACKENDS, blocked
from tests.problems import (
    LargestTensor,
    Problem,
    draw,
    draw_alike_problem,
    draw_mask,
    draw_problem,
    draw_unit_rows,
    skip_what_cannot_run,
    solve,
    solve_unpadded,
)

VALUE_BIASES = ["released", "normalized"]
# Triton's interpreter has a process of its own: see test_triton.
EVERYWHERE = [backend.name for backend in BACKENDS if backend.name != "triton"]
backends = pytest.mark.parametrize("name", EVERYWHERE)


def spoil(problem: Problem, key_mask: Tensor, value: float = float("nan")) -> Problem:
    """Put a number into the rows and gradients of masked tokens."""
    is_masked = ~key_mask[:, None, :, None]
    rows = (x.masked_fill(is_masked, value) for x in (problem.q, problem.v, problem.grad))
    q, v, grad = rows
    return replace(problem, q=q, v=v, grad=grad)


def draw_case(seed: int) -> tuple[Problem, Tensor, str]:
    """Any sizes, any mask, any contents of masked rows."""
    choose = random.Random(seed)
    images, tokens = choose.randint(1, 4), choose.randint(1, 40)
    problem = draw_problem(
        images=images,
        heads=choose.randint(1, 3),
        tokens=tokens,
        dim=choose.randint(1, 12),
        bits=choose.randint(1, 9),
        anchors=choose.randint(1, 9),
        dtype=choose.choice([torch.float64, torch.float32]),
        seed=seed,
    )
    mask = draw_mask(images, tokens, ratio=choose.choice([0, 0.1, 0.5, 0.9, 1]), seed=seed)
    mask = choose.choice([mask, mask.mT.contiguous().mT, mask.sort(descending=True).values])
    problem = spoil(problem, mask, choose.choice([0.0, 1e30, float("inf"), float("nan")]))
    return problem, mask, choose.choice(VALUE_BIASES)


@backends
@pytest.mark.parametrize("seed", range(40))
def test_masked_equals_unpadded_whatever_the_sizes_and_the_mask(name: str, seed: int) -> None:
    problem, mask, value_bias = draw_case(seed)
    skip_what_cannot_run(name, problem)
    with use_backend(name):
        expected = solve_unpadded(kernelized_hash_attention, problem, mask, value_bias=value_bias)
        found = solve(kernelized_hash_attention, problem, value_bias=value_bias, key_mask=mask)
    truth = solve_unpadded(
        reference.kernelized_hash_attention, problem.upcast(), mask, value_bias=value_bias
    )
    is_masked = ~mask[:, None, :, None].expand_as(problem.q)
    for tensor, alone, exact in zip(found, expected, truth, strict=True):
        assert_close(tensor, alone, rtol=1e-5, atol=1e-5)
        assert_close(tensor.double(), exact, rtol=1e-5, atol=1e-5)
        assert not tensor[is_masked].any()


@backends
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_masked_too(name: str, value_bias: str, dtype: torch.dtype) -> None:
    problem, mask = draw_problem(images=3, tokens=17, dtype=dtype), draw_mask(3, 17)
    problem = spoil(problem, mask)
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem, value_bias=value_bias, key_mask=mask)
    truth = solve_unpadded(
        reference.kernelized_hash_attention, problem.upcast(), mask, value_bias=value_bias
    )
    for tensor, exact in zip(found, truth, strict=True):
        assert_close(tensor, exact.to(dtype))


@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_weights_of_chosen_queries_give_their_outputs(value_bias: ValueBias) -> None:
    codes, v, mask = draw(3, 2, 31, 5).sign(), draw(3, 2, 31, 4, seed=1), draw_mask(3, 31)
    # The last image has no real token.
    mask[-1] = False
    is_masked, queries = ~mask[:, None, :, None], torch.tensor([30, 0, 7])
    spoiled = codes.masked_fill(is_masked, float("nan"))
    weights = ops.hash_attention_weights(spoiled, queries, value_bias, key_mask=mask)
    outputs = ops.hash_attention(spoiled, v, value_bias, key_mask=mask)
    assert_close(weights @ v, outputs[:, :, queries])
    assert not weights.masked_select(is_masked.mT).any()
    with pytest.raises(InputError, match=r"key_mask is \[images, tokens\] = \[3, 31\]"):
        ops.hash_attention_weights(codes, queries, key_mask=mask[:2])


@backends
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_all_masked_is_zeros(name: str, value_bias: str) -> None:
    problem = draw_problem(dtype=torch.float32)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem, value_bias=value_bias, key_mask=mask)
    for tensor in found:
        assert torch.equal(tensor, torch.zeros_like(tensor))


@backends
def test_nothing_masked_changes_no_more_than_rounding(name: str) -> None:
    problem, mask = draw_problem(), torch.ones(2, 20, dtype=torch.bool)
    skip_what_cannot_run(name, problem)
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem, key_mask=mask)
        assert_close(found, solve(kernelized_hash_attention, problem))


@backends
@pytest.mark.parametrize("spread", [5e-4, 1e-7, 0.0])
def test_real_tokens_may_be_alike(name: str, spread: float) -> None:
    # Where distances cancel rows are moved to the anchors, but masked ones nowhere.
    problem, mask = draw_alike_problem(spread), draw_mask(2, 40)
    skip_what_cannot_run(name, problem)
    with use_backend(name):
        found = solve(kernelized_hash_attention, spoil(problem, mask), key_mask=mask)
        expected = solve_unpadded(kernelized_hash_attention, problem, mask)
    for tensor, truth in zip(found, expected, strict=True):
        assert (tensor - truth).norm() <= 1e-8 * truth.norm()


@pytest.mark.parametrize(
    ("rows", "threads", "heads", "tokens", "cut"),
    [
        pytest.param(50, 2, 2, 24, (1, 24), id="two images, and one left over"),
        pytest.param(24, 2, 1, 24, (8, 3), id="parts of images"),
        pytest.param(7, 10, 1, 80, (10, 3), id="uneven chunks of parts"),
        pytest.param(10, 1, 2, 23, (1, 2), id="chunks of two heads"),
    ],
)
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_blocks_do_not_show(
    rows: int,
    threads: int,
    heads: int,
    tokens: int,
    cut: tuple[int, int],
    value_bias: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, mask = draw_problem(images=3, heads=heads, tokens=tokens), draw_mask(3, tokens)
    expected = solve_unpadded(
        reference.kernelized_hash_attention, problem, mask, value_bias=value_bias
    )
    monkeypatch.setattr(blocked, "_ROWS_PER_THREAD", rows)
    monkeypatch.setattr(blocked, "_MAX_WHOLE_TOKENS", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert blocked._cut(problem.q) == cut
    found = solve(kernelized_hash_attention, problem, value_bias=value_bias, key_mask=mask)
    assert_close(found, expected)


@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_the_halves_take_a_mask_and_give_the_whole(value_bias: Any) -> None:
    problem, mask = draw_problem(), draw_mask(2, 20)
    codes = ops.encode(ops.normalize_rows(problem.q), **problem.functions, key_mask=mask)
    out = ops.hash_attention(codes, problem.v, value_bias, key_mask=mask)
    expected = kernelized_hash_attention(
        problem.q, problem.v, **problem.functions, value_bias=value_bias, key_mask=mask
    )
    assert codes.abs().eq(1).all()
    assert_close(out, expected)


@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_gradients_are_true_ones(value_bias: Any) -> None:
    codes = draw(2, 2, 5, 3).sign().requires_grad_()
    v = draw(2, 2, 5, 4, seed=1).requires_grad_()
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    assert torch.autograd.gradcheck(
        lambda h, values: ops.hash_attention(h, values, value_bias, key_mask=mask), (codes, v)
    )
    # The sign has no true gradient, but the bandwidth does.
    x, anchors = draw_unit_rows(2, 2, 5, 4).requires_grad_(), draw_unit_rows(1, 2, 3, 4)[0]
    assert torch.autograd.gradcheck(
        lambda rows: ops.kernel_features(rows, anchors, mask) * mask[:, None, None], x
    )


@backends
def test_autocast_changes_nothing(name: str) -> None:
    problem, mask = draw_problem(tokens=300, dtype=torch.bfloat16), draw_mask(2, 300)
    with use_backend(name):
        outside = solve(kernelized_hash_attention, problem, key_mask=mask)
        inside = solve(kernelized_hash_attention, problem, is_autocast=True, key_mask=mask)
    assert all(torch.equal(*pair) for pair in zip(outside, inside, strict=True))


def test_memory_is_linear_in_tokens() -> None:
    images, heads, tokens, anchors = 2, 3, 150, 25
    problem = draw_problem(images=images, heads=heads, tokens=tokens, dim=16, anchors=anchors)
    with LargestTensor() as shipped:
        solve(kernelized_hash_attention, problem, key_mask=draw_mask(images, tokens))
    assert 0 < shipped.numel <= images * heads * tokens * anchors


@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_pytorch_finds_no_fault_with_the_operator(value_bias: str) -> None:
    problem = draw_problem()
    rows = (row.detach().requires_grad_() for row in (problem.q, problem.v))
    arguments = (*rows, *problem.functions.values(), value_bias == "normalized", "")
    torch.library.opcheck(operator.attend, (*arguments, draw_mask(2, 20)))


@backends
def test_a_compiled_call_is_one_graph_and_equal(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(kernelized_hash_attention, fullgraph=True, backend="aot_eager")
    problem, mask = draw_problem(dtype=torch.float32), draw_mask(2, 20)
    with use_backend(name):
        choices: list[dict[str, Any]] = [{"key_mask": mask}, {"key_mask": ~mask}, {}]
        for options in choices:
            found = solve(compiled, problem, **options)
            assert_close(found, solve(kernelized_hash_attention, problem, **options))


class Layer(nn.Module):
    """The operator as a module, which is what can be exported."""

    def __init__(self, functions: dict[str, Any]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, q: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
        return kernelized_hash_attention(q, v, **self.functions, key_mask=key_mask)


@pytest.mark.parametrize("name", ["blocked", "eager"])
def test_it_is_exported_with_any_number_of_images_and_tokens(name: str) -> None:
    problem = draw_problem(images=3)
    layer, arguments = Layer(problem.functions), (problem.q, problem.v, draw_mask(3, 20))
    images, tokens = torch.export.Dim("images", min=2), torch.export.Dim("tokens", min=2)
    rows = {0: images, 2: tokens}
    shapes = {"q": rows, "v": rows, "key_mask": {0: images, 1: tokens}}
    with use_backend(name):
        exported = torch.export.export(layer, arguments, dynamic_shapes=shapes).module()
        other = draw_problem(images=5, tokens=31)
        mask = draw_mask(5, 31)
        assert_close(exported(other.q, other.v, mask), layer(other.q, other.v, mask))


def test_it_has_a_shape_without_data() -> None:
    problem = draw_problem()
    functions = {name: x.to("meta") for name, x in problem.functions.items()}
    mask = draw_mask(2, 20).to("meta")
    # Kernels in C++ take memory of a CPU.
    for name in set(EVERYWHERE) - {"native"}:
        with use_backend(name):
            q, v = problem.q.to("meta"), problem.v.to("meta")
            out = kernelized_hash_attention(q, v, **functions, key_mask=mask)
        assert out.shape == v.shape


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([[True] * 20] * 2, "not a list"),
    "numbers": (torch.ones(2, 20), r"true for a real token, not torch\.float32; .*\.bool\(\)"),
    "one image too many": (torch.ones(3, 20).bool(), r"\[2, 20\] here, not \[3, 20\]"),
    "one for all images": (torch.ones(1, 20).bool(), r"\[2, 20\] here, not \[1, 20\]"),
    "one dimension": (torch.ones(20).bool(), r"\[2, 20\] here, not \[20\]"),
    "pairs of tokens": (torch.ones(2, 20, 20).bool(), r"not \[2, 20, 20\]"),
    "elsewhere": (torch.ones(2, 20, device="meta").bool(), "is on meta and the rows are on cpu"),
}
CALLS: dict[str, Callable[[Problem, Any], object]] = {
    "whole": lambda p, mask: kernelized_hash_attention(p.q, p.v, **p.functions, key_mask=mask),
    "encode": lambda p, mask: ops.encode(p.q, **p.functions, key_mask=mask),
    "attend": lambda p, mask: ops.hash_attention(p.q.sign(), p.v, key_mask=mask),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("mask", "message"), BAD.values(), ids=BAD)
def test_another_mask_is_one_line(
    mask: Any, message: str, call: Callable[[Problem, Any], object]
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        call(draw_problem(), mask)
    assert "\n" not in str(raised.value)
