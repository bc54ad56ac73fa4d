"""Kinds of self-attention behind one signature: ``layer(x [B, N, C], size) -> [B, N, C]``."""

from __future__ import annotations

from collections.abc import Callable

from ecoformer.attention.base import MultiHeadAttention
from ecoformer.attention.ecoformer import EcoFormerAttention
from ecoformer.attention.performer import PerformerAttention
from ecoformer.attention.softmax import SharedQKAttention, SoftmaxAttention
from ecoformer.attention.spatial_reduction import SpatialReductionAttention
from ecoformer.attention.window import WindowAttention
from ecoformer.errors import InputError, suggest
from ecoformer.hash_config import HashConfig

ATTENTION_KINDS: dict[str, type[MultiHeadAttention]] = {
    "ecoformer": EcoFormerAttention,
    "msa": SoftmaxAttention,
    "msa_share_qk": SharedQKAttention,
    "sra": SpatialReductionAttention,
    "lsa": WindowAttention,
    "performer": PerformerAttention,
}


def build_attention(
    kind: str,
    dim: int,
    num_heads: int,
    *,
    proj_drop: float = 0.0,
    hashing: HashConfig | None = None,
    sr_ratio: int = 1,
    is_linear: bool = False,
) -> MultiHeadAttention:
    """Build a kind of attention, giving it those settings that concern it.

    Args:
        kind: a key of ``ATTENTION_KINDS``.
        dim: C.
        num_heads: H.
        proj_drop: dropout after the output projection.
        hashing: of ``"ecoformer"``.
        sr_ratio: of ``"sra"``.
        is_linear: of ``"sra"``.

    Returns:
        The layer.

    Raises:
        InputError: no such kind.
    """
    if kind not in ATTENTION_KINDS:
        raise InputError(
            f"unknown attention kind {kind!r}{suggest(kind, ATTENTION_KINDS)}"
            f" There are: {', '.join(ATTENTION_KINDS)}."
        )
    attention: Callable[..., MultiHeadAttention] = ATTENTION_KINDS[kind]
    options: dict[str, object] = {}
    if kind == "ecoformer":
        options = {"hashing": hashing}
    elif kind == "sra":
        options = {"sr_ratio": sr_ratio, "is_linear": is_linear}
    return attention(dim, num_heads, proj_drop=proj_drop, **options)


__all__ = [
    "ATTENTION_KINDS",
    "EcoFormerAttention",
    "PerformerAttention",
    "SharedQKAttention",
    "SoftmaxAttention",
    "SpatialReductionAttention",
    "WindowAttention",
    "build_attention",
]
