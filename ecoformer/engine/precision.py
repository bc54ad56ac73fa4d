"""The arithmetic of forward and backward: float32, or mixed with a 16-bit type."""

from __future__ import annotations

import torch

from ecoformer.errors import InputError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "none": torch.float32}


def choose_amp_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type that autocast computes in; float32 stands for no autocast.

    Args:
        name: ``"float16"``, ``"bfloat16"``, ``"none"``, or None for float16 on CUDA, as
            released, and none elsewhere.
        device: where the model is.

    Raises:
        InputError: no such type.
    """
    if name is None:
        name = "float16" if device.type == "cuda" else "none"
    if name not in _DTYPES:
        raise InputError(f"--amp-dtype is float16, bfloat16 or none, not {name!r}.")
    return _DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for a block, or none of it.

    Args:
        device: where the model is.
        dtype: from ``choose_amp_dtype``.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def create_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """A gradient scaler, idle unless float16 needs one.

    Args:
        device: where the model is.
        dtype: from ``choose_amp_dtype``.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
