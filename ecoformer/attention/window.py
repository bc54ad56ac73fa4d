"""Softmax attention inside W contiguous windows of the map, of S x S tokens."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ecoformer.attention.base import Size, require_size
from ecoformer.attention.registry import register_attention
from ecoformer.attention.softmax import SoftmaxAttention, count_softmax


@register_attention("lsa")
class WindowAttention(SoftmaxAttention):
    """Softmax attention whose tokens see those of their own tile of the map.

    Tiles start at the top left, without shift or position bias. Where they do not divide the map,
    the last ones hang over its right and bottom edge; nothing attends to what lies outside.

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

    # Without a key_mask: a tile is a part of a whole map.
    def attend(self, x: Tensor, size: Size | None) -> Tensor:  # type: ignore[override]
        height, width = require_size(size)
        # Tiled after the projection, which so spends nothing on what lies outside of the map.
        qkv = self._tile(rearrange(self.qkv(x), "b (h w) c -> b h w c", h=height, w=width))
        q, k, v = self.split_heads(*qkv.chunk(3, dim=-1))
        mask = self._find_keys(x, height, width)
        tiles = scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B * W, H, S * S, D]
        grid = rearrange(
            tiles,
            "(b rows columns) h (s t) d -> b (rows s) (columns t) (h d)",
            rows=-(-height // self.window_size),
            columns=-(-width // self.window_size),
            s=self.window_size,
        )
        return rearrange(grid[:, :height, :width], "b h w c -> b (h w) c")

    def _tile(self, grid: Tensor) -> Tensor:
        """[B, height, width, C] to [B * W, S * S, C], padded with zeros."""
        side = self.window_size
        below, right = (-length % side for length in grid.shape[1:3])
        if below or right:
            grid = pad(grid, (0, 0, 0, right, 0, below))
        pattern = "b (rows s) (columns t) c -> (b rows columns) (s t) c"
        return rearrange(grid, pattern, s=side, t=side)

    def _find_keys(self, x: Tensor, height: int, width: int) -> Tensor | None:
        """[B * W, 1, 1, S * S], true where a key lies in the map; None where all do."""
        if height % self.window_size == width % self.window_size == 0:
            return None
        inside = self._tile(torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device))
        return repeat(inside, "w keys 1 -> (b w) 1 1 keys", b=x.shape[0])

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        num_pairs = 1
        # A window of h x w tokens has h^2 w^2 pairs: the sum over windows is one over each axis.
        # Padding does not count.
        for length in require_size(size):
            num_whole, rest = divmod(length, self.window_size)
            num_pairs *= num_whole * self.window_size**2 + rest**2
        return count_softmax(num_pairs, self.proj.in_features, self.num_heads)
