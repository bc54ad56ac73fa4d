"""Kernelized hash attention as one operator with a gradient, for every device.

PyTorch sees ``ecoformer::kernelized_hash_attention`` whole: compiling and exporting a model go
through it without looking inside.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ecoformer.ops.backends import blocked
from ecoformer.ops.backends import triton as triton_ops
from ecoformer.ops.backends.blocked import HashFunctions, empty_rows
from ecoformer.ops.precision import compute_dtype, without_autocast


@torch.library.custom_op("ecoformer::kernelized_hash_attention", mutates_args=())
def kernelized_hash_attention(
    q: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, kernel_mean: Tensor, is_normalized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, and what its gradient needs beside the arguments.

    Args:
        q: [B, H, N, D], float, raw rows.
        v: [B, H, N, D], float.
        anchors: [H, M, D], float.
        weight: [H, K, M], float.
        kernel_mean: [H, M], float.
        is_normalized: the value bias is ``c sum_j v_j``, not ``c v_i``.

    Returns:
        As ``blocked.forward``.
    """
    functions = _functions(q, v, anchors, weight, kernel_mean)
    with without_autocast(q):
        return _implementation(q, v, weight).forward(q, v, functions, is_normalized=is_normalized)


@torch.library.custom_op("ecoformer::kernelized_hash_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    sums: Tensor,
    scale: Tensor,
    is_normalized: bool,
) -> tuple[Tensor, Tensor]:
    functions = _functions(q, v, anchors, weight, kernel_mean)
    with without_autocast(q):
        return _implementation(q, v, weight).backward(
            grad, q, v, functions, sums, scale, is_normalized=is_normalized
        )


def _implementation(q: Tensor, v: Tensor, weight: Tensor) -> ModuleType:
    """Triton's kernels where they run, and elsewhere the form that runs everywhere."""
    if not triton_ops.can_run(q, v, weight):
        return blocked
    # Imports Triton, which many runs do without.
    from ecoformer.ops.backends.triton import launch

    return launch


def _functions(
    q: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, kernel_mean: Tensor
) -> HashFunctions:
    dtype = compute_dtype(q, v)
    return HashFunctions(anchors.to(dtype), weight.to(dtype), kernel_mean.to(dtype))


@kernelized_hash_attention.register_fake
def _(
    q: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, kernel_mean: Tensor, is_normalized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    num_images, num_heads, _, head_dim = v.shape
    dtype = compute_dtype(q, v)
    sums = v.new_empty(num_images, num_heads, weight.shape[1] + 1, head_dim + 1, dtype=dtype)
    return empty_rows(v), sums, v.new_empty(num_images, num_heads, dtype=dtype)


@_backward_op.register_fake
def _(grad: Tensor, q: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_rows(q), empty_rows(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.is_normalized = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.is_normalized)
    return *grads, None, None, None, None


kernelized_hash_attention.register_autograd(_backward, setup_context=_save)
