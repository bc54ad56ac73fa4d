"""The arithmetic of forward and backward: float32, or mixed with a 16-bit type."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ecoformer.errors import InputError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "none": torch.float32}


def choose_amp_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Choose the type that autocast computes in; float32 stands for no autocast.

    None is float16 on CUDA, as released, and no autocast elsewhere.

    Raises:
        InputError: no such type.
    """
    if name is None:
        name = "float16" if device.type == "cuda" else "none"
    if name not in _DTYPES:
        raise InputError(f"--amp-dtype is float16, bfloat16 or none, not {name!r}.")
    return _DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute a block in mixed precision; float32 leaves it alone."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def create_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Build what keeps small gradients from vanishing in float16; idle for other types."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


@contextmanager
def settled_arithmetic(*, is_deterministic: bool, convolutions: str = "ieee") -> Iterator[None]:
    """Settle for a block how PyTorch computes on CUDA, whatever its defaults are.

    float32 is float32, and cuDNN does not choose by timing.

    Args:
        convolutions: ``"tf32"`` keeps 10 bits of what they multiply, as PyTorch does by default.
        is_deterministic: take kernels that give equal bits each time, in which atomic additions
            and choices by timing have no part. An operation without one raises RuntimeError.
    """
    cudnn: Any = torch.backends.cudnn
    products = torch.backends.cuda.matmul, cudnn.rnn
    settings: list[tuple[Any, str, Any]] = [
        *((part, "fp32_precision", "ieee") for part in products),
        (cudnn.conv, "fp32_precision", convolutions),
        (cudnn, "benchmark", False),
    ]
    if is_deterministic:
        # Takes a second.
        from torch._inductor import config

        # Read when the first product makes cuBLAS start.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        settings += [
            (cudnn, "deterministic", True),
            # Would write to all memory that is taken.
            (torch.utils.deterministic, "fill_uninitialized_memory", False),
            (config, "deterministic", True),
        ]
    with ExitStack() as stack:
        for owner, name, value in settings:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        if is_deterministic:
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            before = torch.are_deterministic_algorithms_enabled()
            stack.callback(torch.use_deterministic_algorithms, before, warn_only=warns)
            torch.use_deterministic_algorithms(True)
        yield
