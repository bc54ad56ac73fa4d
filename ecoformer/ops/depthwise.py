"""Depthwise 3 x 3 convolution of tokens in the forms that backbones have, as one operator.

On CUDA it is ``ecoformer::depthwise_conv``, which compiling goes through without looking inside;
elsewhere PyTorch's operations.

Predicted for CUDA, not measured: bytes that GELU(conv(x)) moves for each value in 16 bits.

======== ============================================== ==========================================
forward  4: map and output                              PyTorch 8: each of convolution and GELU
backward 10: map, gradient and that before GELU; then   PyTorch 14: GELU 6, gradients of the map
         that again and the map's gradient              and of the weight 4 each
======== ============================================== ==========================================

A thread issues 45 instructions a value forward, and 60 and 21 backward (compiled for sm_90). An
H200 moves 4.3 TB/s and issues 29.6e12 a second: 1.5 and 3.0 ps a value, the first bound by issue,
beside 1.9 and 3.3 ps of PyTorch if memory alone bound its convolutions. cuDNN's are predicted at 3
to 10 times that. A step keeps one hidden map a block, not two, and casts no parameter.

Shapes: B batch, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu
from wrapt import when_imported

from ecoformer.errors import InputError
from ecoformer.ops import reference
from ecoformer.ops.backends import forced_backend
from ecoformer.ops.backends.triton import can_convolve
from ecoformer.ops.operator import is_transformed

Form = Literal["gelu", "relu gelu", "residual"]
"""GELU(conv(x)), GELU(conv(ReLU(x))), or x + conv(x)."""


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """Convolve each channel with zeros around the map, before or after what ``form`` says.

    ``use_backend`` chooses: ``"reference"``, ``"triton"``, or by any other name PyTorch. Otherwise
    Triton's kernels run where they can.

    Args:
        x: [B, H, W, C], float, of any strides: tokens [B, H * W, C] are ``x.unflatten(1, (H, W))``.
        weight: [C, 1, 3, 3], float, as ``nn.Conv2d`` has it.
        bias: [C], float.

    Returns:
        [B, H, W, C], the dtype of ``x``, or under autocast what that makes of PyTorch's. The
        kernels sum in float32 and round once; they have no second gradient.

    Raises:
        InputError: the chosen backend cannot run on these inputs.
    """
    backend = forced_backend()
    name = "" if backend is None else backend.name
    if name == "reference":
        return reference.depthwise_conv(x, weight, bias, form)
    if name == "triton" and not can_convolve(x):
        raise InputError(
            f"backend 'triton' cannot convolve {x.dtype} maps on {x.device.type}: it needs an "
            "NVIDIA GPU and float32, bfloat16 or float16. Choose another backend, or none."
        )
    return convolve(x, weight, bias, form) if has_kernel(x) else compose(x, weight, bias, form)


def has_kernel(x: Tensor) -> bool:
    """Tell whether ``depthwise_conv`` of ``x`` is one of Triton's kernels."""
    backend = forced_backend()
    is_chosen = backend is None or backend.name == "triton"
    # Those transforms, as torch.func.grad, take PyTorch's operations apart.
    return is_chosen and can_convolve(x) and not is_transformed()


def compose(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """Convolve by PyTorch, which autograd and exporters look into."""
    image = x.movedim(3, 1)
    if form == "relu gelu":
        image = image.relu()
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    out = conv2d(image, weight, bias, padding=1, groups=len(weight)).movedim(1, 3)
    return x + out if form == "residual" else gelu(out)


@torch.library.custom_op("ecoformer::depthwise_conv", mutates_args=())
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """Convolve by the kernels, in the dtype of ``x``; contiguous."""
    from ecoformer.ops.backends.triton import depthwise  # which imports Triton

    return depthwise.forward(x, weight, bias, form)


@torch.library.custom_op("ecoformer::depthwise_conv_backward", mutates_args=())
def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    from ecoformer.ops.backends.triton import depthwise

    grad_x, *grads = depthwise.backward(grad, x, weight, bias, form)
    grad_weight, grad_bias = (grad.to(weight.dtype) for grad in grads)
    return grad_x, grad_weight, grad_bias


@convolve.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@_convolve_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    *grads, grad_bias = _convolve_backward(grad, x, weight, bias, ctx.form)
    return *grads, None if bias is None else grad_bias, None


convolve.register_autograd(_backward, setup_context=_save)


# Which imports Triton, and takes a second.
@when_imported("torch.utils.flop_counter")
def _register_flops(flop_counter: ModuleType) -> None:
    """Count the products that PyTorch's operations have, forward and backward."""

    @flop_counter.register_flop_formula(torch.ops.ecoformer.depthwise_conv)
    def count_forward(x: Sequence[int], *_: Any, **keywords: Any) -> int:
        return 2 * 9 * prod(x)

    @flop_counter.register_flop_formula(torch.ops.ecoformer.depthwise_conv_backward)
    def count_backward(grad: Sequence[int], *_: Any, **keywords: Any) -> int:
        return 2 * 2 * 9 * prod(grad)
