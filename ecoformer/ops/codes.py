"""From rows to binary codes: normalise, kernel features, sign.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors. Features [B, H, M, N] and
codes [B, H, K, N] have their tokens last: element-wise passes along thousands of contiguous values
take half the time on a CPU of passes along 16 or 25.

Source: EcoFormer, arXiv 2209.09004.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ecoformer.ops.masks import check_key_mask, count_real, hide
from ecoformer.ops.precision import as_full_precision, without_autocast

# What normalisation divides by at least.
MIN_NORM = 1e-12


def normalize_rows(x: Tensor) -> Tensor:
    """Divide each row [..., D] by max(its L2 norm, 1e-12), in float32, or float64 where it is."""
    return torch.nn.functional.normalize(as_full_precision(x), dim=-1, eps=MIN_NORM)


def kernel_features(x: Tensor, anchors: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Gaussian kernel between rows and anchors, with the mean squared distance as bandwidth.

    The distances come from ``|x|^2 + |a|^2 - 2 x.a`` and their mean from the means of rows and
    anchors: no [B, H, N, M, D] tensor is built. The bandwidth is differentiated through.

    Args:
        x: [B, H, N, D], float32 or float64. Unit rows or zero rows: their length is counted.
        anchors: [H, M, D], the dtype of ``x``.
        key_mask: [B, N], bool; the mean is over the distances of real tokens.

    Returns:
        [B, H, M, N], the mean not subtracted; all 1 where every row equals every anchor. Those of
        masked tokens mean nothing.
    """
    # Squares of about 1 would cancel where rows are alike, and leave rounding.
    center = anchor_center(anchors)
    x, anchors = x - center, anchors - center
    if key_mask is not None:
        x = hide(x, key_mask)
    x_squared = torch.linalg.vector_norm(x, dim=-1).square().unsqueeze(-2)  # [B, H, 1, N]
    anchors_squared = anchors.square().sum(-1, keepdim=True)  # [H, M, 1]
    if key_mask is None:
        x_mean, x_squared_mean = x.mean(-2, keepdim=True), x_squared.mean(-1, keepdim=True)
    else:
        num_real = count_real(key_mask, x.dtype)
        x_mean = x.sum(-2, keepdim=True) / num_real
        x_squared_mean = x_squared.sum(-1, keepdim=True) / num_real
    scale = kernel_scale(x_mean, x_squared_mean, anchors)
    # Accumulated in place; the scale is folded into the smaller factor of the product.
    exponents = x_squared * scale + anchors_squared * scale
    exponents.flatten(0, 1).baddbmm_((anchors * (-2 * scale)).flatten(0, 1), x.mT.flatten(0, 1))
    return exponents.exp_()


def anchor_center(anchors: Tensor) -> Tensor:
    """Mean over the anchors [H, M, D], [H, 1, D]; equal ones have it without rounding."""
    first = anchors[:, :1]
    return first + (anchors - first).mean(-2, keepdim=True)


def kernel_scale(x_mean: Tensor, x_squared_mean: Tensor, anchors: Tensor) -> Tensor:
    """``-1 / (2 s)`` [B, H, 1, 1], s being the mean squared distance between rows and anchors.

    From the mean row [B, H, 1, D], the mean of ``|x|^2`` [B, H, 1, 1], and the anchors [H, M, D].
    """
    anchors_mean = anchors.mean(-2, keepdim=True)
    anchors_squared_sum = anchors.square().sum((-2, -1), keepdim=True)
    cross = (x_mean * anchors_mean).sum(-1, keepdim=True)
    bandwidth = torch.add(x_squared_mean, anchors_squared_sum, alpha=1 / anchors.shape[-2])
    bandwidth = torch.sub(bandwidth, cross, alpha=2)
    # The literal form is 0 / 0 where all distances are 0. Its gradient has the square of this
    # bound as a divisor, which therefore is a normal number.
    return -0.5 / bandwidth.clamp_min(torch.finfo(bandwidth.dtype).tiny ** 0.5)


def binarize(y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return +1 where y > 0, else -1, never 0, in the dtype of ``y``; ``out`` may be ``y``."""
    # Arithmetic in y's own dtype: torch.where takes ten times as long on a CPU.
    out = torch.gt(y, 0, out=torch.empty_like(y) if out is None else out)
    return torch.add(out.new_full((), -1), out, alpha=2, out=out)


def find_nan(scale: Tensor, weight: Tensor, kernel_mean: Tensor) -> Tensor:
    """0 [B, H], but NaN where rows or anchors, by their scale [B, H], or functions are not finite.

    A sign says nothing of NaN: what is summed over codes adds this.
    """
    return (scale + (weight @ kernel_mean.unsqueeze(-1)).sum((-2, -1))) * 0


class _SignStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor) -> tuple[Tensor, Tensor]:
        # NaN stays NaN. One byte a value is kept for the backward pass, not y itself.
        return binarize(y).add_(y, alpha=0), y.abs() < 1

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        passes = output[1]
        ctx.mark_non_differentiable(passes)
        ctx.save_for_backward(passes)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> Tensor:
        (passes,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * passes

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int], y: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        (dim,) = in_dims
        return _SignStraightThrough.apply(y), (dim, dim)


def sign_straight_through(y: Tensor) -> Tensor:
    """``binarize`` whose gradient passes where -1 < y < 1 and is 0 elsewhere; NaN stays NaN.

    Source: clipped straight-through estimator, Hubara et al., arXiv 1602.02830.
    """
    return _SignStraightThrough.apply(y)[0]


def encode(
    x: Tensor,
    *,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Binary codes of unit rows, with a straight-through gradient.

    Args:
        x: [B, H, N, D], float, unit rows (see ``normalize_rows``).
        anchors: [H, M, D], float, unit rows.
        weight: [H, K, M], float.
        kernel_mean: [H, M], float, mean kernel feature stored at the fit.
        key_mask: [B, N], bool, true for a real token; None where all are.

    Returns:
        [B, H, N, K] in {-1, +1}, float32, or float64 where ``x`` is. A transposed view of memory
        that runs along the tokens. Codes of masked tokens mean nothing. NaN of rows or functions
        is NaN in the codes that it reaches.

    Raises:
        InputError: a ``key_mask`` of another shape or dtype.
    """
    x = as_full_precision(x)
    if key_mask is not None:
        check_key_mask(key_mask, x)
    with without_autocast(x):
        features = kernel_features(x, anchors.to(x.dtype), key_mask)
        features = features - kernel_mean.to(x.dtype).unsqueeze(-1)
        return sign_straight_through(weight.to(x.dtype) @ features).mT
