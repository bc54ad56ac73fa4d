"""Kernels of the depthwise 3 x 3 convolution of tokens and of its gradients.

A program works on a range of rows of one image, BLOCK_C channels and BLOCK_W columns at once. It
goes down the rows and reads each once, in three tiles: shifted by one column to the left and to
the right, which the cache holds. Maps are read and written in their own type, all else is float32.

Shapes: maps [B, H, W, C]; weight [C, 9], the taps of a channel row by row; bias [C]. Kernels are
compiled anew where ``bias``, or ``gate``, is None.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.5**0.5)
# 1 / sqrt(2 pi), the density of the normal distribution at 0.
_DENSITY = tl.constexpr(0.3989422804014327)


@triton.jit
def _place(num_blocks, num_parts):
    """Block of channels, part of an image and image of a program; neighbours share cache lines."""
    index = tl.program_id(0)
    part = index // num_blocks
    return index % num_blocks, part % num_parts, (part // num_parts).to(tl.int64)


@triton.jit
def _load_taps(weight, channels, is_channel):
    """The nine taps, each [1, C]."""
    taps = ()
    for tap in tl.static_range(9):
        numbers = tl.load(weight + channels * 9 + tap, mask=is_channel, other=0.0)
        taps = taps + (numbers.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _turn(taps):
    """By half a turn: the last tap is the first."""
    turned = ()
    for tap in tl.static_range(9):
        turned = turned + (taps[8 - tap],)
    return turned


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
    """Pointers [W, C] to the first row of an image."""
    return tensor + image * strides[0] + columns[:, None] * strides[2] + channels[None, :] * strides[3]


@triton.jit
def _load_row(pointers, strides, row, height, width, columns, is_channel):
    """Tiles [W, C] of a row shifted to the left, in place, and to the right; zeros outside."""
    pointers += row * strides[1]
    mask = is_channel[None, :] & (row >= 0) & (row < height)
    is_left = ((columns > 0) & (columns <= width))[:, None]
    left = tl.load(pointers - strides[2], mask=mask & is_left, other=0.0)
    middle = tl.load(pointers, mask=mask & (columns < width)[:, None], other=0.0)
    is_right = (columns + 1 < width)[:, None]
    right = tl.load(pointers + strides[2], mask=mask & is_right, other=0.0)
    return left, middle, right


@triton.jit
def _raise(tile, HAS_RELU: tl.constexpr):
    """In float32, after a ReLU if there is one. Not tl.maximum, which would hide NaN."""
    tile = tile.to(tl.float32)
    if HAS_RELU:
        tile = tl.where(tile < 0, 0.0, tile)
    return tile


@triton.jit
def _add_row(total, tiles, taps, FIRST: tl.constexpr, HAS_RELU: tl.constexpr):
    """Add the products of a row with three taps."""
    for shift in tl.static_range(3):
        total += taps[FIRST + shift] * _raise(tiles[shift], HAS_RELU)
    return total


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1 + tl.erf(x * _SQRT_HALF)) + x * (_DENSITY * tl.exp(-0.5 * x * x))


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
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the convolution; with turned taps, the gradient of what a convolution took.

    Where ``gate`` is positive or NaN the result passes, elsewhere it is 0: the gradient of a ReLU.
    """
    num_strips = tl.cdiv(width, BLOCK_W)
    num_ranges = tl.cdiv(height, range_rows)
    block, part, image = _place(tl.cdiv(num_channels, BLOCK_C), num_strips * num_ranges)
    columns = part % num_strips * BLOCK_W + tl.arange(0, BLOCK_W)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channels < num_channels
    taps = _load_taps(weight, channels, is_channel)
    if IS_TURNED:
        taps = _turn(taps)
    bias_tile = _load_bias(bias, channels, is_channel) + tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    pointers = _point(x, x_strides, image, columns, channels)
    out_row = out + (image * height * width + columns[:, None]) * num_channels + channels[None, :]
    if gate is not None:
        gates = _point(gate, gate_strides, image, columns, channels)
    is_inside = is_channel[None, :] & (columns < width)[:, None]
    first = (part // num_strips * range_rows).to(tl.int64)
    last = tl.minimum(first + range_rows, height)
    # A row is the lower neighbour of the last output, the middle of this and the upper of the next.
    this, upcoming = bias_tile, bias_tile
    for row in range(first - 1, last + 1):
        tiles = _load_row(pointers, x_strides, row, height, width, columns, is_channel)
        finished = _add_row(this, tiles, taps, 6, HAS_RELU)
        this = _add_row(upcoming, tiles, taps, 3, HAS_RELU)
        if IS_RESIDUAL:
            this += tiles[1].to(tl.float32)
        upcoming = _add_row(bias_tile, tiles, taps, 0, HAS_RELU)
        if row > first:
            if HAS_GELU:
                finished = _gelu(finished)
            if gate is not None:
                is_shut = tl.load(gates + (row - 1) * gate_strides[1], mask=is_inside, other=0.0) <= 0
                finished = tl.where(is_shut, 0.0, finished)
            to = out_row + (row - 1) * width * num_channels
            tl.store(to, finished.to(out.dtype.element_ty), mask=is_inside)


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
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum gradients of the taps and of the bias over a range, [images * ranges, 10, C].

    Before that, with GELU, compute its argument again and write the gradient there, which
    ``convolve_kernel`` takes.
    """
    num_ranges = tl.cdiv(height, range_rows)
    block, part, image = _place(tl.cdiv(num_channels, BLOCK_C), num_ranges)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channels < num_channels
    if HAS_GELU:
        taps = _load_taps(weight, channels, is_channel)
        bias_tile = _load_bias(bias, channels, is_channel)
    totals = ()
    for _ in tl.static_range(10):
        totals = totals + (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),)
    first = (part * range_rows).to(tl.int64)
    last = tl.minimum(first + range_rows, height)
    for start in range(0, width, BLOCK_W):
        columns = start + tl.arange(0, BLOCK_W)
        is_inside = is_channel[None, :] & (columns < width)[:, None]
        pointers = _point(x, x_strides, image, columns, channels)
        grads = _point(grad, grad_strides, image, columns, channels)
        upper = _load_row(pointers, x_strides, first - 1, height, width, columns, is_channel)
        middle = _load_row(pointers, x_strides, first, height, width, columns, is_channel)
        for row in range(first, last):
            lower = _load_row(pointers, x_strides, row + 1, height, width, columns, is_channel)
            g = tl.load(grads + row * grad_strides[1], mask=is_inside, other=0.0)
            g = g.to(tl.float32)
            if HAS_GELU:
                before = _add_row(bias_tile, upper, taps, 0, HAS_RELU)
                before = _add_row(before, middle, taps, 3, HAS_RELU)
                before = _add_row(before, lower, taps, 6, HAS_RELU)
                g *= _gelu_slope(before)
                token = (image * height + row) * width + columns
                to = grad_before + token[:, None] * num_channels + channels[None, :]
                tl.store(to, g.to(grad_before.dtype.element_ty), mask=is_inside)
            tiles = upper + middle + lower
            added = ()
            for tap in tl.static_range(9):
                added = added + (totals[tap] + g * _raise(tiles[tap], HAS_RELU),)
            totals = added + (totals[9] + g,)
            upper, middle = middle, lower
    to = sums + (image * num_ranges + part) * 10 * num_channels + channels
    for tap in tl.static_range(10):
        tl.store(to + tap * num_channels, tl.sum(totals[tap], 0), mask=is_channel)
