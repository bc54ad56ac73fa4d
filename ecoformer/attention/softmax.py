"""Softmax attention over all tokens."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ecoformer.attention.base import Derived, MultiHeadAttention, Size
from ecoformer.attention.registry import register_attention

_FROM_SPATIAL_REDUCTION = {
    "qkv": Derived(("q", "kv"), lambda q, kv: torch.cat([q, kv]), leaves_out=("sr", "norm"))
}
# For the kinds whose queries and keys share a projection: they lose that of the keys.
SHARED_FROM_SOFTMAX = {
    "to_qk": Derived(("qkv",), lambda qkv: qkv.tensor_split(3)[0], leaves_out=("qkv[k]",)),
    "to_v": Derived(("qkv",), lambda qkv: qkv.tensor_split(3)[2], leaves_out=("qkv[k]",)),
}


def count_softmax(num_pairs: int, dim: int, num_heads: int) -> tuple[int, int]:
    """Multiplications and additions of softmax over pairs of a query and a key that it sees.

    Source: the released counter of EcoFormer for all tokens; fewer keys by the same rule.
    """
    products = 2 * num_pairs * dim
    return products + num_heads * num_pairs, products


def attend_by_softmax(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Softmax over the real keys, scale D^-0.5, heads merged: three of [B, H, N, D] to [B, N, C].

    Where an image has no real key, all are seen: finite numbers for rows that do not count.
    """
    visible = None
    if key_mask is not None:
        visible = key_mask | ~key_mask.any(-1, keepdim=True)
        visible = rearrange(visible, "b keys -> b 1 1 keys")
    heads = scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return rearrange(heads, "b h n d -> b n (h d)")


@register_attention("msa")
class SoftmaxAttention(MultiHeadAttention):
    """Softmax attention, queries, keys and values from one projection (arXiv 1706.03762)."""

    label = "softmax"
    parent = "sra"
    derived = _FROM_SPATIAL_REDUCTION
    any_backbone = False

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.add_output(dim, proj_drop)

    def attend(self, x: Tensor, size: Size | None, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split_heads(*self.qkv(x).chunk(3, dim=-1))
        return attend_by_softmax(q, k, v, key_mask)

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        return count_softmax(num_tokens**2, self.proj.in_features, self.num_heads)
