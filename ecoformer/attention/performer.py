"""Performer attention: softmax approximated by F positive random features."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ecoformer.attention.base import MultiHeadAttention, Size
from ecoformer.attention.registry import register_attention
from ecoformer.ops import as_full_precision, without_autocast

_EPSILON = 1e-4


def draw_orthogonal_features(
    num_features: int, head_dim: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw [F, D], float32: rows orthogonal inside each block of D, with norms of Gaussian ones.

    Source: Choromanski et al., arXiv 2009.14794.
    """
    blocks = []
    for _ in range(-(-num_features // head_dim)):
        gaussian = torch.randn(head_dim, head_dim, generator=generator)
        blocks.append(torch.linalg.qr(gaussian).Q.T)
    rows = torch.cat(blocks)[:num_features]
    norms = torch.randn(num_features, head_dim, generator=generator).norm(dim=1, keepdim=True)
    return rows * norms


class RandomFeatureAttention(nn.Module):
    """Linear attention over int(D ln D) positive random features, drawn once.

    Source: Choromanski et al., arXiv 2009.14794; constants from the released EcoFormer.
    """

    projection_matrix: Tensor

    def __init__(self, head_dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        num_features = int(head_dim * math.log(head_dim))
        projection = draw_orthogonal_features(num_features, head_dim, generator)
        self.register_buffer("projection_matrix", projection)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Attend; all are [B, H, N, D]. Computed in float32, or float64 where ``q`` is.

        Keys that ``key_mask`` [B, N] hides count for nothing; the rows of their own queries do not
        count. Where an image has no real key, all are seen.
        """
        # exp of a half-precision product, summed over all tokens, would not be worth its name.
        with without_autocast(q):
            q_features = self._features(q, is_query=True)  # [B, H, N, F]
            k_features = self._features(k, is_query=False, key_mask=key_mask)
            context = k_features.transpose(-1, -2) @ as_full_precision(v)  # [B, H, F, D]
            weight_sum = k_features.sum(-2).unsqueeze(-1)  # [B, H, F, 1]
            return (q_features @ context / (q_features @ weight_sum)).to(v.dtype)

    def _features(self, rows: Tensor, *, is_query: bool, key_mask: Tensor | None = None) -> Tensor:
        rows = as_full_precision(rows) * rows.shape[-1] ** -0.25
        projected = rows @ self.projection_matrix.to(rows.dtype).T  # [B, H, N, F]
        half_norm = rows.square().sum(-1, keepdim=True) / 2
        # As released: one maximum a query row, one over the whole tensor for the keys.
        largest = projected.amax(-1, keepdim=True) if is_query else projected.amax()
        visible = None
        if key_mask is not None:
            is_empty = ~key_mask.any(-1, keepdim=True)
            visible = rearrange(key_mask | is_empty, "b n -> b 1 n 1")
            # Images without a real key have no part in the maximum, if there are others.
            counted = rearrange(key_mask | is_empty.all(), "b n -> b 1 n 1")
            largest = projected.masked_fill(~counted, -torch.inf).amax()
        kernel = torch.exp(projected - half_norm - largest.detach()) + _EPSILON
        if visible is not None:
            kernel = kernel.masked_fill(~visible, 0)
        return kernel * self.projection_matrix.shape[0] ** -0.5


@register_attention("performer")
class PerformerAttention(MultiHeadAttention):
    """Multi-head self-attention through random features.

    Source: Choromanski et al., arXiv 2009.14794.
    """

    label = "Performer"
    cost_note = "Performer attention is our own count: the four products with its features."
    parent = "msa"
    own_buffers = ("fast_attention.projection_matrix",)
    any_backbone = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.fast_attention = RandomFeatureAttention(self.head_dim, generator)
        self.add_output(dim, proj_drop)

    def attend(self, x: Tensor, size: Size | None, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split_heads(*self.qkv(x).chunk(3, dim=-1))
        heads = self.fast_attention(q, k, v, key_mask)
        return rearrange(heads, "b h n d -> b n (h d)")

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        num_features, head_dim = self.fast_attention.projection_matrix.shape
        # Queries and keys to features, keys to context and its sum, queries to the output
        # and its divisor; equally many additions.
        products = num_features * (2 * head_dim + 2 * head_dim + 2)
        total = self.num_heads * num_tokens * products
        return total, total
