"""The operator: blocks do not show, and compiling and exporting pass through it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.testing import assert_close

from ecoformer.ops import kernelized_hash_attention, operator, reference
from ecoformer.ops.backends import blocked
from tests.problems import Problem, draw_problem, solve

VALUE_BIASES = ["released", "normalized"]


@pytest.mark.parametrize(
    ("rows", "threads", "heads", "tokens", "cut"),
    [
        pytest.param(50, 2, 2, 24, (1, 24), id="two images, and one left over"),
        pytest.param(24, 2, 1, 24, (8, 3), id="parts of images"),
        pytest.param(1, 12, 1, 24, (12, 1), id="chunks of parts"),
        pytest.param(7, 10, 1, 80, (10, 3), id="uneven chunks of parts"),
        pytest.param(7, 3, 1, 23, (1, 10), id="chunks of an image without parts"),
        pytest.param(10, 1, 2, 23, (1, 2), id="chunks of two heads"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_blocks_do_not_show(
    rows: int,
    threads: int,
    heads: int,
    tokens: int,
    cut: tuple[int, int],
    dtype: torch.dtype,
    value_bias: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = draw_problem(images=3, heads=heads, tokens=tokens, dtype=dtype)
    expected = solve(kernelized_hash_attention, problem, value_bias=value_bias)
    monkeypatch.setattr(blocked, "_ROWS_PER_THREAD", rows)
    monkeypatch.setattr(blocked, "_MAX_WHOLE_TOKENS", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert blocked._cut(problem.q) == cut
    actual = solve(kernelized_hash_attention, problem, value_bias=value_bias)
    assert_close(actual, expected)
    if dtype == torch.float64:
        truth = solve(reference.kernelized_hash_attention, problem, value_bias=value_bias)
        assert_close(actual, truth)


@pytest.mark.parametrize("images, tokens", [(0, 24), (3, 0)])
def test_nothing_gives_nothing(images: int, tokens: int) -> None:
    problem = draw_problem(images=3, tokens=24)
    q, v, grad = (x[:images, :, :tokens] for x in (problem.q, problem.v, problem.grad))
    few = replace(problem, q=q, v=v, grad=grad)
    for result in solve(kernelized_hash_attention, few):
        assert result.shape == few.q.shape


def arguments(problem: Problem, value_bias: str) -> tuple[Any, ...]:
    """What the operator takes, in its order."""
    rows = (row.detach().requires_grad_() for row in (problem.q, problem.v))
    names = ("anchors", "weight", "kernel_mean")
    return *rows, *(problem.functions[name] for name in names), value_bias == "normalized"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
def test_pytorch_finds_no_fault_with_it(dtype: torch.dtype, value_bias: str) -> None:
    torch.library.opcheck(operator.attend, arguments(draw_problem(dtype=dtype), value_bias))


def test_a_compiled_call_is_one_graph_and_equal() -> None:
    compiled = torch.compile(kernelized_hash_attention, fullgraph=True, backend="aot_eager")
    problem = draw_problem(dtype=torch.float32)
    assert_close(solve(compiled, problem), solve(kernelized_hash_attention, problem))


def test_other_sizes_compile_once_more_at_most() -> None:
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    torch.compiler.reset()
    compiled = torch.compile(kernelized_hash_attention, fullgraph=True, backend=count)
    for images in (4, 3, 2):
        problem = draw_problem(images=images, tokens=5 + images)
        with torch.no_grad():
            compiled(problem.q, problem.v, **problem.functions)
    assert len(graphs) == 2


class Layer(nn.Module):
    """The operator as a module, which is what can be exported."""

    def __init__(self, functions: dict[str, Any]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        return kernelized_hash_attention(q, v, **self.functions)


def test_it_is_exported_whole() -> None:
    problem = draw_problem()
    layer = Layer(problem.functions)
    exported = torch.export.export(layer, (problem.q, problem.v))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names[0] == "ecoformer.kernelized_hash_attention.default"
    assert_close(exported.module()(problem.q, problem.v), layer(problem.q, problem.v))


def test_merging_heads_copies_nothing() -> None:
    problem = draw_problem(heads=3)
    out = kernelized_hash_attention(problem.q, problem.v, **problem.functions)
    assert rearrange(out, "b h n d -> b n (h d)").data_ptr() == out.data_ptr()


def test_an_expanded_gradient_is_taken() -> None:
    problem = draw_problem()
    q, v = (row.requires_grad_() for row in (problem.q, problem.v))
    given = torch.autograd.grad(kernelized_hash_attention(q, v, **problem.functions).sum(), (q, v))
    ones = Problem(q.detach(), v.detach(), problem.functions, torch.ones_like(problem.grad))
    assert_close(given, solve(kernelized_hash_attention, ones)[1:])


def test_it_has_a_shape_without_data() -> None:
    problem = draw_problem(dtype=torch.bfloat16)
    out = kernelized_hash_attention(
        problem.q.to("meta"),
        problem.v.to("meta"),
        **{name: tensor.to("meta") for name, tensor in problem.functions.items()},
    )
    assert (out.shape, out.dtype, out.stride()) == (
        problem.v.shape,
        torch.bfloat16,
        kernelized_hash_attention(problem.q, problem.v, **problem.functions).stride(),
    )
