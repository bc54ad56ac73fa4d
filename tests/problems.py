"""Random problems for the method, and a watch over the memory that solving them takes.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecoformer.ops import reference
from ecoformer.ops.backends import HashFunctions, find_backend

# Sizes at which an implementation slips: keywords of ``draw_problem``.
SIZES: dict[str, dict[str, Any]] = {
    "odd": {"tokens": 17},
    "one head": {"heads": 1},
    "five heads": {"heads": 5, "tokens": 49},
    "one image": {"images": 1},
    "fewer tokens than anchors": {"tokens": 3, "anchors": 25},
    "one token": {"tokens": 1},
    "published": {"tokens": 196, "dim": 32, "bits": 16, "anchors": 25},
}


@dataclass(frozen=True)
class Problem:
    """Inputs of ``kernelized_hash_attention``.

    Args:
        q: [B, H, N, D], raw rows, strided as a layer makes them.
        v: [B, H, N, D], the same.
        functions: ``anchors`` [H, M, D], ``weight`` [H, K, M] and ``kernel_mean`` [H, M].
        grad: [B, H, N, D], gradient to send back from the output.
    """

    q: Tensor
    v: Tensor
    functions: dict[str, Any]
    grad: Tensor

    def upcast(self) -> Problem:
        """The same numbers in float64."""
        functions = {name: tensor.double() for name, tensor in self.functions.items()}
        return Problem(self.q.double(), self.v.double(), functions, self.grad.double())


def draw(*shape: int, seed: int | torch.Generator = 0) -> Tensor:
    """Standard-normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_problem(
    *,
    images: int = 2,
    heads: int = 2,
    tokens: int = 20,
    dim: int = 8,
    bits: int = 6,
    anchors: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Draw rows that share a direction, as trained ones do, and hash functions of usual size."""
    generator = torch.Generator().manual_seed(seed)

    def draw_rows() -> Tensor:
        rows = draw(images, tokens, heads, dim, seed=generator)
        rows += 0.7 * draw(images, 1, heads, dim, seed=generator)
        return rows.to(dtype).transpose(1, 2)

    full = torch.promote_types(dtype, torch.float32)
    functions = {
        "anchors": normalize(draw(heads, anchors, dim, seed=generator), dim=-1),
        "weight": draw(heads, bits, anchors, seed=generator),
        "kernel_mean": 0.6 + 0.05 * draw(heads, anchors, seed=generator),
    }
    return Problem(
        q=draw_rows(),
        v=draw_rows(),
        functions={name: tensor.to(full) for name, tensor in functions.items()},
        grad=draw(images, heads, tokens, dim, seed=generator).to(dtype),
    )


def draw_alike_problem(spread: float, *, dtype: torch.dtype = torch.float64) -> Problem:
    """Draw rows that point the same way but for ``spread``, some of which are the anchors."""
    images, heads, tokens, dim, bits, num_anchors = 2, 2, 40, 8, 6, 5
    problem = draw_problem(images=images, heads=heads, tokens=tokens, dim=dim, dtype=dtype)
    q = normalize(draw(1, heads, 1, dim, seed=5), dim=-1)
    q = q + spread * normalize(draw(images, heads, tokens, dim, seed=6), dim=-1)
    q = q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    x = reference.normalize_rows(q.to(torch.promote_types(dtype, torch.float32)))
    anchors = x[0, :, :num_anchors].contiguous()
    functions = {
        "anchors": anchors,
        "weight": draw(heads, bits, num_anchors, seed=7).to(x.dtype),
        "kernel_mean": reference.kernel_features(x, anchors).mean((0, 2)),
    }
    return Problem(q, problem.v, functions, problem.grad)


def draw_unit_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit rows that share a direction: [B, H, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    rows = draw(*shape, seed=generator) + 0.7 * draw(*shape[:-2], 1, shape[-1], seed=generator)
    return normalize(rows, dim=-1).to(dtype)


def solve(
    attend: Callable[..., Tensor], problem: Problem, *, is_autocast: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """The output of an attention function, and its gradients at ``q`` and ``v``."""
    q, v = (tensor.detach().clone().requires_grad_() for tensor in (problem.q, problem.v))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        out = attend(q, v, **problem.functions, **options)
    return (out.detach(), *torch.autograd.grad(out, (q, v), problem.grad))


def draw_mask(images: int, tokens: int, *, ratio: float = 0.6, seed: int = 0) -> Tensor:
    """A key mask [B, N], each token real with a probability of ``ratio``."""
    return torch.rand(images, tokens, generator=torch.Generator().manual_seed(seed)) < ratio


def solve_unpadded(
    attend: Callable[..., Tensor], problem: Problem, key_mask: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """What ``solve`` gives for the real tokens of each image alone, and 0 for masked ones."""
    results = tuple(torch.zeros_like(problem.v) for _ in range(3))
    for image, mask in enumerate(key_mask):
        if mask.any():
            q, v, grad = (x[image, None, :, mask] for x in (problem.q, problem.v, problem.grad))
            alone = Problem(q, v, problem.functions, grad)
            for result, part in zip(results, solve(attend, alone, **options), strict=True):
                result[image, :, mask] = part[0]
    return results


def skip_what_cannot_run(backend: str, problem: Problem) -> None:
    """Skip a test whose backend needs a compiler that is not here, or another dtype."""
    functions = HashFunctions(**problem.functions)
    if not find_backend(backend).can_run(problem.q, problem.v, functions):
        pytest.skip(f"backend {backend!r} cannot run on {problem.q.dtype} here")


class LargestTensor(TorchDispatchMode):
    """Records the most values that any tensor holds which is made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            # A sparse tensor holds what dense ones brought.
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                # Of the memory behind it: an expanded view holds little.
                num_values = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, num_values)
        return result
