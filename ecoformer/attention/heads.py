"""Splitting channels into heads and merging them again.

Shapes: B batch, H heads, N tokens, D head dim, C = H * D.
"""

from __future__ import annotations

from torch import Tensor

from ecoformer.errors import InputError


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each head its own contiguous share of the channels, as a view.

    Args:
        x: [B, N, C], any dtype.
        num_heads: H, a divisor of C.

    Returns:
        [B, H, N, D].
    """
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Undo ``split_heads``.

    Args:
        x: [B, H, N, D], any dtype.

    Returns:
        [B, N, C].
    """
    return x.transpose(1, 2).flatten(2)


def divide_heads(dim: int, num_heads: int) -> int:
    """Width of a head.

    Args:
        dim: C.
        num_heads: H.

    Returns:
        D.

    Raises:
        InputError: H does not divide C.
    """
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"{num_heads} heads cannot share {dim} channels; give a divisor.")
    return dim // num_heads
