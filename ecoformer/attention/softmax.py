"""Softmax attention over all tokens, with separate or shared queries and keys.

Shapes: B batch, H heads, N tokens, D head dim, C = H * D.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ecoformer.attention.heads import divide_heads, merge_heads, split_heads


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


class SoftmaxAttention(nn.Module):
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
        super().__init__()
        divide_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend among all tokens.

        Args:
            x: [B, N, C], float.
            size: not used; every kind of attention takes it.

        Returns:
            [B, N, C].
        """
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        out = scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(merge_heads(out)))

    def count_attention(
        self, num_tokens: int, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """As ``EcoFormerAttention.count_attention``, by ``count_softmax``.

        Args:
            num_tokens: N.
            size: not used.

        Returns:
            (multiplications, additions).
        """
        return count_softmax(num_tokens**2, self.proj.in_features, self.num_heads)


class SharedQKAttention(nn.Module):
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
        super().__init__()
        divide_heads(dim, num_heads)
        self.num_heads = num_heads
        self.to_qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend among all tokens.

        Args:
            x: [B, N, C], float.
            size: not used; every kind of attention takes it.

        Returns:
            [B, N, C].
        """
        q, v = split_heads(self.to_qk(x), self.num_heads), split_heads(self.to_v(x), self.num_heads)
        return self.proj_drop(self.proj(merge_heads(scaled_dot_product_attention(q, q, v))))

    def count_attention(
        self, num_tokens: int, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """As ``SoftmaxAttention.count_attention``.

        Args:
            num_tokens: N.
            size: not used.

        Returns:
            (multiplications, additions).
        """
        return count_softmax(num_tokens**2, self.proj.in_features, self.num_heads)
