"""Kernels of kernelized hash attention and of its gradient.

A program works on a group, one head of one image, and on a range of its tokens, tile by tile.
Rows are read and written in their own type, and all else is float32. What is summed over tokens
is written for each range and added up afterwards in one order, so two runs agree to the bit.

Shapes: N tokens, D head dim, K hash bits, M anchors of a group; n tokens of a tile. A tile is
BLOCK_N x BLOCK_D and so on, powers of two of at least 16; beyond N, D, K and M it holds zeros.

A masked token is treated as those beyond N are. Kernels are compiled anew where ``key_mask``
[B, N], bool, and ``counts`` [B], int32, real tokens of an image and at least 1, are None.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ecoformer.ops.codes import MIN_NORM

_MIN_NORM = tl.constexpr(MIN_NORM)
# Mean squared distance below which rows and anchors are equal but for rounding: an approximate
# reciprocal made the unit rows, a division the anchors.
_MIN_BANDWIDTH = tl.constexpr(2**-40)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
# Keeps products of raw rows and anchors finite: 2^128 sqrt(D) for a row times 2^41 for an anchor,
# twice the largest scale.
_SHRINK = tl.constexpr(2.0**-48)
# Triton's interpreter takes bfloat16 factors of a product for the integers that it keeps them in.
_PART_TYPE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def _row_pointers(tensor, strides, group, num_heads, tokens, BLOCK_D: tl.constexpr):
    """[n, D], in rows [B, H, N, D]."""
    image, head = (group // num_heads).to(tl.int64), (group % num_heads).to(tl.int64)
    first = tensor + image * strides[0] + head * strides[1]
    dims = tl.arange(0, BLOCK_D)
    return first + tokens[:, None] * strides[2] + dims[None, :] * strides[3]


@triton.jit
def _load_rows(
    tensor, strides, group, num_heads, tokens, is_token, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A tile of rows [B, H, N, D], in float32."""
    mask = is_token[:, None]
    if D < BLOCK_D:
        mask &= (tl.arange(0, BLOCK_D) < D)[None, :]
    pointers = _row_pointers(tensor, strides, group, num_heads, tokens, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(
    tile,
    tensor,
    strides,
    group,
    num_heads,
    tokens,
    is_token,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Undo ``_load_rows``."""
    mask = is_token[:, None]
    if D < BLOCK_D:
        mask &= (tl.arange(0, BLOCK_D) < D)[None, :]
    pointers = _row_pointers(tensor, strides, group, num_heads, tokens, BLOCK_D)
    tl.store(pointers, tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _find_real(key_mask, group, num_heads, num_tokens, tokens, is_token):
    """Which of some tokens are real, [n], bool."""
    is_real = is_token
    if key_mask is not None:
        row = key_mask + (group // num_heads).to(tl.int64) * num_tokens
        is_real = is_token & (tl.load(row + tokens, mask=is_token, other=0) != 0)
    return is_real


@triton.jit
def _count_real(counts, group, num_heads, num_tokens):
    """Real tokens of a group's image, at least 1."""
    count = num_tokens
    if counts is not None:
        count = tl.load(counts + group // num_heads)
    return count


@triton.jit
def _list_bits(numbers, BLOCK_K: tl.constexpr):
    """The powers of two [K], of the type of ``numbers``, which are a token's bits each."""
    return tl.full([BLOCK_K], 1, numbers.dtype.element_ty) << tl.arange(0, BLOCK_K)


@triton.jit
def _pack(is_set, bits):
    """Numbers [n] whose bits are those of [n, K]."""
    return tl.sum(tl.where(is_set, bits[None, :], 0), 1)


@triton.jit
def _unpack(numbers, bits):
    """Whether each bit [n, K] of numbers [n] is set."""
    return (numbers[:, None] & bits[None, :]) != 0


@triton.jit
def _token_pointers(tensor, group, num_tokens, tokens):
    """[n], to the first of two numbers of each token, [groups, 2, N]."""
    return tensor + group.to(tl.int64) * 2 * num_tokens + tokens


@triton.jit
def _load_matrix(
    matrix,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """A matrix whose rows are STRIDE apart, with zeros around it."""
    rows, columns = tl.arange(0, BLOCK_HEIGHT), tl.arange(0, BLOCK_WIDTH)
    mask = (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(matrix + rows[:, None] * STRIDE + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_vector(vector, SIZE: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Numbers STRIDE apart, and zeros after them."""
    indices = tl.arange(0, BLOCK)
    return tl.load(vector + indices * STRIDE, mask=indices < SIZE, other=0.0)


@triton.jit
def _load_anchors(
    anchors, head, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Anchors of a head less their centre, [M, D], and the centre [D], see ``anchor_center``."""
    anchors += head * M * D
    tile = _load_matrix(anchors, M, D, BLOCK_M, BLOCK_D, D)
    first = _load_vector(anchors, D, BLOCK_D, 1)
    is_anchor = (tl.arange(0, BLOCK_M) < M)[:, None]
    # Transposed, or rows would be moved to the layout of anchors at each step of a loop.
    center = first + tl.sum(tl.trans(tl.where(is_anchor, tile - first[None, :], 0.0)), 1) / M
    return tl.where(is_anchor, tile - center[None, :], 0.0), center


@triton.jit
def _load_functions(
    anchors,
    weight,
    kernel_mean,
    head,
    D: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Anchors [M, D] of a head less their centre [D], this, weight [K, M], kernel mean [M]."""
    anchors_tile, center = _load_anchors(anchors, head, D, M, BLOCK_D, BLOCK_M)
    return (
        anchors_tile,
        center,
        _load_matrix(weight + head * K * M, K, M, BLOCK_K, BLOCK_M, M),
        _load_vector(kernel_mean + head * M, M, BLOCK_M, 1),
    )


@triton.jit
def _load_sums(
    sums,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The parts of a [K + 1, D + 1] matrix: [K, D], last column [K], last row [D], corner."""
    STRIDE: tl.constexpr = D + 1
    return (
        _load_matrix(sums, K, D, BLOCK_K, BLOCK_D, STRIDE),
        _load_vector(sums + D, K, BLOCK_K, STRIDE),
        _load_vector(sums + K * STRIDE, D, BLOCK_D, 1),
        tl.load(sums + K * STRIDE + D),
    )


@triton.jit
def _store_sums(
    sums,
    inner,
    column,
    row,
    corner,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Undo ``_load_sums``."""
    STRIDE: tl.constexpr = D + 1
    bits, dims = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    mask = (bits < K)[:, None] & (dims < D)[None, :]
    tl.store(sums + bits[:, None] * STRIDE + dims[None, :], inner, mask=mask)
    tl.store(sums + bits * STRIDE + D, column, mask=bits < K)
    tl.store(sums + K * STRIDE + dims, row, mask=dims < D)
    tl.store(sums + K * STRIDE + D, corner)


@triton.jit
def _take_part(x):
    """The leading 8 bits of float32, and the rest."""
    bits = x.to(tl.int32, bitcast=True)
    # Not a conversion, which is slow where it rounds.
    part = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(_PART_TYPE)
    return part, x - (bits & -(2**16)).to(tl.float32, bitcast=True)


@triton.jit
def _split(x, PARTS: tl.constexpr):
    """Three numbers, each exact in bfloat16, that add up to float32; None beyond PARTS."""
    middle, low = None, None
    if PARTS == 1:
        high = x.to(_PART_TYPE)
    else:
        high, rest = _take_part(x)
        middle, rest = _take_part(rest)
        if PARTS == 3:
            low, rest = _take_part(rest)
    return high, middle, low


@triton.jit
def _dot(a, b, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """Matrix product of float32 in full precision, by tensor cores.

    These multiply bfloat16 exactly, so the products of parts add up. A float32 has three parts,
    float16 two; bfloat16 and signs are one. Products left out are below float32's rounding, and of
    a float32 of which two parts are taken, below 2^-15. The parts of a factor that stays the same
    in a loop are made once, before it.
    """
    a_high, a_middle, a_low = _split(a, A_PARTS)
    b_high, b_middle, b_low = _split(b, B_PARTS)
    product = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    # Small ones first.
    if a_low is not None:
        product = tl.dot(a_low, b_high, product, input_precision="ieee")
    if b_low is not None:
        product = tl.dot(a_high, b_low, product, input_precision="ieee")
    if A_PARTS + B_PARTS > 4 and a_middle is not None and b_middle is not None:
        product = tl.dot(a_middle, b_middle, product, input_precision="ieee")
    if a_middle is not None:
        product = tl.dot(a_middle, b_high, product, input_precision="ieee")
    if b_middle is not None:
        product = tl.dot(a_high, b_middle, product, input_precision="ieee")
    return tl.dot(a_high, b_high, product, input_precision="ieee")


@triton.jit
def _count_parts(rows):
    """Parts that rows have as they are stored."""
    return (rows.dtype.element_ty.fp_mantissa_width + 8) // 8


@triton.jit
def _measure(q, center):
    """Inverse norms [n] of rows [n, D]; unit rows less the centre; squared norms [n] of these."""
    inverse_norms = tl.minimum(tl.rsqrt(tl.sum(q * q, 1)), 1 / _MIN_NORM)
    x = q * inverse_norms[:, None] - center[None, :]
    return inverse_norms, x, tl.sum(x * x, 1)


@triton.jit
def _find_exponents(q, center, anchors, scale, Q_PARTS: tl.constexpr):
    """Inverse norms [n] of rows [n, D], and log2 of the kernel [n, M].

    The anchors are less their centre.
    """
    inverse_norms, x, x_squared = _measure(q, center)
    scale *= _LOG2_E
    factors = -2 * scale * anchors
    offsets = scale * tl.sum(anchors * anchors, 1)
    if Q_PARTS < 3:
        # Half the products; what the centre adds comes off again, within float32's rounding of x.
        products = _dot(q, tl.trans(factors * _SHRINK), Q_PARTS, 3)
        products *= (inverse_norms / _SHRINK)[:, None]
        offsets -= tl.sum(factors * center[None, :], 1)
    else:
        products = _dot(x, tl.trans(factors), 3, 3)
    exponents = products + offsets[None, :] + (scale * x_squared)[:, None]
    # A distance of 0 may round to less, and where all rows are alike that is divided by little.
    return inverse_norms, tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _project(q, center, anchors, weight, kernel_mean, scale, Q_PARTS: tl.constexpr):
    """Log2 of the kernel and this [n, M] of rows [n, D], and y [n, K]. Signs of y are codes."""
    _inverse_norms, exponents = _find_exponents(q, center, anchors, scale, Q_PARTS)
    kernel = tl.exp2(exponents)
    y = _dot(kernel - kernel_mean[None, :], tl.trans(weight), 3, 3)
    return exponents, kernel, y


@triton.jit
def measure_rows_kernel(
    q,
    q_strides,
    anchors,
    key_mask,
    row_sums,
    num_heads,
    num_tokens,
    range_tokens,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums over a range of unit rows, and of their squared norms less the centre of the anchors.

    [groups, ranges, D + 1]. Without the centre, distances of nearly equal rows would cancel.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    _anchors, center = _load_anchors(anchors, group % num_heads, D, M, BLOCK_D, BLOCK_M)
    x_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    x_squared_sums = tl.zeros([BLOCK_N], tl.float32)
    last = tl.minimum((part + 1) * range_tokens, num_tokens)
    for start in range(part * range_tokens, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_real = _find_real(key_mask, group, num_heads, num_tokens, tokens, tokens < last)
        q_tile = _load_rows(q, q_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        inverse_norms, _x, x_squared = _measure(q_tile, center)
        # Of the rows before the centre is subtracted: those that are not real are 0.
        x_sums += q_tile * inverse_norms[:, None]
        x_squared_sums += tl.where(is_real, x_squared, 0.0)
    row_sums += (group * tl.num_programs(1) + part).to(tl.int64) * (D + 1)
    dims = tl.arange(0, BLOCK_D)
    tl.store(row_sums + dims, tl.sum(x_sums, 0), mask=dims < D)
    tl.store(row_sums + D, tl.sum(x_squared_sums))


@triton.jit
def _kernel_scale(
    row_sums,
    group,
    num_ranges,
    count,
    center,
    anchors,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """-1 / (2 s) of a group, s being its mean squared distance between real rows and anchors.

    Where all are equal it is 0, which makes features of 1 without a gradient.
    """
    row_sums += (group * num_ranges).to(tl.int64) * (D + 1)
    x_sums = tl.zeros([16, BLOCK_D], tl.float32)
    x_squared_sums = tl.zeros([16], tl.float32)
    # Loads of one step wait together.
    for start in range(0, num_ranges, 16):
        parts = start + tl.arange(0, 16)
        dims = tl.arange(0, BLOCK_D)
        pointers = row_sums + parts * (D + 1)
        mask = (parts < num_ranges)[:, None] & (dims < D)[None, :]
        x_sums += tl.load(pointers[:, None] + dims[None, :], mask=mask, other=0.0)
        x_squared_sums += tl.load(pointers + D, mask=parts < num_ranges, other=0.0)
    anchors_squared_mean = tl.sum(anchors * anchors) / M
    # Not 0: the centre is rounded.
    x_mean = tl.sum(x_sums, 0) / count - center
    cross = tl.sum(x_mean * tl.sum(anchors, 0)) / M
    bandwidth = tl.sum(x_squared_sums) / count + anchors_squared_mean - 2 * cross
    # NaN stays NaN.
    return tl.where(bandwidth < _MIN_BANDWIDTH, 0.0, -0.5 / bandwidth)


@triton.jit
def sum_values_kernel(
    q,
    q_strides,
    v,
    v_strides,
    anchors,
    weight,
    kernel_mean,
    key_mask,
    counts,
    row_sums,
    scales,
    codes,
    sums,
    num_heads,
    num_tokens,
    range_tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
):
    """Codes h, a bit each, [groups, N]; sums of ``[h, 1]^T [v, 1]``; scales [groups]."""
    group, part = tl.program_id(0), tl.program_id(1)
    num_ranges = tl.num_programs(1)
    anchors_tile, center, weight_tile, mean_tile = _load_functions(
        anchors, weight, kernel_mean, group % num_heads, D, K, M, BLOCK_D, BLOCK_K, BLOCK_M
    )
    count = _count_real(counts, group, num_heads, num_tokens)
    scale = _kernel_scale(row_sums, group, num_ranges, count, center, anchors_tile, D, M, BLOCK_D)
    if part == 0:
        tl.store(scales + group, scale)
    bits = _list_bits(codes, BLOCK_K)
    context = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    # Tiles are added up, and their tokens at the end: sums across threads cost more than sums.
    code_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    value_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    last = tl.minimum((part + 1) * range_tokens, num_tokens)
    for start in range(part * range_tokens, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < last
        is_real = _find_real(key_mask, group, num_heads, num_tokens, tokens, is_token)
        q_tile = _load_rows(q, q_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        v_tile = _load_rows(v, v_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        _exponents, _kernel, y = _project(
            q_tile,
            center,
            anchors_tile,
            weight_tile,
            mean_tile,
            scale,
            _count_parts(q),
        )
        packed = _pack(y > 0, bits)
        tl.store(codes + group.to(tl.int64) * num_tokens + tokens, packed, mask=is_token)
        h = tl.where(y > 0, 1.0, -1.0)
        context += _dot(tl.trans(h), v_tile, 1, _count_parts(v))
        code_sums += tl.where(is_real[:, None], h, 0.0)
        if IS_NORMALIZED:
            value_sums += v_tile
    # As ``find_nan`` of the other backends: signs say nothing of NaN.
    code_sum = tl.sum(code_sums, 0) + (scale + tl.sum(weight_tile) + tl.sum(mean_tile)) * 0
    sums += (group * num_ranges + part).to(tl.int64) * (K + 1) * (D + 1)
    _store_sums(sums, context, code_sum, tl.sum(value_sums, 0), 0.0, D, K, BLOCK_D, BLOCK_K)


@triton.jit
def write_output_kernel(
    v,
    v_strides,
    codes,
    key_mask,
    counts,
    sums,
    out,
    out_strides,
    num_heads,
    num_tokens,
    range_tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
):
    """The output of a range of tokens, from their codes and the sums of all."""
    group, part = tl.program_id(0), tl.program_id(1)
    sums += group.to(tl.int64) * (K + 1) * (D + 1)
    context, code_sum, value_sum, _count = _load_sums(sums, D, K, BLOCK_D, BLOCK_K)
    c: tl.constexpr = K + 1
    count = _count_real(counts, group, num_heads, num_tokens)
    bits = _list_bits(codes, BLOCK_K)
    # A column of a matrix: summed by tensor cores, codes are unpacked to factors of products only.
    code_sums = tl.where((tl.arange(0, 16) == 0)[None, :], code_sum[:, None], 0.0)
    last = tl.minimum((part + 1) * range_tokens, num_tokens)
    for start in range(part * range_tokens, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < last
        is_real = _find_real(key_mask, group, num_heads, num_tokens, tokens, is_token)
        packed = tl.load(codes + group.to(tl.int64) * num_tokens + tokens, mask=is_token, other=0)
        h = tl.where(_unpack(packed, bits), 1.0, -1.0)
        numerator = _dot(h, context, 1, 3)
        if IS_NORMALIZED:
            numerator += c * value_sum[None, :]
        else:
            numerator += c * _load_rows(v, v_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        denominator = tl.sum(_dot(h, code_sums, 1, 3), 1) + c * count
        out_tile = numerator * (1 / denominator)[:, None]
        if key_mask is not None:
            out_tile = tl.where(is_real[:, None], out_tile, 0.0)
        _store_rows(out_tile, out, out_strides, group, num_heads, tokens, is_token, D, BLOCK_D)


@triton.jit
def sum_gradients_kernel(
    grad,
    grad_strides,
    q,
    q_strides,
    v,
    v_strides,
    anchors,
    weight,
    kernel_mean,
    key_mask,
    counts,
    sums,
    scales,
    signs,
    ratios,
    grad_sums,
    num_heads,
    num_tokens,
    range_tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
    PARTS: tl.constexpr,
    SPARES_REGISTERS: tl.constexpr,
):
    """What all tokens of a range give to the gradients of all others.

    Two matrices [K + 1, D + 1] a range. The first holds ``[h, 1]^T [g, e]``: the gradients of the
    sums that all share, g and e being those of a token's numerator and denominator. The second
    holds ``u^T [v, 1]``, u being how y follows the scale; the scale's gradient is linear in the
    first, so this and the corner give it without another pass.

    What the gradients of rows need of each token is kept, [groups, 2, N]: its code, and the bits
    whose y is within 1, through which gradients pass; its inverse denominator, and e. ``PARTS`` are
    those of computed factors: gradients of 16-bit rows are rounded to less than two.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    anchors_tile, center, weight_tile, mean_tile = _load_functions(
        anchors, weight, kernel_mean, group % num_heads, D, K, M, BLOCK_D, BLOCK_K, BLOCK_M
    )
    sums += group.to(tl.int64) * (K + 1) * (D + 1)
    context, code_sum, value_sum, _count = _load_sums(sums, D, K, BLOCK_D, BLOCK_K)
    scale = tl.load(scales + group)
    count = _count_real(counts, group, num_heads, num_tokens)
    c: tl.constexpr = K + 1
    bits = _list_bits(signs, BLOCK_K)
    grad_context = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    u_values = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    # As in ``sum_values_kernel``, tokens are added up at the end.
    grad_code_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    grad_value_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    u_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    u_grads = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    last = tl.minimum((part + 1) * range_tokens, num_tokens)
    for start in tl.range(part * range_tokens, last, BLOCK_N, disable_licm=SPARES_REGISTERS):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < last
        is_real = _find_real(key_mask, group, num_heads, num_tokens, tokens, is_token)
        q_tile = _load_rows(q, q_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        exponents, kernel, y = _project(
            q_tile, center, anchors_tile, weight_tile, mean_tile, scale, _count_parts(q)
        )
        h, passes = tl.where(y > 0, 1.0, -1.0), tl.abs(y) < 1
        pointers = _token_pointers(signs, group, num_tokens, tokens)
        tl.store(pointers, _pack(y > 0, bits), mask=is_token)
        tl.store(pointers + num_tokens, _pack(passes, bits), mask=is_token)
        # Rows are loaded where they are needed: all at once take more registers than there are.
        u = _dot(exponents * kernel, tl.trans(weight_tile), PARTS, PARTS)
        u = tl.where(is_real[:, None] & passes, u, 0.0)
        u_sums += u
        v_tile = _load_rows(v, v_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        u_values += _dot(tl.trans(u), v_tile, PARTS, _count_parts(v))
        grad_tile = _load_rows(grad, grad_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        inverse = 1 / (tl.sum(h * code_sum[None, :], 1) + c * count)
        if IS_NORMALIZED:
            g_bias = tl.sum(grad_tile * value_sum[None, :], 1)
            grad_value_sums += grad_tile * inverse[:, None]
        else:
            g_bias = tl.sum(grad_tile * v_tile, 1)
        # Of the gradient as it is stored, which has fewer parts.
        g_context = _dot(grad_tile, tl.trans(context), _count_parts(grad), PARTS)
        g_context *= inverse[:, None]
        e = -(tl.sum(h * g_context, 1) + c * inverse * g_bias) * inverse
        pointers = _token_pointers(ratios, group, num_tokens, tokens)
        tl.store(pointers, inverse, mask=is_token)
        tl.store(pointers + num_tokens, e, mask=is_token)
        grad_context += _dot(tl.trans(h * inverse[:, None]), grad_tile, PARTS, _count_parts(grad))
        grad_code_sums += h * e[:, None]
        u_grads += u * (g_context + e[:, None] * code_sum[None, :])
    matrix: tl.constexpr = (K + 1) * (D + 1)
    grad_sums += (group * tl.num_programs(1) + part).to(tl.int64) * (2 * matrix)
    _store_sums(
        grad_sums,
        grad_context,
        tl.sum(grad_code_sums, 0),
        tl.sum(grad_value_sums, 0),
        tl.sum(u_grads) * _LN_2,
        D,
        K,
        BLOCK_D,
        BLOCK_K,
    )
    _store_sums(
        grad_sums + matrix,
        u_values * _LN_2,
        tl.sum(u_sums, 0) * _LN_2,
        tl.zeros([BLOCK_D], tl.float32),
        0.0,
        D,
        K,
        BLOCK_D,
        BLOCK_K,
    )


@triton.jit
def write_gradients_kernel(
    grad,
    grad_strides,
    q,
    q_strides,
    v,
    v_strides,
    anchors,
    weight,
    key_mask,
    counts,
    sums,
    scales,
    signs,
    ratios,
    grad_sums,
    grad_q,
    grad_q_strides,
    grad_v,
    grad_v_strides,
    num_heads,
    num_tokens,
    range_tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
    PARTS: tl.constexpr,
    SPARES_REGISTERS: tl.constexpr,
):
    """Gradients of a range of rows, from what ``sum_gradients_kernel`` found for all."""
    group, part = tl.program_id(0), tl.program_id(1)
    head = group % num_heads
    anchors_tile, center = _load_anchors(anchors, head, D, M, BLOCK_D, BLOCK_M)
    weight_tile = _load_matrix(weight + head * K * M, K, M, BLOCK_K, BLOCK_M, M)
    matrix: tl.constexpr = (K + 1) * (D + 1)
    sums += group.to(tl.int64) * matrix
    context, code_sum, _value_sum, _count = _load_sums(sums, D, K, BLOCK_D, BLOCK_K)
    grad_sums += group.to(tl.int64) * (2 * matrix)
    grad_context, grad_code_sum, grad_value_sum, grad_scale = _load_sums(
        grad_sums, D, K, BLOCK_D, BLOCK_K
    )
    u_values, u_sum, _zeros, _zero = _load_sums(grad_sums + matrix, D, K, BLOCK_D, BLOCK_K)
    grad_scale += tl.sum(grad_context * u_values) + tl.sum(grad_code_sum * u_sum)
    scale = tl.load(scales + group)
    # The scale is -1 / (2 s), and every distance has the same share in s.
    count = _count_real(counts, group, num_heads, num_tokens)
    share = 2 * scale * grad_scale / count / M
    bits = _list_bits(signs, BLOCK_K)
    is_anchor = (tl.arange(0, BLOCK_M) < M)[None, :]
    c: tl.constexpr = K + 1
    last = tl.minimum((part + 1) * range_tokens, num_tokens)
    for start in tl.range(part * range_tokens, last, BLOCK_N, disable_licm=SPARES_REGISTERS):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < last
        is_real = _find_real(key_mask, group, num_heads, num_tokens, tokens, is_token)
        pointers = _token_pointers(signs, group, num_tokens, tokens)
        packed = tl.load(pointers, mask=is_token, other=0)
        h = tl.where(_unpack(packed, bits), 1.0, -1.0)
        packed = tl.load(pointers + num_tokens, mask=is_token, other=0)
        passes = _unpack(packed, bits)
        pointers = _token_pointers(ratios, group, num_tokens, tokens)
        inverse = tl.load(pointers, mask=is_token, other=0.0)
        e = tl.load(pointers + num_tokens, mask=is_token, other=0.0)
        v_tile = _load_rows(v, v_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        # A code is in its own numerator and denominator, and in the sums that all share.
        grad_h = e[:, None] * code_sum[None, :] + grad_code_sum[None, :]
        grad_h += _dot(v_tile, tl.trans(grad_context), _count_parts(v), PARTS)
        grad_tile = _load_rows(grad, grad_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        g_context = _dot(grad_tile, tl.trans(context), _count_parts(grad), PARTS)
        grad_h += g_context * inverse[:, None]
        grad_v_tile = _dot(h, grad_context, 1, PARTS)
        if IS_NORMALIZED:
            grad_v_tile += c * grad_value_sum[None, :]
        else:
            grad_v_tile += (c * inverse)[:, None] * grad_tile
        if key_mask is not None:
            grad_v_tile = tl.where(is_real[:, None], grad_v_tile, 0.0)
        _store_rows(
            grad_v_tile, grad_v, grad_v_strides, group, num_heads, tokens, is_token, D, BLOCK_D
        )

        grad_y = tl.where(passes, grad_h, 0.0)
        q_tile = _load_rows(q, q_strides, group, num_heads, tokens, is_real, D, BLOCK_D)
        inverse_norms, exponents = _find_exponents(
            q_tile, center, anchors_tile, scale, _count_parts(q)
        )
        kernel = tl.exp2(exponents)
        grad_exponents = _dot(grad_y, weight_tile, PARTS, PARTS) * kernel
        grad_distances = tl.where(is_anchor, scale * grad_exponents + share, 0.0)
        # dx / 2 = along x - toward, less the centre; normalising takes the part along the row out,
        # but from rows that are too short for it.
        x = q_tile * inverse_norms[:, None]
        half_grad = tl.sum(grad_distances, 1)[:, None] * (x - center[None, :])
        half_grad -= _dot(grad_distances, anchors_tile, PARTS, PARTS)
        radial = tl.where(inverse_norms * _MIN_NORM < 1, tl.sum(x * half_grad, 1), 0.0)
        grad_q_tile = (half_grad - radial[:, None] * x) * (2 * inverse_norms)[:, None]
        if key_mask is not None:
            grad_q_tile = tl.where(is_real[:, None], grad_q_tile, 0.0)
        _store_rows(
            grad_q_tile, grad_q, grad_q_strides, group, num_heads, tokens, is_token, D, BLOCK_D
        )
