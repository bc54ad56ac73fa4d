"""Kernelized hash attention and its gradient in blocks that stay in the cache, for the CPU.

What is made of rows (features, codes, copies in one type) lives for one block, and the gradient
makes it again: memory beside the result does not grow with the batch, and no time goes into
clearing pages. A block is some images, or a larger one alone, read in parts and chunks.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors; a block has b of the B
images, each cut into P parts of n tokens, and G = b H P. Features and codes have tokens last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, log
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ecoformer.ops.backends.base import FusedBackend, HashFunctions, empty_rows
from ecoformer.ops.codes import MIN_NORM, anchor_center, binarize, find_nan, kernel_scale
from ecoformer.ops.masks import count_real

# Of a block, over all images and heads. A row becomes a few hundred bytes, which together should
# fit the cache that cores share; a block costs some hundred microseconds of small operations.
_ROWS_PER_THREAD = 16384
# What an image of one head may have without being cut into parts.
_MAX_WHOLE_TOKENS = 4096
# Mean squared distance, 0 to 4, below which it matters that squares of about 1 cancel.
_MIN_BANDWIDTH = 2**-6


class BlockedBackend(FusedBackend):
    """Written for the CPU; any device runs it."""

    name = "blocked"

    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        return True

    def forward(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, num_bits = empty_rows(v), functions.weight.shape[-2]
        sums = functions.weight.new_zeros(*q.shape[:2], num_bits + 1, v.shape[-1] + 1)
        scale = sums.new_empty(q.shape[:2])
        for mask, block in _blocks(key_mask, q, v, out, sums, scale):
            _forward_block(*block, functions=functions, is_normalized=is_normalized, key_mask=mask)
        return out, sums, scale

    def backward(
        self,
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
        grad_q, grad_v = empty_rows(q), empty_rows(v)
        for mask, block in _blocks(key_mask, grad, q, v, sums, scale, grad_q, grad_v):
            _backward_block(*block, functions=functions, is_normalized=is_normalized, key_mask=mask)
        return grad_q, grad_v


def _forward_block(
    q: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    scale: Tensor,
    *,
    functions: HashFunctions,
    is_normalized: bool,
    key_mask: Tensor | None,
) -> None:
    dtype, c = functions.weight.dtype, functions.weight.shape[-2] + 1
    num_parts, chunk = _cut(q)
    mask = _Mask.of(key_mask, q, dtype, num_parts)
    rows, values = _Rows.of(_flatten(q, dtype, num_parts), mask), _flatten(v, dtype, num_parts)
    if mask is not None:
        values = mask.hide(values)
    num_real = q.shape[-2] if mask is None else mask.num_real
    rows.measure_scale(functions.anchors, num_parts, out=scale)
    if _is_narrow(scale):
        rows, functions = _move_to_center(rows, functions, num_parts)
        rows.measure_scale(functions.anchors, num_parts, out=scale)
    encoder = _Encoder.of(functions, scale, num_parts)
    totals = _split_sums(sums)
    context, code_sum, value_sum = totals
    code_sum += find_nan(scale, functions.weight, functions.kernel_mean).view(-1, 1, 1)
    codes = []
    for rows_chunk, v_chunk in zip(rows.split(chunk), _split(values, chunk, -2), strict=True):
        h = encoder.encode(rows_chunk)  # [G, K, chunk]
        if rows_chunk.mask is not None:
            h *= rows_chunk.mask.real
        context += _gather(torch.bmm(h, v_chunk), num_parts)
        code_sum += _gather(h.sum(-1, keepdim=True), num_parts)
        # Those of a large image are kept as bytes.
        codes.append(h.to(torch.int8) if chunk < values.shape[-2] else h)
    if is_normalized:
        value_sum += _gather(values.sum(-2, keepdim=True), num_parts)
    context, code_sum, value_sum = (_share(total, num_parts) for total in totals)
    out_parts = out.view(*q.shape[:2], num_parts, *values.shape[1:])
    masks = _split_mask(mask, chunk, len(codes))
    chunks = zip(codes, _split(values, chunk, -2), _split(out_parts, chunk, -2), masks, strict=True)
    # Backwards: what was read last may still be in the cache.
    for h, v_chunk, out_chunk, chunk_mask in reversed(list(chunks)):
        h = h.to(dtype)
        # Where the heads of a token do not lie between others, nothing is copied.
        is_direct = out_chunk.shape[1] == 1 and out_chunk.dtype == dtype
        place = out_chunk.flatten(0, 2) if is_direct else None
        numerator = torch.bmm(h.mT, context, out=place)
        numerator.add_(value_sum if is_normalized else v_chunk, alpha=c)
        inverse = torch.bmm(code_sum.mT, h).add_(c * num_real).reciprocal_()
        if chunk_mask is not None:
            inverse *= chunk_mask.real
        numerator *= inverse.mT
        if not is_direct:
            out_chunk.copy_(numerator.view(out_chunk.shape))


def _backward_block(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    sums: Tensor,
    scale: Tensor,
    grad_q: Tensor,
    grad_v: Tensor,
    *,
    functions: HashFunctions,
    is_normalized: bool,
    key_mask: Tensor | None,
) -> None:
    """g and e are the gradients of numerators and denominators."""
    num_bits, num_anchors = functions.weight.shape[-2:]
    dtype, c = functions.weight.dtype, num_bits + 1
    mask = _Mask.of(key_mask, q, dtype)
    num_real = q.shape[-2] if mask is None else mask.num_real
    rows = raw_rows = _Rows.of(_flatten(q, dtype), mask)
    values, out_grad = _flatten(v, dtype), _flatten(grad, dtype)
    if mask is not None:
        values, out_grad = mask.hide(values), mask.hide(out_grad)
    if _is_narrow(scale):
        rows, functions = _move_to_center(rows, functions)
    encoder = _Encoder.of(functions, scale)
    context, code_sum, value_sum = _split_sums(sums)
    exponents = encoder.exponents(rows)
    features = exponents.exp2()  # [G, M, N]
    y = torch.bmm(encoder.weight, features - encoder.kernel_mean)
    h = binarize(y)  # [G, K, N]
    # As numbers: with booleans the product below takes five times as long.
    passes = torch.lt(y.abs_(), 1, out=y)
    if mask is not None:
        h *= mask.real
        passes *= mask.real

    denominator = torch.bmm(code_sum.mT, h).add_(c * num_real)  # [G, 1, N]
    g = out_grad / denominator.mT  # [G, N, D]
    g_context = torch.bmm(context, g.mT)  # [G, K, N]
    e = (h * g_context).sum(-2, keepdim=True)
    e += c * _row_sums(g * (value_sum if is_normalized else values))
    e.div_(denominator).neg_()  # [G, 1, N]

    grad_context = torch.bmm(h, g)  # [G, K, D]
    grad_bias = g.sum(-2, keepdim=True) if is_normalized else g
    grad_values = torch.bmm(h.mT, grad_context).add_(grad_bias, alpha=c)
    if mask is not None:
        grad_values *= mask.real.mT
    grad_v.copy_(grad_values.view(v.shape))

    # A code is in its own numerator and denominator, and in the sums that all share.
    grad_h = g_context.addcmul_(code_sum, e)
    grad_h.baddbmm_(grad_context, values.mT)
    grad_h.add_(torch.bmm(h, e.mT))
    grad_y = grad_h.mul_(passes)

    # Of exponents of base e.
    grad_exponents = torch.bmm(encoder.weight.mT, grad_y).mul_(features)
    # The scale is -1 / (2 s), and every distance has the same share in s.
    grad_scale = log(2) * torch.linalg.vecdot(grad_exponents.flatten(1), exponents.flatten(1))
    scale = scale.view(-1, 1, 1)
    share = 2 * scale * grad_scale[:, None, None] / (num_real * num_anchors)
    if mask is not None:
        share = share * mask.real
    grad_distances = grad_exponents.mul_(scale).add_(share)
    half_grad = rows.backward(grad_distances, _repeat(functions.anchors, len(q)))
    grad_q.copy_(raw_rows.backward_of_norm(half_grad).view(q.shape))


class _Mask(NamedTuple):
    """Real tokens as numbers, by which codes are multiplied."""

    real: Tensor  # [G, 1, n], 1 for a real token and 0 for a masked one
    num_real: Tensor  # [G, 1, 1], at least 1

    @classmethod
    def of(
        cls, key_mask: Tensor | None, q: Tensor, dtype: torch.dtype, num_parts: int = 1
    ) -> _Mask | None:
        """From a mask [b, N] of rows [b, H, N, D]."""
        if key_mask is None:
            return None
        counts = count_real(key_mask, dtype).expand(-1, q.shape[1], -1, -1).flatten(0, 1)
        real = key_mask.to(dtype)[:, None, None].expand(-1, q.shape[1], -1, -1).flatten(0, 1)
        real = rearrange(real, "g 1 (parts n) -> (g parts) 1 n", parts=num_parts)
        return cls(real, _share(counts, num_parts))

    def hide(self, rows: Tensor) -> Tensor:
        """Make masked rows of [G, n, D] 0, whatever they hold."""
        return rows.masked_fill(self.real.mT == 0, 0)


def _split_mask(mask: _Mask | None, num_tokens: int, num_chunks: int) -> Sequence[_Mask | None]:
    if mask is None:
        return [None] * num_chunks
    return [mask._replace(real=real) for real in _split(mask.real, num_tokens, -1)]


class _Rows(NamedTuple):
    """Rows to be multiplied by ``inverse_norms``, and their squared norms after that."""

    q: Tensor  # [G, n, D]; 0 where masked
    inverse_norms: Tensor  # [G, 1, n]
    x_squared: Tensor  # [G, 1, n]
    mask: _Mask | None = None

    @classmethod
    def of(cls, q: Tensor, mask: _Mask | None = None) -> _Rows:
        """Make unit rows of raw ones."""
        if mask is not None:
            q = mask.hide(q)
        norms = torch.linalg.vector_norm(q, dim=-1).unsqueeze(-2)
        inverse_norms = norms.clamp_min(MIN_NORM).reciprocal_()
        # A row with an infinite norm is a zero row, as where each is divided by it.
        if not inverse_norms.all():
            q = torch.where(inverse_norms.mT == 0, q * 0, q)
        return cls(q, inverse_norms, norms.mul_(inverse_norms).nan_to_num_(0).square_(), mask)

    def move(self, center: Tensor) -> _Rows:
        """Subtract a center [G, 1, D] from unit rows."""
        # With the bits of ``normalize_rows``: a row that became an anchor is at no distance.
        norms = torch.linalg.vector_norm(self.q, dim=-1, keepdim=True).clamp_min_(MIN_NORM)
        x = torch.addcdiv(-center, self.q, norms)
        if self.mask is not None:
            x *= self.mask.real.mT
        x_squared = torch.linalg.vector_norm(x, dim=-1).square_().unsqueeze(-2)
        return _Rows(x, torch.ones_like(x_squared), x_squared, self.mask)

    def split(self, num_tokens: int) -> Iterator[_Rows]:
        rows = _split(self.q, num_tokens, -2)
        for parts in zip(
            rows,
            _split(self.inverse_norms, num_tokens, -1),
            _split(self.x_squared, num_tokens, -1),
            _split_mask(self.mask, num_tokens, len(rows)),
            strict=True,
        ):
            yield _Rows(*parts)

    def measure_scale(self, anchors: Tensor, num_parts: int, *, out: Tensor) -> None:
        """``kernel_scale`` [b, H] of whole images, with anchors [H, M, D]."""
        num_tokens = self.q.shape[-2] * num_parts
        x_sum = _gather(torch.bmm(self.inverse_norms, self.q), num_parts).unflatten(0, out.shape)
        x_squared = self.x_squared.view(*out.shape, 1, num_tokens)
        if self.mask is None:
            x_mean, x_squared_mean = x_sum / num_tokens, x_squared.mean(-1, keepdim=True)
        else:
            num_real = self.mask.num_real[::num_parts].unflatten(0, out.shape)
            x_mean, x_squared_mean = x_sum / num_real, x_squared.sum(-1, keepdim=True) / num_real
        out.copy_(kernel_scale(x_mean, x_squared_mean, anchors).view(out.shape))

    def backward(self, grad_distances: Tensor, anchors: Tensor) -> Tensor:
        """Half the gradient of multiplied rows, from that of distances [G, M, n] to anchors."""
        away = torch.bmm(grad_distances.mT, -anchors)
        along = grad_distances.sum(-2, keepdim=True)
        return away.addcmul_(self.q, (along * self.inverse_norms).mT)

    def backward_of_norm(self, half_grad: Tensor) -> Tensor:
        """The gradient of raw rows, in the place of half that of their unit rows [G, n, D]."""
        # Normalising takes the part along the row out, but from rows that are too short for it.
        is_unit = self.inverse_norms * MIN_NORM < 1
        radial = _row_sums(self.q * half_grad) * self.inverse_norms.square() * is_unit
        half_grad.addcmul_(self.q, radial.mT, value=-1)
        return half_grad.mul_(2 * self.inverse_norms.mT)


class _Encoder(NamedTuple):
    """Hash functions as products take them: a CPU raises base 2 three times as fast as base e."""

    scale: Tensor  # [G, 1, 1], of base 2
    anchors: Tensor  # [G, M, D], times -2 scale
    anchors_squared: Tensor  # [G, M, 1], squared norms times scale
    weight: Tensor  # [G, K, M]
    kernel_mean: Tensor  # [G, M, 1]

    @classmethod
    def of(cls, functions: HashFunctions, scale: Tensor, num_parts: int = 1) -> _Encoder:
        """Scale [b, H], of base e."""
        anchors, weight, kernel_mean = (
            _share(_repeat(x, len(scale)), num_parts) for x in functions
        )
        scale = _share(scale.view(-1, 1, 1), num_parts) / log(2)
        return cls(
            scale,
            anchors * (-2 * scale),
            anchors.square().sum(-1, keepdim=True) * scale,
            weight,
            kernel_mean.unsqueeze(-1),
        )

    def exponents(self, rows: _Rows) -> Tensor:
        """Return [G, M, n], of base 2."""
        products = torch.bmm(self.anchors, rows.q.mT)
        squares = rows.x_squared * self.scale + self.anchors_squared
        return torch.addcmul(squares, products, rows.inverse_norms, out=products)

    def encode(self, rows: _Rows) -> Tensor:
        """Return codes [G, K, n]."""
        features = self.exponents(rows).exp2_()
        features -= self.kernel_mean
        y = torch.bmm(self.weight, features)
        return binarize(y, out=y)


def _is_narrow(scale: Tensor) -> bool:
    """Tell whether rows and anchors are so alike that their distances cancel."""
    if scale.device.type != "cpu":
        # Moving costs a tenth of the forward; a look would wait for the device.
        return True
    return scale.numel() > 0 and scale.min().item() < -0.5 / _MIN_BANDWIDTH


def _move_to_center(
    rows: _Rows, functions: HashFunctions, num_parts: int = 1
) -> tuple[_Rows, HashFunctions]:
    """Subtract the mean anchor from unit rows and anchors, which changes no distance."""
    center = anchor_center(functions.anchors)
    num_images = len(rows.q) // (len(center) * num_parts)
    rows = rows.move(_share(_repeat(center, num_images), num_parts))
    return rows, functions._replace(anchors=functions.anchors - center)


def _repeat(x: Tensor, num_images: int) -> Tensor:
    """[H, ...] to [b H, ...]."""
    return x.expand(num_images, *x.shape).flatten(0, 1)


def _flatten(x: Tensor, dtype: torch.dtype, num_parts: int = 1) -> Tensor:
    """[b, H, P n, D] to [G, n, D], in ``dtype``."""
    num_images, num_heads, num_tokens, head_dim = x.shape
    shape = num_images * num_heads * num_parts, num_tokens // num_parts, head_dim
    return x.reshape(shape).to(dtype)


def _cut(x: Tensor) -> tuple[int, int]:
    """Choose the number of parts of an image [b, H, N, D], and of tokens that a part reads at once.

    The features of a long image of one head would lie a large power of two apart, and meet in the
    same lines of the cache: hence eight parts, or one a thread, where that divides N. Of an image
    that is larger than a block, half a block is read at once, which leaves room for its codes.
    """
    _, num_heads, num_tokens, _ = x.shape
    num_threads = torch.get_num_threads()
    is_long = num_heads == 1 and num_tokens > _MAX_WHOLE_TOKENS
    num_parts = gcd(num_tokens, max(8, num_threads)) if is_long else 1
    num_rows = _ROWS_PER_THREAD * num_threads
    if num_heads * num_tokens <= num_rows:
        return num_parts, num_tokens // num_parts
    return num_parts, max(1, num_rows // (2 * num_heads * num_parts))


def _share(x: Tensor, num_parts: int) -> Tensor:
    """[G / P, ...] to [G, ...]: give each part what its image has."""
    return x if num_parts == 1 else x.repeat_interleave(num_parts, 0)


def _gather(x: Tensor, num_parts: int) -> Tensor:
    """[G, ...] to [G / P, ...]: add up the parts of an image."""
    return x if num_parts == 1 else x.unflatten(0, (-1, num_parts)).sum(1)


def _split(x: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    """Spare small tensors ``x.split``, which takes longer than a small product."""
    return x.split(size, dim) if x.shape[dim] > size else (x,)


def _row_sums(x: Tensor) -> Tensor:
    """[G, n, D] to [G, 1, n]; as a product, which is faster than a sum so short."""
    return (x @ x.new_ones(x.shape[-1])).unsqueeze(-2)


def _split_sums(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [b, H, ., .]: sums of h^T v [b H, K, D], of h^T [b H, K, 1], of v [b H, 1, D]."""
    sums = sums.flatten(0, 1)
    return sums[:, :-1, :-1], sums[:, :-1, -1:], sums[:, -1:, :-1]


def _blocks(
    key_mask: Tensor | None, *tensors: Tensor
) -> Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]:
    """Split a mask and tensors [B, ...] into the images of a block; the first tensor holds rows."""
    _, num_heads, num_tokens, _ = tensors[0].shape
    # The same number for each thread, so that none waits.
    num_images = _ROWS_PER_THREAD // max(1, num_heads * num_tokens) * torch.get_num_threads()
    blocks = list(zip(*(_split(x, max(1, num_images), 0) for x in tensors), strict=True))
    masks: Sequence[Tensor | None] = [None] * len(blocks)
    if key_mask is not None:
        masks = _split(key_mask, max(1, num_images), 0)
    return zip(masks, blocks, strict=True)
