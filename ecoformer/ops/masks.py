"""Key masks: [B, N], bool, true for a real token. A masked token is as if it were not there.

What it holds does not matter, NaN included: its row is made 0 before anything is computed with it.

Shapes: B batch, H heads, N tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ecoformer.errors import InputError


def check_key_mask(key_mask: Tensor, rows: Tensor) -> None:
    """Insist on the mask of rows [B, ..., N, width]: an InputError, without a look at its data."""
    shape = rows.shape[0], rows.shape[-2]
    if not isinstance(key_mask, Tensor):
        raise InputError(
            f"key_mask is a bool tensor [images, tokens], not a {type(key_mask).__name__}."
        )
    if key_mask.dtype != torch.bool:
        raise InputError(
            f"key_mask is bool, true for a real token, not {key_mask.dtype}; give key_mask.bool()."
        )
    if key_mask.ndim != 2 or tuple(key_mask.shape) != shape:
        raise InputError(
            f"key_mask is [images, tokens] = {list(shape)} here, not {list(key_mask.shape)}."
        )
    if key_mask.device != rows.device:
        raise InputError(
            f"key_mask is on {key_mask.device} and the rows are on {rows.device}; move it there."
        )


def hide(rows: Tensor, key_mask: Tensor) -> Tensor:
    """Make the rows [B, H, N, width] of masked tokens 0; no gradient passes there."""
    return rows.masked_fill(~rearrange(key_mask, "b n -> b 1 n 1"), 0)


def count_real(key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Count real tokens, [B, 1, 1, 1], at least 1: where there is none, all sums are 0."""
    counts = key_mask.sum(-1, dtype=dtype).clamp_min_(1)
    return rearrange(counts, "b -> b 1 1 1")
