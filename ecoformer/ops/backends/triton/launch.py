"""Launch the kernels. A group is one head of one image, and a range a part of its tokens.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ecoformer.ops.backends.base import HashFunctions, empty_rows
from ecoformer.ops.backends.triton import kernels

# Tokens of a range: enough to pay for the start of a program, few enough to fill a device.
_RANGE_TOKENS = 512


@dataclass(frozen=True)
class Tiling:
    """How a program does its work; results differ by rounding only."""

    precision: str  # "tf32" or "ieee", see ``kernels._dot``
    tile_tokens: int  # n, a power of two of at least 16
    num_warps: int

    @classmethod
    def choose(cls, *blocks: int) -> Tiling:
        """Choose for BLOCK_D, BLOCK_K and BLOCK_M what fits registers and shared memory."""
        # The parts of hash functions larger than published would not fit into shared memory.
        is_small = all(block <= limit for block, limit in zip(blocks, (64, 16, 32), strict=True))
        return cls("tf32", 64, 4) if is_small else cls("ieee", 16, 8)


def forward(
    q: Tensor,
    v: Tensor,
    functions: HashFunctions,
    *,
    is_normalized: bool,
    key_mask: Tensor | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do ``FusedBackend.forward`` in float32; the sizes choose the tiling where it is None."""
    num_images, num_heads, num_tokens, head_dim = q.shape
    num_bits = functions.weight.shape[1]
    launch = _Launch(q, functions, is_normalized, tiling)
    masks = _find_masks(key_mask)
    out = empty_rows(v)
    row_sums = launch.new_empty(*launch.grid, head_dim + 1)
    scales = launch.new_empty(num_images, num_heads)
    # The bits of a code as those of a number.
    code_dtype = torch.int32 if num_bits <= 32 else torch.int64
    codes = torch.empty(launch.grid[0], num_tokens, dtype=code_dtype, device=q.device)
    range_sums = launch.new_empty(*launch.grid, num_bits + 1, head_dim + 1)
    launch(kernels.measure_rows_kernel, q, launch.functions[0], masks[0], row_sums)
    inputs = (q, v, *launch.functions, *masks)
    launch(kernels.sum_values_kernel, *inputs, row_sums, scales, codes, range_sums)
    sums = range_sums.sum(1)
    launch(kernels.write_output_kernel, v, codes, *masks, sums, out)
    return out, sums.unflatten(0, (num_images, num_heads)), scales


def backward(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    functions: HashFunctions,
    sums: Tensor,
    scale: Tensor,
    *,
    is_normalized: bool,
    key_mask: Tensor | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Do ``FusedBackend.backward``; what adds up to the gradients is float32."""
    launch = _Launch(q, functions, is_normalized, tiling)
    grad_q, grad_v = empty_rows(q), empty_rows(v)
    inputs = (
        *(grad, q, v, *launch.functions, *_find_masks(key_mask)),
        *(sums.contiguous(), scale.contiguous()),
    )
    range_sums = launch.new_empty(*launch.grid, 2, *sums.shape[-2:])
    launch(kernels.sum_gradients_kernel, *inputs, range_sums)
    launch(kernels.write_gradients_kernel, *inputs, range_sums.sum(1), grad_q, grad_v)
    return grad_q, grad_v


def _find_masks(key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask in one piece, and how many tokens are real in each image, int32, at least 1."""
    if key_mask is None:
        return None, None
    return key_mask.contiguous(), key_mask.sum(-1, dtype=torch.int32).clamp_(min=1)


class _Launch:
    """Start kernels over the groups and ranges of some rows."""

    def __init__(
        self, q: Tensor, functions: HashFunctions, is_normalized: bool, tiling: Tiling | None
    ) -> None:
        num_images, num_heads, num_tokens, head_dim = q.shape
        _, num_bits, num_anchors = functions.weight.shape
        blocks = [
            max(16, triton.next_power_of_2(size)) for size in (head_dim, num_bits, num_anchors)
        ]
        tiling = tiling or Tiling.choose(*blocks)
        self.device = q.device
        self.functions = tuple(function.contiguous() for function in functions)
        self.grid = (num_images * num_heads, triton.cdiv(num_tokens, _RANGE_TOKENS))
        self._options: dict[str, Any] = {
            "num_heads": num_heads,
            "num_tokens": num_tokens,
            "range_tokens": _RANGE_TOKENS,
            "D": head_dim,
            "K": num_bits,
            "M": num_anchors,
            "BLOCK_N": tiling.tile_tokens,
            "BLOCK_D": blocks[0],
            "BLOCK_K": blocks[1],
            "BLOCK_M": blocks[2],
            "IS_NORMALIZED": is_normalized,
            "PRECISION": tiling.precision,
        }
        # Of multiplications with additions, which Triton's versions have different defaults for.
        self._compiling = {"num_warps": tiling.num_warps, "enable_fp_fusion": True}

    def new_empty(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def __call__(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Start a kernel on tensors in its order; rows bring their strides along."""
        names = kernel.arg_names
        arguments: list[Any] = []
        for tensor in tensors:
            arguments.append(tensor)
            if len(arguments) < len(names) and names[len(arguments)].endswith("_strides"):
                assert tensor is not None
                arguments.append(tensor.stride())
        options = {name: self._options[name] for name in names[len(arguments) :]}
        # Triton starts kernels on the current device, whatever device tensors are on.
        with torch.cuda.device_of(arguments[0]):
            kernel[self.grid](*arguments, **options, **self._compiling)
