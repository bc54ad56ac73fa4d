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
def settled_arithmetic(*, is_deterministic: bool, has_tf32: bool = False) -> Iterator[None]:
    """Settle for a block how PyTorch computes on CUDA, whatever its defaults are.

    float32 is float32, and cuDNN does not choose by timing.

    Args:
        is_deterministic: take kernels that give equal bits each time, in which atomic additions
            and choices by timing have no part. An operation without one raises RuntimeError.
        has_tf32: convolutions multiply 10 bits of float32, as they do by PyTorch's default.
    """
    with ExitStack() as stack:

        def settle(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        cudnn: Any = torch.backends.cudnn
        stack.callback(_set_cudnn, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
        cudnn.allow_tf32 = has_tf32
        settle(cudnn, "benchmark", False)
        if is_deterministic:
            # Takes a second.
            from torch._inductor import config

            # Read when the first product makes cuBLAS start.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            before = torch.are_deterministic_algorithms_enabled()
            stack.callback(torch.use_deterministic_algorithms, before, warn_only=warns)
            torch.use_deterministic_algorithms(True)
            settle(cudnn, "deterministic", True)
            settle(config, "deterministic", True)
            # Would write to all memory that is taken.
            settle(torch.utils.deterministic, "fill_uninitialized_memory", False)
        yield


def _set_cudnn(conv: str, rnn: str) -> None:
    cudnn: Any = torch.backends.cudnn
    # The older of PyTorch's two settings, which it refuses to tell where the newer one differs.
    cudnn.allow_tf32 = conv == "tf32"
    if cudnn.conv.fp32_precision != conv:
        cudnn.conv.fp32_precision = conv
    if cudnn.rnn.fp32_precision != rnn:
        cudnn.rnn.fp32_precision = rnn
