"""Tokens as the map that they came from.

Shapes: B batch, N tokens = height * width, C channels.
"""

from __future__ import annotations

from torch import Tensor

from ecoformer.errors import InputError

Size = tuple[int, int]


def require_size(size: Size | None) -> Size:
    """Insist on a map's size.

    Args:
        size: (height, width), as the layer was given it.

    Returns:
        ``size``, which is no longer None.

    Raises:
        InputError: it was not given.
    """
    if size is None:
        raise InputError("this attention needs the map's size: call layer(x, (height, width)).")
    return size


def tokens_to_grid(x: Tensor, size: Size | None) -> Tensor:
    """View tokens as rows and columns.

    Args:
        x: [B, N, C], any dtype.
        size: (height, width), height * width = N.

    Returns:
        [B, height, width, C].

    Raises:
        InputError: ``size`` is missing.
    """
    return x.unflatten(1, require_size(size))


def tokens_to_map(x: Tensor, size: Size | None) -> Tensor:
    """View tokens as an image in channels-last memory, so that a convolution copies nothing.

    Args:
        x: [B, N, C], any dtype.
        size: (height, width), height * width = N.

    Returns:
        [B, C, height, width].

    Raises:
        InputError: ``size`` is missing.
    """
    return tokens_to_grid(x, size).movedim(3, 1)


def map_to_tokens(x: Tensor) -> Tensor:
    """Undo ``tokens_to_map``.

    Args:
        x: [B, C, height, width], any dtype.

    Returns:
        [B, N, C].
    """
    return x.flatten(2).transpose(1, 2)
