"""What the kinds of attention have in common.

Shapes: B batch, H heads, N tokens, D head dim, C = H * D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ecoformer.attention.heads import divide_heads, split_heads
from ecoformer.attention.maps import Size


class MultiHeadAttention(nn.Module, ABC):
    """Self-attention; a kind of it says how heads attend, and what that costs.

    Args:
        dim: C.
        num_heads: H.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = divide_heads(dim, num_heads)

    def _add_output(self, dim: int, proj_drop: float) -> None:
        """Make the output projection; after those of the inputs, the order of released weights."""
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _split(self, *rows: Tensor) -> list[Tensor]:
        """Each [B, N, C] to [B, H, N, D]."""
        return [split_heads(x, self.num_heads) for x in rows]

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Attend, and project what the heads found.

        Args:
            x: [B, N, C], float.
            size: (height, width) of the map, height * width = N; for the kinds that look at it.

        Returns:
            [B, N, C].

        Raises:
            InputError: ``size`` is missing or too small for the kind, or hash functions are not
                fitted.
        """
        return self.proj_drop(self.proj(self._attend(x, size)))

    @abstractmethod
    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        """Multiplications and additions of the attention of one image, projections aside.

        Args:
            num_tokens: N.
            size: as for ``forward``.

        Returns:
            (multiplications, additions).

        Raises:
            InputError: ``size`` is missing.
        """

    @abstractmethod
    def _attend(self, x: Tensor, size: Size | None) -> Tensor:
        """[B, N, C] to [B, N, C], the heads merged."""
