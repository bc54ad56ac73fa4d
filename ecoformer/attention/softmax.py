"""Softmax attention over all tokens, with separate or shared queries and keys.

Shapes: B batch, H heads, N tokens, D head dim, C = H * D.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ecoformer.attention.base import MultiHeadAttention
from ecoformer.attention.heads import merge_heads
from ecoformer.attention.maps import Size


def count_softmax(num_pairs: int, dim: int, num_heads: int) -> tuple[int, int]:
    """Multiplications and additions of softmax attention of one image.

    Args:
        num_pairs: queries times the keys that each of them sees.
        dim: C.
        num_heads: H.

    Returns:
        (multiplications, additions), projections aside.

    Source: the released counter of EcoFormer for all tokens; fewer keys by the same rule.
    """
    products = 2 * num_pairs * dim
    return products + num_heads * num_pairs, products


class SoftmaxAttention(MultiHeadAttention):
    """Multi-head softmax attention with one projection for queries, keys and values.

    Args:
        dim: C.
        num_heads: H.
        qkv_bias: whether ``qkv`` has a bias.
        proj_drop: dropout after the output projection.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``.

    Source: Vaswani et al., arXiv 1706.03762.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self._add_output(dim, proj_drop)

    def _attend(self, x: Tensor, size: Size | None) -> Tensor:
        q, k, v = self._split(*self.qkv(x).chunk(3, dim=-1))
        return merge_heads(scaled_dot_product_attention(q, k, v))

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        return count_softmax(num_tokens**2, self.proj.in_features, self.num_heads)


class SharedQKAttention(MultiHeadAttention):
    """Softmax attention whose queries and keys are the same rows, not normalised.

    Args:
        dim: C.
        num_heads: H.
        qkv_bias: whether ``to_qk`` and ``to_v`` have a bias.
        proj_drop: dropout after the output projection.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``.

    Source: EcoFormer, arXiv 2209.09004 (comparison); Kitaev et al.,
        arXiv 2001.04451, for sharing.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads)
        self.to_qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self._add_output(dim, proj_drop)

    def _attend(self, x: Tensor, size: Size | None) -> Tensor:
        q, v = self._split(self.to_qk(x), self.to_v(x))
        return merge_heads(scaled_dot_product_attention(q, q, v))

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        return count_softmax(num_tokens**2, self.proj.in_features, self.num_heads)
