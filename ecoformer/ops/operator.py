"""Kernelized hash attention as one operator with a gradient, for every device.

Compiling and exporting go through ``ecoformer::kernelized_hash_attention`` without looking inside.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ecoformer.hash_config import ValueBias, check_value_bias
from ecoformer.ops.backends import HashFunctions, find_fused_backend, forced_backend
from ecoformer.ops.backends.base import empty_rows
from ecoformer.ops.masks import check_key_mask
from ecoformer.ops.precision import compute_dtype, without_autocast


def kernelized_hash_attention(
    q: Tensor,
    v: Tensor,
    *,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    value_bias: ValueBias = "released",
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend through binary codes of the rows that queries and keys share.

    ``hash_attention(encode(normalize_rows(q), ...), v, value_bias)`` is the same in pieces. The
    fastest fused backend that can run computes it, or the one that ``use_backend`` chose.

    Args:
        q: [B, H, N, D], float, raw rows of the shared query-key projection.
        v: [B, H, N, D], float.
        anchors: [H, M, D], float, unit rows.
        weight: [H, K, M], float.
        kernel_mean: [H, M], float.
        value_bias: as for ``hash_attention``.
        key_mask: [B, N], bool, true for a real token; None where all are. Output and gradients are
            those of the real tokens alone, and 0 for masked ones, whatever their rows hold.

    Returns:
        [B, H, N, D], the dtype of ``v``; computed in float32, or float64 where an input is. No
        gradient reaches the hash functions.

    Raises:
        InputError: another ``value_bias``; a ``key_mask`` of another shape or dtype; a chosen
            backend that cannot run on these inputs.

    Source: EcoFormer, arXiv 2209.09004.
    """
    check_value_bias(value_bias)
    is_normalized = value_bias == "normalized"
    if key_mask is not None:
        check_key_mask(key_mask, q)
    backend = forced_backend()
    if backend is None:
        return attend(q, v, anchors, weight, kernel_mean, is_normalized, "", key_mask)[0]
    functions = HashFunctions(anchors, weight, kernel_mean)
    return backend.attend(q, v, functions, is_normalized=is_normalized, key_mask=key_mask)


@torch.library.custom_op("ecoformer::kernelized_hash_attention", mutates_args=())
def attend(
    q: Tensor,
    v: Tensor,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    is_normalized: bool,
    backend: str = "",
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``FusedBackend.forward`` of the named backend, or of the first that can run."""
    functions = _functions(q, v, anchors, weight, kernel_mean)
    with without_autocast(q):
        return find_fused_backend(backend, q, v, functions).forward(
            q, v, functions, is_normalized=is_normalized, key_mask=key_mask
        )


@torch.library.custom_op("ecoformer::kernelized_hash_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    sums: Tensor,
    scale: Tensor,
    is_normalized: bool,
    backend: str,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    functions = _functions(q, v, anchors, weight, kernel_mean)
    with without_autocast(q):
        return find_fused_backend(backend, q, v, functions).backward(
            grad, q, v, functions, sums, scale, is_normalized=is_normalized, key_mask=key_mask
        )


def _functions(
    q: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, kernel_mean: Tensor
) -> HashFunctions:
    return HashFunctions(anchors, weight, kernel_mean).to(compute_dtype(q, v))


@attend.register_fake
def _(
    q: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    num_images, num_heads, _, head_dim = v.shape
    dtype = compute_dtype(q, v)
    sums = v.new_empty(num_images, num_heads, weight.shape[1] + 1, head_dim + 1, dtype=dtype)
    return empty_rows(v), sums, v.new_empty(num_images, num_heads, dtype=dtype)


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_rows(q), empty_rows(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.is_normalized, ctx.backend, key_mask = inputs
    ctx.save_for_backward(*tensors, *output[1:], key_mask)


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    *tensors, key_mask = ctx.saved_tensors
    grads = _attend_backward(grad, *tensors, ctx.is_normalized, ctx.backend, key_mask)
    return *grads, None, None, None, None, None, None


attend.register_autograd(_backward, setup_context=_save)
