"""Kinds of self-attention behind one signature: ``layer(x [B, N, C], size, key_mask)``, [B, N, C].

Letters here: B batch, H heads, N tokens, D head dim, C = H * D.
"""

from __future__ import annotations

from ecoformer.attention.base import Derived, LayerSpec, MultiHeadAttention
from ecoformer.attention.ecoformer import EcoFormerAttention
from ecoformer.attention.performer import PerformerAttention
from ecoformer.attention.registry import attention_class, attention_kinds, register_attention
from ecoformer.attention.shared_qk import SharedQKAttention
from ecoformer.attention.softmax import SoftmaxAttention
from ecoformer.attention.spatial_reduction import SpatialReductionAttention
from ecoformer.attention.window import WindowAttention

__all__ = [
    "Derived",
    "EcoFormerAttention",
    "LayerSpec",
    "MultiHeadAttention",
    "PerformerAttention",
    "SharedQKAttention",
    "SoftmaxAttention",
    "SpatialReductionAttention",
    "WindowAttention",
    "attention_class",
    "attention_kinds",
    "register_attention",
]
