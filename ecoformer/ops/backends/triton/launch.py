"""Launch the kernels. A group is one head of one image, and a range a part of its tokens.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ecoformer.ops.backends.base import HashFunctions, empty_rows
from ecoformer.ops.backends.triton import kernels

# Tokens of a tile: the largest that fits is taken. The tensor cores of an H100 take 64 rows of four
# warps.
TILES = (64, 32, 16)
_NUM_WARPS = 4
# Tokens of a range: enough to pay for the start of a program, few enough to fill a device; and
# where few images leave most of it idle.
_RANGE_TOKENS = 512
_SHORT_RANGE_TOKENS = 128
# LLVM keeps the address of each factor in registers all through a loop, unless it is told not to
# hoist. Triton after 3.8 hoists nothing then, not even the factors' parts.
_CAN_SPARE_REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 8)
# Programs that a processor runs at once.
_PROGRAMS_PER_PROCESSOR = 4


def forward(
    q: Tensor,
    v: Tensor,
    functions: HashFunctions,
    *,
    is_normalized: bool,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do ``FusedBackend.forward`` in float32."""
    num_images, num_heads, num_tokens, head_dim = q.shape
    num_bits = functions.weight.shape[1]
    launch = _Launch(q, functions, is_normalized)
    masks = _find_masks(key_mask)
    out = empty_rows(v)
    row_sums = launch.new_empty(*launch.grid, head_dim + 1)
    scales = launch.new_empty(num_images, num_heads)
    codes = launch.new_bits(num_tokens)
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
) -> tuple[Tensor, Tensor]:
    """Do ``FusedBackend.backward``; what adds up to the gradients is float32."""
    is_wide = torch.float32 in (q.dtype, v.dtype)
    launch = _Launch(
        q,
        functions,
        is_normalized,
        PARTS=3 if is_wide else 2,
        SPARES_REGISTERS=_CAN_SPARE_REGISTERS and (is_wide or q.shape[-1] > 32),
    )
    grad_q, grad_v = empty_rows(q), empty_rows(v)
    rows, masks = (grad, q, v), _find_masks(key_mask)
    # What the forward left, and what the first kernel leaves for the second.
    left = (sums.contiguous(), scale.contiguous())
    tokens = (launch.new_bits(2, q.shape[2]), launch.new_empty(launch.grid[0], 2, q.shape[2]))
    # Loading ahead takes shared memory, for which fewer programs would run at once. Without the
    # warp groups of an H100, 64 tokens of the first kernel take more registers than there are.
    max_tile = 64 if find_device(q.device).capability >= (9, 0) else 32
    range_sums = launch.new_empty(*launch.grid, 2, *sums.shape[-2:])
    launch(
        kernels.sum_gradients_kernel,
        *(*rows, *launch.functions, *masks, *left, *tokens, range_sums),
        num_stages=1,
        max_tile=max_tile,
    )
    launch(
        kernels.write_gradients_kernel,
        *(*rows, *launch.functions[:2], *masks, *left, *tokens),
        *(range_sums.sum(1), grad_q, grad_v),
        num_stages=1,
    )
    return grad_q, grad_v


def _find_masks(key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask in one piece, and how many tokens are real in each image, int32, at least 1."""
    if key_mask is None:
        return None, None
    return key_mask.contiguous(), key_mask.sum(-1, dtype=torch.int32).clamp_(min=1)


def choose_range(num_groups: int, num_tokens: int, num_processors: int) -> int:
    """Tokens of a range, a multiple of the largest tile: ranges of a group are nearly equal."""
    num_ranges = triton.cdiv(num_tokens, _RANGE_TOKENS)
    if num_groups * num_ranges < _PROGRAMS_PER_PROCESSOR * num_processors:
        num_ranges = triton.cdiv(num_tokens, _SHORT_RANGE_TOKENS)
    num_tiles = triton.cdiv(num_tokens, TILES[0])
    return int(triton.cdiv(num_tiles, num_ranges) * TILES[0])


class Device(NamedTuple):
    """What decides how kernels are started."""

    capability: tuple[int, int]
    shared_bytes: int  # that a program may have
    num_processors: int


@functools.cache
def find_device(device: torch.device) -> Device:
    """Ask PyTorch; in the interpreter all fits."""
    if device.type != "cuda":
        return Device((9, 0), 2**20, 1)
    # PyTorch's types do not know these properties.
    properties: Any = torch.cuda.get_device_properties(device)
    return Device(
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )


def fits(q: Tensor, functions: HashFunctions, tile_tokens: int = TILES[-1]) -> bool:
    """Tell whether shared memory of the device of some rows suffices for a tile, or for any.

    By an estimate that no kernel exceeds: of the three parts of all that stays in a loop, once for
    each product with it, and of rows that are loaded ahead.
    """
    _, num_bits, num_anchors = functions.weight.shape
    D, K, M = map(_fill_block, (q.shape[-1], num_bits, num_anchors))
    parts = 3 * K * D + 2 * M * D + 2 * K * M
    num_bytes = 3 * 2 * parts + 6 * q.itemsize * tile_tokens * D
    return num_bytes <= find_device(q.device).shared_bytes


# The tiles that were found to fit, by kernel, device and all that a kernel is compiled for.
_tiles: dict[tuple[Any, ...], int] = {}


class _Launch:
    """Start kernels over the groups and ranges of some rows."""

    def __init__(
        self, q: Tensor, functions: HashFunctions, is_normalized: bool, **constants: Any
    ) -> None:
        num_images, num_heads, num_tokens, head_dim = q.shape
        _, num_bits, num_anchors = functions.weight.shape
        self.device = q.device
        self.functions = tuple(function.contiguous() for function in functions)
        num_groups = num_images * num_heads
        range_tokens = choose_range(num_groups, num_tokens, find_device(q.device).num_processors)
        self.grid = (num_groups, triton.cdiv(num_tokens, range_tokens))
        self._constants: dict[str, Any] = {
            "D": head_dim,
            "K": num_bits,
            "M": num_anchors,
            "BLOCK_D": _fill_block(head_dim),
            "BLOCK_K": _fill_block(num_bits),
            "BLOCK_M": _fill_block(num_anchors),
            "IS_NORMALIZED": is_normalized,
            **constants,
        }
        # Compiling what does not fit takes minutes.
        self._tiles = [tile for tile in TILES if fits(q, functions, tile)] or TILES[-1:]
        self._numbers = {
            "num_heads": num_heads,
            "num_tokens": num_tokens,
            "range_tokens": range_tokens,
        }

    def new_empty(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def new_bits(self, *size: int) -> Tensor:
        """Numbers [groups, ...] whose bits are those of codes."""
        dtype = torch.int32 if self._constants["K"] <= 32 else torch.int64
        return torch.empty(self.grid[0], *size, dtype=dtype, device=self.device)

    def __call__(
        self, kernel: Any, *tensors: Tensor | None, num_stages: int = 3, max_tile: int = TILES[0]
    ) -> None:
        """Start a kernel on tensors in its order; rows bring their strides along."""
        names = kernel.arg_names
        arguments: list[Any] = []
        for tensor in tensors:
            arguments.append(tensor)
            if len(arguments) < len(names) and names[len(arguments)].endswith("_strides"):
                assert tensor is not None
                arguments.append(tensor.stride())
        options = self._constants | self._numbers
        options = {name: options[name] for name in names[len(arguments) :] if name in options}
        # Of multiplications with additions, which Triton's versions have different defaults for.
        options |= {"num_warps": _NUM_WARPS, "num_stages": num_stages, "enable_fp_fusion": True}
        dtypes = (tensor is not None and tensor.dtype for tensor in tensors)
        key = (kernel, self.device, *self._constants.values(), *dtypes)
        tiles = [tile for tile in self._tiles if tile <= max_tile]
        # Triton starts kernels on the current device, whatever device tensors are on.
        with torch.cuda.device_of(arguments[0]):
            for tile in (_tiles[key],) if key in _tiles else tiles:
                try:
                    kernel[self.grid](*arguments, **options, BLOCK_N=tile)
                except OutOfResources:
                    if tile == TILES[-1]:
                        raise
                else:
                    _tiles[key] = tile
                    break


def _fill_block(size: int) -> int:
    """The power of two that a block of a size takes, at least 16."""
    return max(16, int(triton.next_power_of_2(size)))
