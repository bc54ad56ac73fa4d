"""EcoFormer attention: linear in the number of tokens, through learned binary codes."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from ecoformer.attention.base import LayerSpec, MultiHeadAttention, Size
from ecoformer.attention.registry import register_attention
from ecoformer.attention.softmax import SHARED_FROM_SOFTMAX
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import KernelHash


@register_attention("ecoformer")
class EcoFormerAttention(MultiHeadAttention):
    """Self-attention whose queries and keys share one projection, hashed to binary codes.

    Args:
        proj_drop: dropout after the output projection.
        hashing: the published settings where None.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``, or ``hashing`` is no ``HashConfig``.

    Source: EcoFormer, arXiv 2209.09004.
    """

    label = "EcoFormer"
    parent = "msa"
    derived = SHARED_FROM_SOFTMAX
    own_buffers = ("hash",)
    any_backbone = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        *,
        hashing: HashConfig | None = None,
    ) -> None:
        super().__init__(dim, num_heads)
        self.to_qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        hashing = HashConfig() if hashing is None else hashing
        if not isinstance(hashing, HashConfig):
            raise InputError(
                "hashing is an ecoformer.HashConfig, as HashConfig(num_bits=8), not a "
                f"{type(hashing).__name__}."
            )
        self.hash = KernelHash(num_heads, self.head_dim, hashing)
        self.add_output(dim, proj_drop)

    @classmethod
    def from_spec(cls, spec: LayerSpec) -> EcoFormerAttention:
        return cls(spec.dim, spec.num_heads, spec.qkv_bias, spec.proj_drop, hashing=spec.hashing)

    def attend(self, x: Tensor, size: Size | None, key_mask: Tensor | None = None) -> Tensor:
        heads = self.hash(*self.split_heads(self.to_qk(x), self.to_v(x)), key_mask)
        return rearrange(heads, "b h n d -> b n (h d)")

    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        # As in the released counter.
        _, num_bits, num_anchors = self.hash.weight.shape
        head_dim, tokens = self.head_dim, self.num_heads * num_tokens
        mul = 2 * num_anchors + num_anchors * num_bits + num_bits + 1 + head_dim
        add = (
            2 * num_anchors * head_dim
            + num_anchors * num_bits
            + 2 * num_bits
            + 2 * num_bits * head_dim
            + head_dim
        )
        return tokens * mul, tokens * add
