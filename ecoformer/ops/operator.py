"""Kernelized hash attention as one operator with a gradient, for every device.

Compiling and exporting go through ``ecoformer::kernelized_hash_attention`` without looking inside.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from wrapt import when_imported

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
    anchors, weight, kernel_mean = map(_freeze, (anchors, weight, kernel_mean))
    is_normalized = value_bias == "normalized"
    if key_mask is not None:
        check_key_mask(key_mask, q)
    backend = forced_backend()
    if backend is None:
        return run(q, v, anchors, weight, kernel_mean, is_normalized, "", key_mask)
    functions = HashFunctions(anchors, weight, kernel_mean)
    return backend.attend(q, v, functions, is_normalized=is_normalized, key_mask=key_mask)


def run(*inputs: Any) -> Tensor:
    """Call ``attend``, also inside function transforms as ``torch.func.grad``; only its output."""
    return _Attend.apply(*inputs)[0] if is_transformed() else attend(*inputs)[0]


def is_transformed() -> bool:
    """Tell whether a function transform is active: PyTorch knows no operator's gradient there."""
    # Private, but there is no public way, and Dynamo does not look into it.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _freeze(function: Tensor) -> Tensor:
    return function.detach() if function.requires_grad else function


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
    inputs = (grad, *tensors, ctx.is_normalized, ctx.backend, key_mask)
    grads = _AttendBackward.apply(*inputs) if is_transformed() else _attend_backward(*inputs)
    return *grads, None, None, None, None, None, None


attend.register_autograd(_backward, setup_context=_save)


class _Attend(torch.autograd.Function):
    """``attend`` and its gradient as function transforms take them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


class _AttendBackward(torch.autograd.Function):
    """``_attend_backward`` as function transforms take it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            "fused backends have no second gradient; differentiate in ops.use_backend('eager')"
        )


@attend.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
    return _map(attend, info.batch_size, in_dims, inputs, slice(2, 5)), (0, 0, 0)


@_attend_backward.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
    return _map(_attend_backward, info.batch_size, in_dims, inputs, slice(3, 6)), (0, 0)


def _map(
    operator: Any,
    num_calls: int,
    in_dims: Sequence[int | None],
    inputs: Sequence[Any],
    functions: slice,
) -> tuple[Tensor, ...]:
    """Do many calls, along dimensions of inputs, as one of more images; results are along 0.

    Where the hash functions, at ``functions`` of the inputs, differ too: one call after another.
    """

    def along_first(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.expand(num_calls, *x.shape) if dim is None else x.movedim(dim, 0)

    stacked = [along_first(x, dim) for x, dim in zip(inputs, in_dims, strict=True)]
    if any(dim is not None for dim in in_dims[functions]):
        calls = (
            operator(*(x[i] if isinstance(x, Tensor) else x for x in stacked))
            for i in range(num_calls)
        )
        return tuple(torch.stack(results) for results in zip(*calls, strict=True))
    num_images = stacked[0].shape[1]
    merged = [x.flatten(0, 1) if isinstance(x, Tensor) else x for x in stacked]
    merged[functions] = inputs[functions]
    return tuple(result.unflatten(0, (num_calls, num_images)) for result in operator(*merged))


# Which imports Triton, and takes a second.
@when_imported("torch.utils.flop_counter")
def _register_flops(flop_counter: ModuleType) -> None:
    """Count the products of the eager halves, forward and backward, as all backends have them."""

    def count(q: Sequence[int], v: Sequence[int], weight: Sequence[int]) -> tuple[int, int]:
        num_rows, dim, value_dim = q[0] * q[1] * q[2], q[3], v[3]
        num_bits, num_anchors = weight[1:]
        forward = num_anchors * (dim + num_bits) + num_bits * (2 * value_dim + 1)
        backward = num_anchors * (2 * dim + num_bits) + num_bits * (4 * value_dim + 2)
        return 2 * num_rows * forward, 2 * num_rows * backward

    @flop_counter.register_flop_formula(torch.ops.ecoformer.kernelized_hash_attention)
    def count_forward(q: Any, v: Any, anchors: Any, weight: Any, *_: Any, **keywords: Any) -> int:
        return count(q, v, weight)[0]

    @flop_counter.register_flop_formula(torch.ops.ecoformer.kernelized_hash_attention_backward)
    def count_backward(
        grad: Any, q: Any, v: Any, anchors: Any, weight: Any, *_: Any, **keywords: Any
    ) -> int:
        return count(q, v, weight)[1]
