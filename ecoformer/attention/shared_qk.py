"""Softmax attention whose queries and keys are the same rows."""

from __future__ import annotations

from torch import Tensor, nn

from ecoformer.attention.base import MultiHeadAttention, Size
from ecoformer.attention.registry import register_attention
from ecoformer.attention.softmax import (
    SHARED_FROM_SOFTMAX,
    attend_by_softmax,
    count_softmax,
)


@register_attention("msa_share_qk")
class SharedQKAttention(MultiHeadAttention):
    """Softmax attention whose queries and keys share a projection; rows are not normalised.

    Source: EcoFormer, arXiv 2209.09004 (comparison); Kitaev et al., arXiv 2001.04451, for sharing.
    """

    label = "softmax, shared queries and keys"
    parent = "msa"
    derived = SHARED_FROM_SOFTMAX
    any_backbone = False

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads)
        self.to_qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.add_output(dim, proj_drop)

    def attend(self, x: Tensor, size: Size | None, key_mask: Tensor | None = None) -> Tensor:
        q, v = self.split_heads(self.to_qk(x), self.to_v(x))
        return attend_by_softmax(q, q, v, key_mask)

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        return count_softmax(num_tokens**2, self.proj.in_features, self.num_heads)
