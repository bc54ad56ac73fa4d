"""Learning the hash functions from the attention map of one calibration batch.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors, T similar pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ecoformer.errors import NonFiniteError
from ecoformer.hashing.targets import SimilarityTargets
from ecoformer.ops import as_full_precision, binarize, kernel_features, without_autocast
from ecoformer.ops.masks import check_key_mask, hide
from ecoformer.threads import one_thread

_LEARNING_RATE = 5e-4
_MOMENTUM = 0.9
# Kernel features that two threads take in no less time than one: 51,200 in 0.96 of it, 156,800 in
# 0.75 of it. Eight images of 224 px have 196,000 and more in each layer of PVTv2-B0.
_SMALL = 2**17


@dataclass(frozen=True)
class HashFit:
    """Learned hash functions of one layer, float32, or float64 where the rows were."""

    weight: Tensor  # [H, K, M]
    kernel_mean: Tensor  # [H, M], mean kernel feature over tokens, then images
    is_changed: Tensor  # [K], bool, the bits whose rows moved from where they started


@torch.no_grad()
def fit_hash(
    x: Tensor,
    *,
    anchors: Tensor,
    weight: Tensor,
    num_similar: int = 10,
    num_steps: int = 100,
    key_mask: Tensor | None = None,
) -> HashFit:
    """Learn the hash functions greedily, one bit after the other, for all heads together.

    Each bit maximises ``y^T P y`` over ``y = tanh(kappa w / 2)``; its new row is kept only if the
    hard codes are strictly better with it. ``P`` starts as the similarity targets and loses
    ``y y^T`` with every bit, so later bits correct earlier ones. It is never built: its sparse
    start and the codes so far give its products in O(N T + N K) time and memory.

    Args:
        x: [B, H, N, D], float, unit rows.
        anchors: [H, M, D], float, unit rows.
        weight: [H, K, M], float, the rows that the fit starts from.
        num_similar: T; N // 2 is used where N < 2 T.
        num_steps: steps a bit of SGD with Nesterov momentum 0.9 and learning rate 5e-4.
        key_mask: [B, N], bool, true for a real token; None where all are. Masked tokens, and images
            of nothing else, are as if they were not there; N is that of an image.

    Raises:
        ValueError: fewer than two tokens in every image, or ``num_similar`` below 1.
        InputError: a ``key_mask`` of another shape or dtype.
        NonFiniteError: a learned row is not finite.

    Source: EcoFormer, arXiv 2209.09004; constants from the released implementation.
    """
    num_tokens, x, real = x.shape[-2], as_full_precision(x), None
    if key_mask is not None:
        check_key_mask(key_mask, x)
        is_there = key_mask.any(-1)
        x, key_mask = hide(x, key_mask)[is_there], key_mask[is_there]
        real = rearrange(key_mask.to(x.dtype), "b n -> b 1 n")
        num_tokens = int(key_mask.sum(-1).max()) if len(x) else 0
    if num_tokens < 2:
        raise ValueError(f"the fit compares tokens with each other and needs 2, not {num_tokens}")
    if num_similar < 1:
        raise ValueError(f"num_similar must be at least 1, not {num_similar}")
    with without_autocast(x):
        features = kernel_features(x, anchors.to(x.dtype), key_mask)  # [B, H, M, N]
        if real is None:
            kernel_mean = features.mean(-1).mean(0)  # [H, M]
        else:
            means = (features * real.unsqueeze(-2)).sum(-1) / real.sum(-1, keepdim=True)
            kernel_mean = means.mean(0)
        features -= kernel_mean.unsqueeze(-1)
        targets = SimilarityTargets.from_rows(x, min(num_similar, num_tokens // 2), key_mask)
        with one_thread(if_small=features.numel() < _SMALL):
            learned, is_changed = _fit_bits(features, targets, weight.to(x.dtype), num_steps, real)
    if not (learned.isfinite().all() & kernel_mean.isfinite().all()):
        raise NonFiniteError("the hash fit gave a row that is not finite")
    return HashFit(learned, kernel_mean, is_changed)


def _fit_bits(
    features: Tensor,
    targets: SimilarityTargets,
    weight: Tensor,
    num_steps: int,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fit all bits in turn. No step waits for the device.

    ``real`` [B, 1, N] is 1 for a real token and 0 for a masked one; None where all are real.
    """
    num_images, num_heads, _, num_tokens = features.shape
    num_bits = weight.shape[1]
    # An image counts by the mean of its tokens: by more than 1 where others have more of them.
    shares, most_tokens = None, num_tokens
    if real is not None:
        # So y, too, is 0 at masked tokens.
        features *= rearrange(real, "b 1 n -> b 1 1 n")
        num_real = real.sum(-1, keepdim=True)  # [B, 1, 1]
        most_tokens = int(num_real.max())
        shares = most_tokens / num_real
    learned = weight.clone()
    is_changed = torch.zeros(num_bits, dtype=torch.bool, device=weight.device)
    # Codes of the bits so far; each has taken its own outer product from P.
    codes = features.new_zeros(num_images, num_heads, num_bits, num_tokens)
    # d(mean over images and heads of -y^T P y / (N K)) / d(y^T P y), and d tanh(z / 2) / dz.
    slope = -0.5 / (num_images * num_heads * most_tokens * num_bits)

    for bit in range(num_bits):
        earlier = codes[:, :, :bit]  # [B, H, bit, N]
        old = learned[:, bit]  # [H, M]
        new, velocity = old.clone(), torch.zeros_like(old)
        for _ in range(num_steps):
            y = _project(features, new).div_(2).tanh_()  # [B, H, N]
            pull = targets.multiply(y).mul_(num_bits)
            # Vectors stand on the left of products: on a CPU, a column takes six times as long.
            overlap = y.unsqueeze(-2) @ earlier.transpose(-1, -2)  # [B, H, 1, bit]
            pull -= (overlap @ earlier).squeeze(-2).mul_(2)
            pull *= y.square_().neg_().add_(1)
            if shares is not None:
                pull *= shares
            gradient = pull.unsqueeze(-2) @ features.transpose(-1, -2)  # [B, H, 1, M]
            gradient = gradient.squeeze(-2).sum(0).mul_(slope)  # [H, M]
            velocity.mul_(_MOMENTUM).add_(gradient)
            new.sub_(gradient.add_(velocity, alpha=_MOMENTUM), alpha=_LEARNING_RATE)
        new_codes, old_codes = (binarize(_project(features, row)) for row in (new, old))
        if real is not None:
            new_codes, old_codes = new_codes * real, old_codes * real
        new_agreement, old_agreement = (
            _agreement(bits, targets, earlier, num_bits, shares) for bits in (new_codes, old_codes)
        )
        is_better = new_agreement > old_agreement
        is_changed[bit] = is_better
        learned[:, bit] = torch.where(is_better, new, old)
        codes[:, :, bit] = torch.where(is_better, new_codes, old_codes)
    return learned, is_changed


def _project(features: Tensor, row: Tensor) -> Tensor:
    """[B, H, M, N] features and an [H, M] row give [B, H, N]."""
    return (row.unsqueeze(-2) @ features).squeeze(-2)


def _agreement(
    codes: Tensor,
    targets: SimilarityTargets,
    earlier: Tensor,
    num_bits: int,
    shares: Tensor | None = None,
) -> Tensor:
    """``y^T P y`` of hard codes, summed over images and heads: in float64, as it can pass 2^24.

    An image counts ``shares`` [B, 1, 1] times, once where None: integers then, and exact.
    """
    codes, earlier = codes.double(), earlier.double()
    similarity = num_bits * (codes * targets.multiply(codes)).sum(-1) / 2  # [B, H]
    agreement = similarity - (earlier @ codes.unsqueeze(-1)).square().sum((-2, -1))
    return (agreement if shares is None else agreement * shares.squeeze(-1)).sum()
