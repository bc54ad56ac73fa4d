"""Launch the kernels of the depthwise convolution.

Shapes: maps [B, H, W, C], weight [C, 1, 3, 3], bias [C].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from einops import rearrange
from torch import Tensor

from ecoformer.ops.backends.triton import depthwise_kernels as kernels

# Pairs of columns that a program reads at once; 56, 28, 14 and 7 columns, a pyramid's, fill them.
_BLOCK_PAIRS = 4
# Rows of a range, at most: two more are read.
_RANGE_ROWS = 16


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """Convolve in a form of ``ecoformer.ops.depthwise``, in the dtype of ``x``; contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flags = {
        "HAS_RELU": form == "relu gelu",
        "HAS_GELU": form != "residual",
        "IS_RESIDUAL": form == "residual",
        "IS_TURNED": False,
    }
    _launch(kernels.convolve_kernel, x, weight.contiguous(), bias, None, out, **flags)
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate ``forward`` at ``x``, at the weight and at a bias, the last two in float32.

    The convolution is computed again rather than kept. Sums over ranges are added in one order.
    """
    weight, has_relu, has_gelu = weight.contiguous(), form == "relu gelu", form != "residual"
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = torch.empty_like(grad_x) if has_gelu else None
    num_images, height, _, num_channels = x.shape
    num_parts = num_images * triton.cdiv(height, _find_range(height))
    sums = torch.empty(num_parts, 10, num_channels, dtype=torch.float32, device=x.device)
    flags = {"HAS_RELU": has_relu, "HAS_GELU": has_gelu}
    _launch(kernels.sum_gradients_kernel, x, grad, weight, bias, before, sums, **flags)
    flags = {"HAS_RELU": False, "HAS_GELU": False, "IS_RESIDUAL": not has_gelu, "IS_TURNED": True}
    gate = x if has_relu else None
    source = grad if before is None else before
    _launch(kernels.convolve_kernel, source, weight, None, gate, grad_x, **flags)
    # Where the weight is in one piece, DDP wants its gradient so.
    grad_weight, grad_bias = sums.sum(0).split((9, 1))
    grad_weight = rearrange(grad_weight, "(i j) c -> c 1 i j", i=3).contiguous()
    return grad_x, grad_weight, grad_bias[0].clone()


def _find_range(height: int) -> int:
    """Choose the rows of a range: about the same number in each."""
    return max(1, triton.cdiv(height, max(1, triton.cdiv(height, _RANGE_ROWS))))


def _launch(kernel: Any, x: Tensor, *tensors: Tensor | None, **flags: bool) -> None:
    """Start a kernel on tensors in its order; maps bring their strides along."""
    num_images, height, width, num_channels = x.shape
    has_strips = "IS_TURNED" in flags
    block_channels = 128 if num_channels % 128 == 0 else 64
    names, arguments = kernel.arg_names, list[Any]()
    for tensor in (x, *tensors):
        arguments.append(tensor)
        if names[len(arguments)].endswith("_strides"):
            arguments.append((0,) * 4 if tensor is None else tensor.stride())
    range_rows = _find_range(height)
    num_strips = triton.cdiv(width, 2 * _BLOCK_PAIRS) if has_strips else 1
    num_parts = num_images * triton.cdiv(height, range_rows) * num_strips
    grid = (num_parts * triton.cdiv(num_channels, block_channels),)
    # Triton starts kernels on the current device, whatever device tensors are on.
    with torch.cuda.device_of(x):
        kernel[grid](
            *arguments,
            *(height, width, num_channels, range_rows),
            **flags,
            BLOCK_P=_BLOCK_PAIRS,
            BLOCK_C=block_channels,
            num_warps=block_channels // 32,
            enable_fp_fusion=True,
        )
