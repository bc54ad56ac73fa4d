"""The backends: equal results, and a choice that holds where it was made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ecoformer import InputError
from ecoformer.ops import backends, kernelized_hash_attention, reference, use_backend
from ecoformer.ops.backends import (
    BACKENDS,
    ComposedBackend,
    FusedBackend,
    HashFunctions,
    blocked,
)
from ecoformer.ops.backends.blocked import BlockedBackend
from ecoformer.ops.backends.native import library
from tests.problems import SIZES, Problem, draw_problem, skip_what_cannot_run, solve

VALUE_BIASES = ["released", "normalized"]
# Triton's interpreter has a process of its own: see test_triton.
EVERYWHERE = [backend.name for backend in BACKENDS if backend.name != "triton"]


class Recorder(BlockedBackend):
    """A backend for another device, as somebody would add it; it notes what it was asked."""

    name = "recorder"
    needs = "luck"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_able = True

    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        return self.is_able

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("forward")
        return super().forward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("backward")
        return super().backward(*args, **kwargs)


class Doubled(ComposedBackend):
    """Another number than the others give, so that one sees who was asked."""

    name = "doubled"
    is_able = True

    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        return self.is_able

    def compose(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        return 2 * v


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    backend = Recorder()
    monkeypatch.setattr(backends, "BACKENDS", [*BACKENDS, backend, Doubled()])
    return backend


@pytest.fixture
def problem() -> Problem:
    return draw_problem(dtype=torch.float32)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert backends.forced_backend() is None


def test_the_order_is_that_of_preference() -> None:
    names = [backend.name for backend in BACKENDS]
    assert names == ["triton", "native", "blocked", "eager", "reference"]


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["odd", "five heads", "fewer tokens than anchors"])
def test_all_give_what_the_reference_gives(
    name: str, value_bias: str, dtype: torch.dtype, size: str
) -> None:
    problem = draw_problem(**SIZES[size], dtype=dtype)
    skip_what_cannot_run(name, problem)
    expected = solve(reference.kernelized_hash_attention, problem.upcast(), value_bias=value_bias)
    with use_backend(name):
        found = solve(kernelized_hash_attention, problem, value_bias=value_bias)
    for tensor, truth in zip(found, expected, strict=True):
        assert tensor.dtype == dtype
        assert_close(tensor, truth.to(dtype))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_autocast_changes_nothing(name: str) -> None:
    problem = draw_problem(tokens=300, dtype=torch.bfloat16)
    skip_what_cannot_run(name, problem)
    with use_backend(name):
        outside = solve(kernelized_hash_attention, problem)
        inside = solve(kernelized_hash_attention, problem, is_autocast=True)
    assert all(torch.equal(*pair) for pair in zip(outside, inside, strict=True))


def test_blocks_nest_and_end(problem: Problem, recorder: Recorder) -> None:
    def attend() -> Tensor:
        return kernelized_hash_attention(problem.q, problem.v, **problem.functions)

    usual = attend()
    with use_backend("doubled") as outer:
        assert outer is backends.forced_backend()
        assert torch.equal(attend(), 2 * problem.v)
        with use_backend("recorder"):
            assert_close(attend(), usual)
        assert recorder.calls == ["forward"]
        assert torch.equal(attend(), 2 * problem.v)
    assert torch.equal(attend(), usual)
    assert recorder.calls == ["forward"]


def test_an_error_ends_the_block(problem: Problem) -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert backends.forced_backend() is None


def test_a_function_can_be_decorated(problem: Problem, recorder: Recorder) -> None:
    attend = use_backend("doubled")(kernelized_hash_attention)
    for _ in range(2):
        assert torch.equal(attend(problem.q, problem.v, **problem.functions), 2 * problem.v)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("refrence", "did you mean 'reference'"), ("Triton", "did you mean 'triton'"), ("", "''.")],
)
def test_an_unknown_name_is_one_line(name: str, hint: str) -> None:
    with pytest.raises(InputError) as raised, use_backend(name):
        pass
    message = str(raised.value)
    assert "triton, native, blocked, eager, reference" in message and hint in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["recorder", "doubled"])
def test_a_backend_that_cannot_run_is_one_line(
    name: str, problem: Problem, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.find_backend(name), "is_able", False)
    with use_backend(name), pytest.raises(InputError, match=f"'{name}' cannot run on cpu"):
        solve(kernelized_hash_attention, problem)
    assert not recorder.calls


def test_a_compiled_call_refuses_what_cannot_run(problem: Problem, recorder: Recorder) -> None:
    torch.compiler.reset()
    attend = torch.compile(kernelized_hash_attention, backend="aot_eager")
    recorder.is_able = False
    with use_backend("recorder"), pytest.raises(InputError, match="'recorder' cannot run on cpu"):
        solve(attend, problem)


def test_triton_does_not_run_here(problem: Problem) -> None:
    with use_backend("triton"), pytest.raises(InputError, match="it needs Triton, an NVIDIA GPU"):
        solve(kernelized_hash_attention, problem.upcast())


def test_the_first_fused_backend_that_can_run_is_taken(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Recorder()
    monkeypatch.setattr(backends, "BACKENDS", [mine, *BACKENDS])
    solve(kernelized_hash_attention, problem)
    assert mine.calls == ["forward", "backward"]
    mine.is_able = False
    solve(kernelized_hash_attention, problem)
    assert mine.calls == ["forward", "backward"]


def test_a_gradient_may_follow_after_the_block(problem: Problem, recorder: Recorder) -> None:
    q, v = (x.clone().requires_grad_() for x in (problem.q, problem.v))
    with use_backend("recorder"):
        out = kernelized_hash_attention(q, v, **problem.functions)
    with use_backend("reference"):
        found = torch.autograd.grad(out, (q, v), problem.grad)
    assert recorder.calls == ["forward", "backward"]
    assert_close(found, solve(kernelized_hash_attention, problem)[1:])


def test_compiled_code_follows_the_choice(problem: Problem, recorder: Recorder) -> None:
    torch.compiler.reset()
    compiled = torch.compile(kernelized_hash_attention, fullgraph=True, backend="aot_eager")
    usual = solve(kernelized_hash_attention, problem)
    # Once compiled, and again from what was compiled.
    for _ in range(2):
        recorder.calls.clear()
        assert_close(solve(compiled, problem), usual)
        assert not recorder.calls
        with use_backend("recorder"):
            assert_close(solve(compiled, problem), usual)
        assert recorder.calls == ["forward", "backward"]
        with use_backend("doubled"), torch.no_grad():
            out = compiled(problem.q, problem.v, **problem.functions)
        assert torch.equal(out, 2 * problem.v)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_compiled_call_is_one_graph_and_equal(name: str, problem: Problem) -> None:
    skip_what_cannot_run(name, problem)
    torch.compiler.reset()
    compiled = torch.compile(kernelized_hash_attention, fullgraph=True, backend="aot_eager")
    with use_backend(name):
        assert_close(solve(compiled, problem), solve(kernelized_hash_attention, problem))


class Layer(torch.nn.Module):
    """The operation as a module, which is what can be exported."""

    def __init__(self, functions: dict[str, Any]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        return kernelized_hash_attention(q, v, **self.functions)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_exporters_look_into_composed_backends_only(name: str, problem: Problem) -> None:
    skip_what_cannot_run(name, problem)
    layer = Layer(problem.functions)
    with use_backend(name):
        exported = torch.export.export(layer, (problem.q, problem.v))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    ours = "ecoformer_native.forward" if name == "native" else "ecoformer.kernelized_hash_attention"
    is_whole = f"{ours}.default" in targets
    assert is_whole is isinstance(backends.find_backend(name), FusedBackend)
    assert_close(exported.module()(problem.q, problem.v), layer(problem.q, problem.v))


def test_a_meta_problem_has_a_shape_with_any_backend() -> None:
    problem = draw_problem(dtype=torch.bfloat16)
    q, v = problem.q.to("meta"), problem.v.to("meta")
    functions = {name: x.to("meta") for name, x in problem.functions.items()}
    for name in [backend.name for backend in BACKENDS]:
        with use_backend(name):
            out = kernelized_hash_attention(q, v, **functions)
        assert (out.shape, out.dtype) == (v.shape, torch.bfloat16)


def test_a_run_on_the_cpu_imports_no_kernels() -> None:
    code = (
        "import sys, torch\n"
        "from ecoformer.ops import kernelized_hash_attention\n"
        "assert 'triton' not in sys.modules\n"
        "x = torch.randn(1, 1, 9, 8, requires_grad=True)\n"
        "f = dict(anchors=torch.randn(1, 3, 8), weight=torch.randn(1, 4, 3), "
        "kernel_mean=torch.zeros(1, 3))\n"
        "kernelized_hash_attention(x, x, **f).sum().backward()\n"
        # PyTorch imports Triton of its own accord at the first call of an operator.
        "assert 'ecoformer.ops.backends.triton.launch' not in sys.modules\n"
        "assert 'ecoformer.ops.backends.triton.kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_problems_are_not_changed(problem: Problem) -> None:
    before = replace(problem, q=problem.q.clone(), v=problem.v.clone())
    for name in EVERYWHERE:
        if name == "native" and library.load():
            continue
        with use_backend(name):
            solve(kernelized_hash_attention, problem)
    assert torch.equal(before.q, problem.q) and torch.equal(before.v, problem.v)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("where", ["q", "anchors", "weight", "kernel_mean"])
def test_nan_gives_nan_where_it_belongs(name: str, where: str) -> None:
    problem = draw_problem(images=3, heads=1, dtype=torch.float32)
    rows = problem.q[1, 0] if where == "q" else problem.functions[where][0]
    rows.view(-1)[3] = torch.nan
    with use_backend(name):
        results = solve(kernelized_hash_attention, problem)
    is_broken = torch.tensor([where != "q", True, where != "q"])
    # Of each token: no mean over tokens is finite.
    assert torch.equal(results[0].isnan().all(-1).all(-1)[:, 0], is_broken)
    assert all(tensor[~is_broken].isfinite().all() for tensor in results)


def test_chunks_do_not_lose_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_ROWS_PER_THREAD", 7)
    problem = draw_problem(dtype=torch.float32)
    problem.q[1, 1, 19, 2] = torch.nan
    out = kernelized_hash_attention(problem.q, problem.v, **problem.functions)
    is_nan = out.isnan()
    assert is_nan[1, 1].all() and is_nan.sum() == is_nan[1, 1].numel()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_no_gradient_reaches_hash_functions(name: str, problem: Problem) -> None:
    functions = {name: x.clone().requires_grad_() for name, x in problem.functions.items()}
    with use_backend(name):
        out = kernelized_hash_attention(problem.q, problem.v, **functions)
        assert not out.requires_grad
        trained = replace(problem, functions=functions)
        found = solve(kernelized_hash_attention, trained)
        assert_close(found, solve(kernelized_hash_attention, problem))
    assert all(function.grad is None for function in functions.values())


def test_products_of_the_operator_are_counted() -> None:
    images, heads, tokens, dim, bits, anchors = 3, 2, 17, 8, 6, 5
    problem = draw_problem(
        images=images, heads=heads, tokens=tokens, dim=dim, bits=bits, anchors=anchors
    )

    def count(compute: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            compute()
        return counter.get_total_flops()

    with use_backend("eager"):
        backward = count(lambda: solve(kernelized_hash_attention, problem))
        forward = count(
            lambda: kernelized_hash_attention(problem.q, problem.v, **problem.functions)
        )
        backward -= forward
    # PyTorch does not count the product with the anchors, which is made in place.
    forward += 2 * images * heads * tokens * dim * anchors
    found = count(lambda: kernelized_hash_attention(problem.q, problem.v, **problem.functions))
    assert found == forward
    assert count(lambda: solve(kernelized_hash_attention, problem)) == forward + backward
