"""The depthwise convolution: kernels in the interpreter, compiled and on a GPU, and PyTorch's.

The interpreter is chosen when Triton is imported, so what it runs has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ecoformer.errors import InputError
from ecoformer.models.mlp import Mlp
from ecoformer.ops import depthwise_conv, reference, use_backend
from ecoformer.ops.backends import triton as triton_ops
from ecoformer.ops.depthwise import Form, compose, convolve, has_kernel
from tests.problems import draw
from twins.model import PositionalConvolution

FORMS: list[Any] = [*get_args(Form)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [B, H, W, C]: odd, one value, past a range and a strip, two blocks of channels, the largest block.
SHAPES = [(2, 3, 5, 13), (1, 1, 1, 1), (1, 17, 1, 3), (1, 1, 9, 3), (1, 1, 3, 70), (1, 2, 1, 128)]
# Rounding of 16 bits; the interpreter's bfloat16 is cut off rather than rounded.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by the test of all of them"
)


@needs_triton
def test_all_in_the_interpreter() -> None:
    """Run the tests that are skipped here."""
    command = ["pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@dataclass(frozen=True)
class Problem:
    """Inputs of ``depthwise_conv`` and a gradient to send back."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor

    def to(self, *args: Any) -> Problem:
        bias = None if self.bias is None else self.bias.to(*args)
        return Problem(self.x.to(*args), self.weight.to(*args), bias, self.grad.to(*args))


def draw_problem(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, *, seed: int = 0
) -> Problem:
    """Maps of ``dtype``; parameters of float32 at least, as autocast leaves them."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.promote_types(dtype, torch.float32)
    num_channels = shape[-1]
    return Problem(
        draw(*shape, seed=generator).to(dtype),
        (draw(num_channels, 1, 3, 3, seed=generator) / 3).to(full),
        draw(num_channels, seed=generator).to(full),
        draw(*shape, seed=generator).to(dtype),
    )


def solve(convolve: Callable[..., Tensor], problem: Problem, form: str) -> tuple[Tensor, ...]:
    """The output, and the gradients at map, weight and bias."""
    given = [problem.x, problem.weight, *([] if problem.bias is None else [problem.bias])]
    inputs = [tensor.detach().requires_grad_() for tensor in given]
    out = convolve(*inputs, *([None] if problem.bias is None else []), form)
    return (out.detach(), *torch.autograd.grad(out, inputs, problem.grad))


def check(problem: Problem, form: str) -> tuple[Tensor, ...]:
    """Hold output and gradients against the reference in float64 on the same numbers."""
    assert has_kernel(problem.x)
    expected = solve(reference.depthwise_conv, problem.to(torch.float64), form)
    found = solve(depthwise_conv, problem, form)
    tolerance = TOLERANCES[problem.x.dtype]
    for index, (tensor, truth) in enumerate(zip(found, expected, strict=True)):
        assert tensor.dtype == (problem.x if index < 2 else problem.weight).dtype
        assert (tensor.double() - truth).norm() <= tolerance * truth.norm(), index
    return found


@interpreted
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        *((torch.float32, form) for form in FORMS),
        (torch.bfloat16, "gelu"),
        (torch.bfloat16, "residual"),
        (torch.float16, "relu gelu"),
    ],
)
def test_interpreted_kernels_equal_the_reference_and_themselves(
    dtype: torch.dtype, form: Form
) -> None:
    problem = draw_problem((2, 2, 5, 13), dtype)
    found = check(problem, form)
    assert all(map(torch.equal, found, solve(depthwise_conv, problem, form)))


@interpreted
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_interpreted_kernels_equal_the_reference_at_the_edges(shape: tuple[int, ...]) -> None:
    check(draw_problem(shape, torch.float32), "gelu")


@interpreted
@pytest.mark.parametrize("seed", range(3))
def test_interpreted_kernels_equal_the_reference_on_any_size(seed: int) -> None:
    sizes = torch.randint(1, 6, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    problem = draw_problem((1, *sizes), torch.float32, seed=seed)
    if seed % 2:
        problem = Problem(problem.x, problem.weight, None, problem.grad)
    check(problem, FORMS[seed % 3])


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_interpreted_kernels_take_any_strides(form: Form) -> None:
    whole = draw_problem((1, 4, 10, 8), torch.float32)
    weight = whole.weight.transpose(2, 3)
    x = rearrange(whole.x, "b h w c -> b c h w").contiguous().movedim(1, 3)[:, ::2, 1:8]
    grad = whole.grad[0, 0, 0, :1].expand(x.shape)
    check(Problem(x, weight, whole.bias, grad), form)


@interpreted
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_interpreted_kernels_keep_what_is_not_finite_to_its_neighbours(value: float) -> None:
    problem = draw_problem((1, 5, 6, 3), torch.float32)
    problem.x[0, 2, 3, 1] = value
    for form in FORMS[1:]:
        given = problem.x, problem.weight, problem.bias, form
        found, expected = depthwise_conv(*given), reference.depthwise_conv(*given)
        is_near = torch.zeros(found.shape, dtype=torch.bool)
        is_near[0, 1:4, 2:5, 1] = True
        assert_close(found[~is_near], expected[~is_near])
        if value != value:
            assert found[is_near].isnan().all()


@interpreted
def test_interpreted_operator_passes_pytorchs_checks() -> None:
    problem = draw_problem((1, 1, 2, 3), torch.float32)
    tensors = [problem.x, problem.weight, problem.bias]
    arguments = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    torch.library.opcheck(convolve, (*arguments, "relu gelu"))
    torch.library.opcheck(convolve, (*arguments[:2], None, "residual"))


def layers(has_relu: bool) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Mlp(4, 6, has_dwconv=True, has_relu=has_relu), PositionalConvolution(4)]


def find_convolution(layer: nn.Module) -> nn.Conv2d:
    (conv,) = (module for module in layer.modules() if isinstance(module, nn.Conv2d))
    return conv


@interpreted
@pytest.mark.parametrize("has_relu", [False, True])
def test_interpreted_layers_are_what_pytorch_makes_of_them(has_relu: bool) -> None:
    x, grad = draw(1, 6, 4).float(), draw(1, 6, 4, seed=1).float()
    for layer in layers(has_relu):
        found, expected = list[Tensor](), list[Tensor]()
        for backend, results in (("triton", found), ("eager", expected)):
            inputs = [x.requires_grad_(), *layer.parameters()]
            with use_backend(backend):
                out = layer(x, (2, 3))
            results += [out, *torch.autograd.grad(out, inputs, grad)]
        assert_close(found, expected)
        names = {type(node[0]).__name__ for node in walk(layer(x, (2, 3)).grad_fn)}
        assert any("ecoformer_depthwise_conv" in name for name in names), names


def walk(node: Any) -> Any:
    """Nodes of autograd that a result comes from."""
    waiting = [(node, 0)]
    while waiting:
        yield (last := waiting.pop())
        waiting += [pair for pair in last[0].next_functions if pair[0] is not None]


@interpreted
def test_interpreted_layers_compile_to_one_graph() -> None:
    x = draw(1, 6, 4).float()
    for layer in layers(True):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        out, expected = compiled(x, (2, 3)), layer(x, (2, 3))
        parameters = [*layer.parameters()]
        assert_close(out, expected)
        assert_close(
            torch.autograd.grad(out.sum(), parameters),
            torch.autograd.grad(expected.sum(), parameters),
        )


@interpreted
def test_interpreted_autocast_leaves_parameters_as_they_are() -> None:
    x = draw(1, 6, 4).float()
    mlp = layers(False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(x, (2, 3))
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), mlp(x, (2, 3)), atol=2e-2, rtol=2e-2)
    grads = torch.autograd.grad(out.sum(), [*mlp.parameters()])
    assert {grad.dtype for grad in grads} == {torch.float32}


@interpreted
def test_interpreted_watched_layers_are_called() -> None:
    x, called = draw(1, 6, 4).float(), list[nn.Module]()
    for layer in layers(False):
        conv = find_convolution(layer)
        conv.register_forward_hook(lambda module, *_: called.append(module))
        layer(x, (2, 3))
        assert called.pop() is conv


@interpreted
def test_interpreted_transforms_go_through_pytorch() -> None:
    problem = draw_problem((1, 2, 3, 2), torch.float32)

    def total(x: Tensor) -> Tensor:
        return (depthwise_conv(x, problem.weight, problem.bias, "gelu") * problem.grad).sum()

    found = torch.func.grad(total)(problem.x)
    assert_close(found, solve(depthwise_conv, problem, "gelu")[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pytorchs_operations_equal_the_reference(shape: tuple[int, ...], form: Form) -> None:
    problem = draw_problem(shape)
    expected = solve(reference.depthwise_conv, problem, form)
    assert_close(solve(compose, problem, form), expected)
    for backend in ("reference", "eager", "blocked"):
        with use_backend(backend):
            assert_close(solve(depthwise_conv, problem, form), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_pytorchs_operations_is_right(form: Form) -> None:
    problem = draw_problem((2, 3, 4, 3))
    inputs = [
        t.requires_grad_() for t in (problem.x, problem.weight, problem.bias) if t is not None
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: compose(x, w, b, form), inputs)


def test_a_backend_that_cannot_run_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    problem = draw_problem((1, 2, 2, 3))
    with use_backend("triton"), pytest.raises(InputError, match=r"float64 maps on cpu"):
        depthwise_conv(problem.x, problem.weight, problem.bias, "gelu")


@needs_triton
def test_what_a_gpu_can_do_is_a_constant_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "_can_compile", lambda device: True)

    def choose(x: Tensor) -> Tensor:
        return x + 1 if triton_ops._is_recent(x.device) else x

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


def test_products_are_counted_as_those_of_a_convolution() -> None:
    problem = draw_problem((2, 4, 5, 6), torch.float32).to("meta")
    num_products = 9 * problem.x.numel()
    for function in (convolve, compose):
        with FlopCounterMode(display=False) as counter:
            function(problem.x, problem.weight, problem.bias, "gelu")
        # A product and a sum are two.
        assert counter.get_total_flops() == 2 * num_products
    with FlopCounterMode(display=False) as counter:
        solve(convolve, problem, "gelu")
    assert counter.get_total_flops() == 3 * 2 * num_products


@pytest.mark.parametrize("has_relu", [False, True])
def test_without_kernels_layers_are_called_and_nothing_changes(has_relu: bool) -> None:
    x, called = draw(1, 6, 4).float(), list[nn.Module]()
    for layer in layers(has_relu):
        conv = find_convolution(layer)
        expected = layer(x, (2, 3))
        conv.register_forward_hook(lambda module, *_: called.append(module))
        assert torch.equal(layer(x, (2, 3)), expected)
        assert called.pop() is conv


@pytest.mark.parametrize("has_relu", [False, True])
def test_exported_layers_hold_standard_operators(has_relu: bool) -> None:
    x = draw(2, 6, 4).float()
    for layer in layers(has_relu):
        program = torch.export.export(layer, (x, (2, 3)))
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any("conv2d" in target for target in targets)
        assert all(target.startswith("aten.") for target in targets), targets


def on_gpu(problem: Problem) -> Problem:
    return problem.to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (8, 56, 56, 256), (3, 7, 7, 1024), (2, 33, 50, 320)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_a_gpu_equal_the_reference_and_themselves(
    dtype: torch.dtype, form: Form, shape: tuple[int, ...]
) -> None:
    problem = on_gpu(draw_problem(shape, dtype))
    found = check(problem, form)
    assert all(map(torch.equal, found, solve(depthwise_conv, problem, form)))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_call_compiled_on_a_gpu_is_one_graph_and_equal(form: Form) -> None:
    compiled = torch.compile(depthwise_conv, fullgraph=True)
    problem = on_gpu(draw_problem((2, 9, 7, 64), torch.bfloat16))
    assert_close(solve(compiled, problem, form), solve(depthwise_conv, problem, form))
