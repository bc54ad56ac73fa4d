"""PyTorch's function transforms: gradients, gradients of each sample, and batches of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.testing import assert_close

from ecoformer import EcoFormerAttention, HashConfig, fit_hash_functions
from ecoformer.ops import (
    backends,
    encode,
    hash_attention,
    kernelized_hash_attention,
    normalize_rows,
    use_backend,
)
from ecoformer.ops.backends.blocked import BlockedBackend
from tests.problems import Problem, draw, draw_mask, draw_problem, solve

# Of the operation in place that the eager halves multiply with.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

PROBLEM, MASK = draw_problem(images=3), draw_mask(3, 20)


def attend_in_halves(q: Tensor, v: Tensor, *, key_mask: Any = None, **functions: Any) -> Tensor:
    codes = encode(normalize_rows(q), **functions, key_mask=key_mask)
    return hash_attention(codes, v, key_mask=key_mask)


FORMS: dict[str, Callable[..., Tensor]] = {
    "halves": attend_in_halves,
    "operator": kernelized_hash_attention,
    **{
        name: use_backend(name)(kernelized_hash_attention)
        for name in ("blocked", "eager", "reference")
    },
}
forms = pytest.mark.parametrize("attend", FORMS.values(), ids=FORMS)


@forms
@pytest.mark.parametrize("key_mask", [None, MASK], ids=["whole", "masked"])
def test_gradients_of_each_image_are_those_of_the_batch(
    attend: Callable[..., Tensor], key_mask: Tensor | None
) -> None:
    def loss(q: Tensor, v: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask[None]
        out = attend(q[None], v[None], **PROBLEM.functions, key_mask=mask)
        # A gradient of the output that depends on the inputs, as behind other layers.
        return (out * weights).sum() + out.square().sum() / 2

    inputs = PROBLEM.q, PROBLEM.v, PROBLEM.grad, key_mask
    dims = 0, 0, 0, None if key_mask is None else 0
    found = vmap(grad(loss, argnums=(0, 1)), dims)(*inputs)
    out = attend(PROBLEM.q, PROBLEM.v, **PROBLEM.functions, key_mask=key_mask)
    whole = Problem(PROBLEM.q, PROBLEM.v, PROBLEM.functions, PROBLEM.grad + out)
    assert_close(found, solve(attend, whole, key_mask=key_mask)[1:])


@pytest.mark.parametrize("dims", [(0, 0), (2, 1), (0, None)])
def test_a_batch_of_calls_is_one_call(
    dims: tuple[int, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Recorder(BlockedBackend):
        def forward(self, q: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(tuple(q.shape))
            return super().forward(q, *args, **kwargs)

    monkeypatch.setattr(backends, "BACKENDS", [Recorder()])
    many = [draw_problem(seed=seed) for seed in range(4)]
    q = torch.stack([problem.q for problem in many], dims[0])
    v = many[0].v if dims[1] is None else torch.stack([p.v for p in many], dims[1])
    found = vmap(
        lambda q, v: kernelized_hash_attention(q, v, **PROBLEM.functions, key_mask=MASK[:2]), dims
    )(q, v)
    assert calls == [(8, 2, 20, 8)]
    for out, problem in zip(found, many, strict=True):
        values = many[0].v if dims[1] is None else problem.v
        expected = kernelized_hash_attention(
            problem.q, values, **PROBLEM.functions, key_mask=MASK[:2]
        )
        assert_close(out, expected)


def test_an_ensemble_of_layers_runs_and_learns_at_once() -> None:
    hashing = HashConfig(num_bits=4, num_anchors=6, num_similar=3, num_fit_steps=2)
    x = draw(2, 20, 8).float()
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers.append(EcoFormerAttention(8, 2, hashing=hashing))
        fit_hash_functions(layers[-1], x, torch.Generator().manual_seed(seed))
    parameters, buffers = stack_module_state(layers)

    def loss(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,)).square().sum()

    found = vmap(grad(loss))(parameters, buffers)
    for index, layer in enumerate(layers):
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_close(found[name][index], parameter.grad)


def test_a_second_gradient_of_a_fused_backend_is_refused() -> None:
    def loss(q: Tensor) -> Tensor:
        return kernelized_hash_attention(q, PROBLEM.v, **PROBLEM.functions).square().sum()

    with pytest.raises(NotImplementedError, match=r"ops\.use_backend\('eager'\)"):
        grad(lambda q: grad(loss)(q).square().sum())(PROBLEM.q)
