"""The method as functions on tensors; ``reference`` holds the slow truth beside them."""

from __future__ import annotations

from ecoformer.ops.attention import hash_attention, hash_attention_weights
from ecoformer.ops.backends import use_backend
from ecoformer.ops.codes import (
    binarize,
    encode,
    kernel_features,
    normalize_rows,
    sign_straight_through,
)
from ecoformer.ops.depthwise import depthwise_conv
from ecoformer.ops.operator import kernelized_hash_attention
from ecoformer.ops.packing import pack_codes, unpack_codes
from ecoformer.ops.precision import as_full_precision, without_autocast

__all__ = [
    "as_full_precision",
    "binarize",
    "depthwise_conv",
    "encode",
    "hash_attention",
    "hash_attention_weights",
    "kernel_features",
    "kernelized_hash_attention",
    "normalize_rows",
    "pack_codes",
    "sign_straight_through",
    "unpack_codes",
    "use_backend",
    "without_autocast",
]
