"""The arithmetic of forward and backward: float32, or mixed with a 16-bit type."""

from __future__ import annotations

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
