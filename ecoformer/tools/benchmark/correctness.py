"""Check the benchmarked core against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ecoformer.errors import describe_error
from ecoformer.ops import kernelized_hash_attention, reference
from ecoformer.tools.benchmark.cores import CoreInputs

# Rounding, and a code in 10,000 that flips.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Check:
    """How far the shipped core is from the reference in float64.

    Args:
        errors: of the output and of both gradients, each norm relative to the reference's.
        limit: of each error.
        is_repeatable: whether a second run gave the same bits.
        failure: what stopped the check; empty where nothing did.
    """

    num_tokens: int
    errors: tuple[float, ...]
    limit: float
    is_repeatable: bool
    failure: str = ""

    @property
    def is_passed(self) -> bool:
        """Whether the core may be trusted."""
        return not self.failure and max(self.errors) <= self.limit and self.is_repeatable

    def __str__(self) -> str:
        if self.failure:
            return f"check: core of N={self.num_tokens} FAILED, {self.failure}"
        errors = ", ".join(f"{error:.1e}" for error in self.errors)
        bits = "equal" if self.is_repeatable else "other"
        return (
            f"check: core of N={self.num_tokens} off the reference by {errors} (output, "
            f"gradients), at most {self.limit:g}; {bits} bits in a second run: "
            f"{'passed' if self.is_passed else 'FAILED'}"
        )


def check_core(device: torch.device, dtype: torch.dtype, *, num_tokens: int) -> Check:
    """Run the shipped core twice on rows of ``dtype``, and the reference, forward and backward."""
    try:
        return _check_core(device, dtype, num_tokens)
    # The other contenders can be measured all the same.
    except Exception as error:
        return Check(num_tokens, (), _LIMITS[dtype], False, describe_error(error))


def _check_core(device: torch.device, dtype: torch.dtype, num_tokens: int) -> Check:
    inputs = CoreInputs(2, num_tokens, device, dtype)
    q, grad, v = inputs.draw_rows()
    functions = inputs.draw_hash_functions(q)

    def solve(attend: Callable[..., Tensor], compute_dtype: torch.dtype) -> list[Tensor]:
        rows = [row.to(compute_dtype).requires_grad_() for row in (q.detach(), v.detach())]
        # Hash functions of half-precision rows are float32.
        wide = torch.promote_types(compute_dtype, torch.float32)
        out = attend(*rows, **functions.to(wide)._asdict())
        return [out.detach(), *torch.autograd.grad(out, rows, grad.to(compute_dtype))]

    first, second = (solve(kernelized_hash_attention, dtype) for _ in range(2))
    exact = solve(reference.kernelized_hash_attention, torch.float64)
    return Check(
        num_tokens,
        tuple(
            float((found.double() - truth).norm() / truth.norm())
            for found, truth in zip(first, exact, strict=True)
        ),
        _LIMITS[dtype],
        all(torch.equal(*pair) for pair in zip(first, second, strict=True)),
    )
