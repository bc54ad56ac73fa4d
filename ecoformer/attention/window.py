"""Softmax attention inside contiguous windows of the map.

Shapes: B batch, H heads, N tokens, W windows, S side of a window, D head dim, C = H * D.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ecoformer.attention.heads import merge_heads
from ecoformer.attention.maps import Size, require_size, tokens_to_grid
from ecoformer.attention.registry import register_attention
from ecoformer.attention.softmax import SoftmaxAttention, count_softmax


@register_attention("lsa")
class WindowAttention(SoftmaxAttention):
    """Softmax attention whose tokens see those of their own tile of the map.

    Tiles start at the top left; there is no shift and no position bias. Where they do not
    divide the map, the last ones hang over its right and bottom edge, and nothing attends to
    what lies outside.

    Args:
        dim: C.
        num_heads: H.
        qkv_bias: whether ``qkv`` has a bias.
        proj_drop: dropout after the output projection.
        window_size: S, tokens.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``.

    Source: Twins, arXiv 2104.13840 (locally-grouped self-attention).
    """

    label = "softmax in windows"
    cost_note = "Window attention is our own count: softmax over the keys that a query sees."
    any_backbone = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        *,
        window_size: int = 7,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, proj_drop)
        self.window_size = window_size

    def attend(self, x: Tensor, size: Size | None) -> Tensor:
        size = require_size(size)
        # Tiled after the projection, which so spends nothing on what lies outside of the map.
        qkv = self._tile(tokens_to_grid(self.qkv(x), size))  # [B * W, S * S, 3 * C]
        q, k, v = self._split(*qkv.chunk(3, dim=-1))
        mask = self._find_keys(x, size)
        out = merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return self._untile(out, size)

    def _tile(self, grid: Tensor) -> Tensor:
        """[B, height, width, C] to [B * W, S * S, C], padded with zeros."""
        side = self.window_size
        below, right = (-length % side for length in grid.shape[1:3])
        if below or right:
            grid = pad(grid, (0, 0, 0, right, 0, below))
        tiles = grid.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        # [B, rows of windows, S, columns of windows, S, C]
        return tiles.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def _untile(self, tiles: Tensor, size: Size) -> Tensor:
        """[B * W, S * S, C] to [B, N, C], cropped."""
        side = self.window_size
        height, width = size
        rows, columns = -(-height // side), -(-width // side)
        tiles = tiles.unflatten(1, (side, side)).unflatten(0, (-1, rows, columns))
        # [B, rows, columns, S, S, C]
        grid = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return grid[:, :height, :width].flatten(1, 2)

    def _find_keys(self, x: Tensor, size: Size) -> Tensor | None:
        """[B * W, 1, 1, S * S], true where a key lies in the map; None where all do."""
        if not any(length % self.window_size for length in size):
            return None
        inside = self._tile(torch.ones(1, *size, 1, dtype=torch.bool, device=x.device))
        return inside.repeat(x.shape[0], 1, 1).transpose(1, 2).unsqueeze(1)

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        num_pairs = 1
        # A window of h x w tokens has h^2 w^2 pairs: the sum over windows is one over each axis.
        # Padding does not count.
        for length in require_size(size):
            num_whole, rest = divmod(length, self.window_size)
            num_pairs *= num_whole * self.window_size**2 + rest**2
        return count_softmax(num_pairs, self.proj.in_features, self.num_heads)
