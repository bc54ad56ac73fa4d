"""Kernels of the depthwise 3 x 3 convolution of tokens and of its gradients.

A program works on a range of rows of one image and on BLOCK_C channels. It goes down the rows,
BLOCK_P pairs of columns at once, and reads each row once, in four tiles [P, C]: the pairs and their
two neighbours, which the cache holds. Two columns a thread halve the registers for taps.

Maps are read and written in their own type, and all else is float32. What is summed over tokens is
written for each range and added up afterwards in one order, so two runs agree to the bit.

Shapes: maps [B, H, W, C]; weight [C, 9], the taps of a channel row by row; bias [C]. Kernels are
compiled anew where ``bias`` or ``gate`` is None.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.5**0.5)
_MINUS_HALF_LOG2_E = tl.constexpr(-0.5 / math.log(2))
# The density of the normal distribution at 0.
_DENSITY = tl.constexpr((2 * math.pi) ** -0.5)


@triton.jit
def _place(num_blocks, num_parts):
    """Block of channels, part of an image, and image; those of one part follow each other."""
    index = tl.program_id(0)
    part = index // num_blocks
    return index % num_blocks, part % num_parts, (part // num_parts).to(tl.int64)


@triton.jit
def _load_taps(weight, channels, is_channel, IS_TURNED: tl.constexpr):
    """Nine taps, each [1, C]; turned, the last one first."""
    taps = ()
    for tap in tl.static_range(9):
        place = channels * 9 + (8 - tap if IS_TURNED else tap)
        numbers = tl.load(weight + place, mask=is_channel, other=0.0)
        taps = taps + (numbers.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _load_bias(bias, channels, is_channel):
    """[1, C]; zeros where there is none."""
    if bias is None:
        numbers = tl.zeros(channels.shape, tl.float32)
    else:
        numbers = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    return numbers[None, :]


@triton.jit
def _point(tensor, strides, image, columns, channels):
    """Pointers [P, C] to the first row of an image."""
    row = tensor + image * strides[0]
    return row + columns[:, None] * strides[2] + channels[None, :] * strides[3]


@triton.jit
def _load_row(pointers, strides, row, height, width, columns, is_channel, HAS_RELU: tl.constexpr):
    """The columns before a pair, of it and after it, [P, C] each; zeros outside the map."""
    mask = is_channel[None, :] & (row >= 0) & (row < height)
    pointers += row * strides[1]
    tiles = ()
    for shift in tl.static_range(-1, 3):
        is_column = (columns + shift >= 0) & (columns + shift < width)
        tile = tl.load(pointers + shift * strides[2], mask=mask & is_column[:, None], other=0.0)
        tile = tile.to(tl.float32)
        if HAS_RELU:
            # Not tl.maximum, which would hide NaN.
            tile = tl.where(tile < 0, 0.0, tile)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _add_row(totals, tiles, taps, FIRST: tl.constexpr):
    """Add to both columns of a pair the products of a row with three taps."""
    left, right = totals[0], totals[1]
    for shift in tl.static_range(3):
        left += taps[FIRST + shift] * tiles[shift]
        right += taps[FIRST + shift] * tiles[shift + 1]
    return left, right


@triton.jit
def _split_normal(x):
    """Size of x, tail of the normal distribution beyond it, and its density times root 2 pi.

    The tail is the density times a polynomial: Abramowitz and Stegun, 7.1.26. In float32 that is
    closer to GELU than the error function, which cancels against 1, at two thirds of the work.
    """
    # Beyond 13 the tail is 0 beside anything, and times infinity it would be NaN.
    size = tl.minimum(tl.abs(x), 13.0, propagate_nan=tl.PropagateNan.ALL)
    t = 1 / (1 + size * (0.3275911 * _SQRT_HALF))
    total = 0.5 * 1.061405429 * t - 0.5 * 1.453152027
    total = total * t + 0.5 * 1.421413741
    total = total * t - 0.5 * 0.284496736
    total = total * t + 0.5 * 0.254829592
    density = tl.exp2(size * size * _MINUS_HALF_LOG2_E)
    return size, total * t * density, density


@triton.jit
def _gelu(x):
    size, tail, _density = _split_normal(x)
    return tl.maximum(x, 0.0) - size * tail


@triton.jit
def _gelu_slope(x):
    size, tail, density = _split_normal(x)
    below = tail - size * density * _DENSITY
    return tl.where(x < 0, below, 1 - below)


@triton.jit
def convolve_kernel(
    x,
    x_strides,
    weight,
    bias,
    gate,
    gate_strides,
    out,
    height,
    width,
    num_channels,
    range_rows,
    HAS_RELU: tl.constexpr,
    HAS_GELU: tl.constexpr,
    IS_RESIDUAL: tl.constexpr,
    IS_TURNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the convolution; with turned taps, the gradient of what a convolution took.

    Where ``gate`` is 0 or less, so is the result: the gradient of a ReLU.
    """
    num_strips = tl.cdiv(width, 2 * BLOCK_P)
    num_parts = num_strips * tl.cdiv(height, range_rows)
    block, part, image = _place(tl.cdiv(num_channels, BLOCK_C), num_parts)
    columns = 2 * (part % num_strips * BLOCK_P + tl.arange(0, BLOCK_P))
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channels < num_channels
    taps = _load_taps(weight, channels, is_channel, IS_TURNED)
    start = _load_bias(bias, channels, is_channel) + tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    pointers = _point(x, x_strides, image, columns, channels)
    if gate is not None:
        gates = _point(gate, gate_strides, image, columns, channels)
    tokens = image * height * width + columns
    out += tokens[:, None] * num_channels + channels[None, :]
    first = (part // num_strips * range_rows).to(tl.int64)
    last = tl.minimum(first + range_rows, height)
    # A row is the lowest of the output above it, the middle one of its own, the first of the next.
    own, following = (start, start), (start, start)
    for row in range(first - 1, last + 1):
        tiles = _load_row(pointers, x_strides, row, height, width, columns, is_channel, HAS_RELU)
        above = _add_row(own, tiles, taps, 6)
        own = _add_row(following, tiles, taps, 3)
        if IS_RESIDUAL:
            own = (own[0] + tiles[1], own[1] + tiles[2])
        following = _add_row((start, start), tiles, taps, 0)
        if row > first:
            for side in tl.static_range(2):
                mask = is_channel[None, :] & (columns + side < width)[:, None]
                tile = above[side]
                if HAS_GELU:
                    tile = _gelu(tile)
                if gate is not None:
                    place = (row - 1) * gate_strides[1] + side * gate_strides[2]
                    tile = tl.where(tl.load(gates + place, mask=mask, other=0.0) <= 0, 0.0, tile)
                place = ((row - 1) * width + side) * num_channels
                tl.store(out + place, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_gradients_kernel(
    x,
    x_strides,
    grad,
    grad_strides,
    weight,
    bias,
    grad_before,
    sums,
    height,
    width,
    num_channels,
    range_rows,
    HAS_RELU: tl.constexpr,
    HAS_GELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum gradients of the taps and of the bias over a range, [images * ranges, 10, C].

    With GELU, compute what it took again, and write the gradient there for ``convolve_kernel``.
    """
    num_ranges = tl.cdiv(height, range_rows)
    block, part, image = _place(tl.cdiv(num_channels, BLOCK_C), num_ranges)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channels < num_channels
    start = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if HAS_GELU:
        taps = _load_taps(weight, channels, is_channel, False)
        bias_tile = start + _load_bias(bias, channels, is_channel)
    totals = ()
    for _ in tl.static_range(10):
        totals = totals + (start,)
    first = (part * range_rows).to(tl.int64)
    last = tl.minimum(first + range_rows, height)
    for strip in range(0, width, 2 * BLOCK_P):
        columns = strip + 2 * tl.arange(0, BLOCK_P)
        pointers = _point(x, x_strides, image, columns, channels)
        grads = _point(grad, grad_strides, image, columns, channels)
        to = image * height * width * num_channels
        to = to + columns[:, None] * num_channels + channels[None, :]
        upper = _load_row(
            pointers, x_strides, first - 1, height, width, columns, is_channel, HAS_RELU
        )
        middle = _load_row(pointers, x_strides, first, height, width, columns, is_channel, HAS_RELU)
        for row in range(first, last):
            lower = _load_row(
                pointers, x_strides, row + 1, height, width, columns, is_channel, HAS_RELU
            )
            if HAS_GELU:
                before = _add_row((bias_tile, bias_tile), upper, taps, 0)
                before = _add_row(before, middle, taps, 3)
                before = _add_row(before, lower, taps, 6)
            for side in tl.static_range(2):
                mask = is_channel[None, :] & (columns + side < width)[:, None]
                place = row * grad_strides[1] + side * grad_strides[2]
                g = tl.load(grads + place, mask=mask, other=0.0).to(tl.float32)
                if HAS_GELU:
                    g *= _gelu_slope(before[side])
                    place = (row * width + side) * num_channels
                    tl.store(
                        grad_before + to + place, g.to(grad_before.dtype.element_ty), mask=mask
                    )
                added = ()
                for tap in tl.static_range(9):
                    rows = upper if tap < 3 else middle if tap < 6 else lower
                    added = added + (totals[tap] + g * rows[tap % 3 + side],)
                totals = added + (totals[9] + g,)
            upper, middle = middle, lower
    to = sums + (image * num_ranges + part) * 10 * num_channels + channels
    for tap in tl.static_range(10):
        tl.store(to + tap * num_channels, tl.sum(totals[tap], 0), mask=is_channel)
