"""Keeping the method in full precision, whatever surrounds it."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_full_precision(x: Tensor) -> Tensor:
    """Raise half precisions to float32; float32 and float64 pass as they are."""
    return x.to(compute_dtype(x))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Choose what several inputs are computed in: float32, or float64 where one of them is."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off in one block, for the device of ``x``.

    Half-precision kernel features flip codes, and a half-precision sum over thousands of tokens is
    wrong.
    """
    device = x.device.type
    # "meta" has none.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
