"""EcoFormer attention: linear in the number of tokens, through learned binary codes.

Shapes: B batch, H heads, N tokens, D head dim, C = H * D, K hash bits, M anchors.
"""

from __future__ import annotations

from torch import Tensor, nn

from ecoformer.attention.heads import divide_heads, merge_heads, split_heads
from ecoformer.hashing import HashConfig, KernelHash


class EcoFormerAttention(nn.Module):
    """Self-attention whose queries and keys share one projection, hashed to binary codes.

    Args:
        dim: C.
        num_heads: H.
        qkv_bias: whether ``to_qk`` and ``to_v`` have a bias.
        proj_drop: dropout after the output projection.
        hashing: sizes of the codes; the published ones where None.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``.

    Source: EcoFormer, arXiv 2209.09004.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        *,
        hashing: HashConfig | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.hash = KernelHash(num_heads, divide_heads(dim, num_heads), hashing or HashConfig())
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend among all tokens.

        Args:
            x: [B, N, C], float.
            size: not used; every kind of attention takes it.

        Returns:
            [B, N, C].

        Raises:
            InputError: the hash functions are not fitted.
        """
        q, v = split_heads(self.to_qk(x), self.num_heads), split_heads(self.to_v(x), self.num_heads)
        return self.proj_drop(self.proj(merge_heads(self.hash(q, v))))

    def count_attention(
        self, num_tokens: int, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Multiplications and additions of the attention of one image, projections aside.

        Args:
            num_tokens: N.
            size: not used.

        Returns:
            (multiplications, additions).

        Source: EcoFormer and its released counter.
        """
        num_heads, num_bits, num_anchors = self.hash.weight.shape
        head_dim = self.hash.anchors.shape[-1]
        tokens = num_heads * num_tokens
        mul = 2 * num_anchors + num_anchors * num_bits + num_bits + 1 + head_dim
        add = (
            2 * num_anchors * head_dim
            + num_anchors * num_bits
            + 2 * num_bits
            + 2 * num_bits * head_dim
            + head_dim
        )
        return tokens * mul, tokens * add
