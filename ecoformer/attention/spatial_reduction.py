"""Attention of all tokens to a reduced map of them."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, scaled_dot_product_attention

from ecoformer.attention.base import LayerSpec, MultiHeadAttention, Size, require_size
from ecoformer.attention.registry import register_attention
from ecoformer.attention.softmax import count_softmax
from ecoformer.errors import InputError

_POOLED_SIZE = 7


@register_attention("sra")
class SpatialReductionAttention(MultiHeadAttention):
    """Softmax attention whose keys and values come from a map of N' tokens.

    ``sr_ratio`` is kernel and stride of the convolution that reduces the map; 1 is full attention.
    ``is_linear`` pools to 7 x 7 instead, so that cost is linear in N.

    Source: PVT, arXiv 2102.12122; linear form: PVTv2, arXiv 2106.13797.
    """

    label = "spatial reduction"
    cost_note = "Spatial reduction is our own count: softmax over the keys that a query sees."
    any_backbone = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        *,
        sr_ratio: int = 1,
        is_linear: bool = False,
    ) -> None:
        super().__init__(dim, num_heads)
        self.sr_ratio, self.is_linear = sr_ratio, is_linear
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.add_output(dim, proj_drop)
        if self.is_reducing:
            kernel = 1 if is_linear else sr_ratio
            self.sr = nn.Conv2d(dim, dim, kernel_size=kernel, stride=kernel)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    @classmethod
    def from_spec(cls, spec: LayerSpec) -> SpatialReductionAttention:
        return cls(
            spec.dim,
            spec.num_heads,
            spec.qkv_bias,
            spec.proj_drop,
            sr_ratio=spec.sr_ratio,
            is_linear=spec.is_linear,
        )

    @property
    def is_reducing(self) -> bool:
        return self.is_linear or self.sr_ratio > 1

    def attend(self, x: Tensor, size: Size | None) -> Tensor:
        source = self._reduce(x, *require_size(size)) if self.is_reducing else x
        q, k, v = self.split_heads(self.q(x), *self.kv(source).chunk(2, dim=-1))
        return rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")

    def _reduce(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] to [B, N', C]."""
        # A view, and channels-last: the convolution copies nothing.
        image = rearrange(x, "b (h w) c -> b c h w", h=height, w=width)
        if self.is_linear:
            image = adaptive_avg_pool2d(image, _POOLED_SIZE)
        elif min(height, width) < self.sr_ratio:
            raise InputError(
                f"a map of {height} x {width} tokens cannot be reduced {self.sr_ratio} times; "
                "give larger images."
            )
        reduced = self.norm(rearrange(self.sr(image), "b c h w -> b (h w) c"))
        return gelu(reduced) if self.is_linear else reduced

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        num_keys = num_tokens
        if self.is_linear:
            num_keys = _POOLED_SIZE**2
        elif self.is_reducing:
            height, width = require_size(size)
            num_keys = (height // self.sr_ratio) * (width // self.sr_ratio)
        return count_softmax(num_tokens * num_keys, self.proj.in_features, self.num_heads)
