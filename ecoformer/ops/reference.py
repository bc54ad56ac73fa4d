"""The slow truth: every operation written as its formula, dense and literal.

Nothing here is fast, and nothing here is used outside tests and benchmarks. It builds the
[B, H, N, M, D] differences and the N x N matrices that the shipped operations avoid.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors, T similar pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_rows(x: Tensor) -> Tensor:
    """Divide each row by its L2 norm, or by 1e-12 where that is larger.

    Args:
        x: [..., D], float.

    Returns:
        [..., D], the dtype of ``x``.

    Source: EcoFormer, arXiv 2209.09004.
    """
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def kernel_features(x: Tensor, anchors: Tensor) -> Tensor:
    """Gaussian kernel between rows and anchors, with the mean squared distance as bandwidth.

    Args:
        x: [B, H, N, D], float, unit rows.
        anchors: [H, M, D], float.

    Returns:
        [B, H, N, M], not centred.

    Source: EcoFormer; bandwidth from the released implementation.
    """
    differences = x[:, :, :, None, :] - anchors[None, :, None, :, :]  # [B, H, N, M, D]
    distances = differences.square().sum(-1)  # [B, H, N, M]
    bandwidth = distances.mean((2, 3), keepdim=True)  # [B, H, 1, 1]
    # Where every row equals every anchor, 0 / 0 stands for 0: the features are 1.
    bandwidth = bandwidth.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    return torch.exp(-distances / (2 * bandwidth))


class _ClippedSign(torch.autograd.Function):
    """+1 where positive, else -1; the gradient passes where -1 < y < 1."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.where(y > 0, torch.ones_like(y), -torch.ones_like(y))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.where((y > -1) & (y < 1), grad, torch.zeros_like(grad))


def encode(x: Tensor, *, anchors: Tensor, weight: Tensor, kernel_mean: Tensor) -> Tensor:
    """Binary codes of unit rows, with a straight-through gradient.

    Args:
        x: [B, H, N, D], float, unit rows.
        anchors: [H, M, D], float.
        weight: [H, K, M], float.
        kernel_mean: [H, M], float.

    Returns:
        [B, H, N, K] in {-1, +1}.

    Source: EcoFormer.
    """
    features = kernel_features(x, anchors) - kernel_mean[None, :, None, :]
    return _ClippedSign.apply(torch.einsum("bhnm,hkm->bhnk", features, weight))


def hash_attention(codes: Tensor, v: Tensor, value_bias: str = "released") -> Tensor:
    """Attention with similarity ``h_i . h_j + c``, from the N x N matrix of similarities.

    Args:
        codes: [B, H, N, K] in {-1, +1}.
        v: [B, H, N, D], float.
        value_bias: ``"released"`` adds ``c v_i`` to the numerator, ``"normalized"`` adds
            ``c`` times the sum of all values.

    Returns:
        [B, H, N, D].

    Source: EcoFormer; the released implementation for ``"released"``.
    """
    c = codes.shape[-1] + 1
    dots = codes @ codes.transpose(-1, -2)  # [B, H, N, N]
    denominator = (dots + c).sum(-1, keepdim=True)
    if value_bias == "released":
        return (dots @ v + c * v) / denominator
    return ((dots + c) @ v) / denominator


def kernelized_hash_attention(
    q: Tensor,
    v: Tensor,
    *,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    value_bias: str = "released",
) -> Tensor:
    """Normalise raw rows, encode them and attend.

    Args:
        q: [B, H, N, D], float, raw rows of the shared query-key projection.
        v: [B, H, N, D], float.
        anchors: [H, M, D], float.
        weight: [H, K, M], float.
        kernel_mean: [H, M], float.
        value_bias: as for ``hash_attention``.

    Returns:
        [B, H, N, D].

    Source: EcoFormer.
    """
    codes = encode(normalize_rows(q), anchors=anchors, weight=weight, kernel_mean=kernel_mean)
    return hash_attention(codes, v, value_bias)


def similarity_targets(x: Tensor, num_similar: int) -> Tensor:
    """+1 for each token's most similar tokens, -1 for its least similar, else 0.

    Args:
        x: [B, H, N, D], float, unit rows.
        num_similar: T; N // 2 where N < 2 T.

    Returns:
        [B, H, N, N], not symmetric.

    Source: EcoFormer.
    """
    similarities = x @ x.transpose(-1, -2)
    num_similar = min(num_similar, x.shape[-2] // 2)
    targets = torch.zeros_like(similarities)
    targets.scatter_(-1, similarities.topk(num_similar).indices, 1.0)
    targets.scatter_(-1, similarities.topk(num_similar, largest=False).indices, -1.0)
    return targets


def fit_hash(
    x: Tensor, *, anchors: Tensor, weight: Tensor, num_similar: int = 10, num_steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Learn the hash functions greedily, one bit after the other, on dense targets.

    Args:
        x: [B, H, N, D], float, unit rows.
        anchors: [H, M, D], float.
        weight: [H, K, M], float, where each bit starts.
        num_similar: T.
        num_steps: optimiser steps a bit.

    Returns:
        The learned weight [H, K, M] and the kernel mean [H, M].

    Source: EcoFormer and the released implementation.
    """
    num_tokens, num_bits = x.shape[-2], weight.shape[1]
    features = kernel_features(x, anchors)
    kernel_mean = features.mean(2).mean(0)  # [H, M]
    features = features - kernel_mean[None, :, None, :]
    residual = num_bits * similarity_targets(x, num_similar)
    learned = weight.clone()

    def objective(codes: Tensor, residual: Tensor) -> Tensor:
        agreement = torch.einsum("bhn,bhnl,bhl->bh", codes, residual, codes)
        return -(agreement / (num_tokens * num_bits)).mean()

    def project(row: Tensor) -> Tensor:
        return torch.einsum("bhnm,hm->bhn", features, row)

    def hard_codes(row: Tensor) -> Tensor:
        projection = project(row)
        return torch.where(
            projection > 0, torch.ones_like(projection), -torch.ones_like(projection)
        )

    for bit in range(num_bits):
        old = learned[:, bit].clone()
        new = old.clone().requires_grad_()
        optimizer = torch.optim.SGD([new], lr=5e-4, momentum=0.9, nesterov=True)
        for _ in range(num_steps):
            optimizer.zero_grad()
            objective(torch.tanh(project(new) / 2), residual).backward()
            optimizer.step()
        new = new.detach()
        exact = residual.double()
        is_better = objective(hard_codes(new).double(), exact) < objective(
            hard_codes(old).double(), exact
        )
        learned[:, bit] = new if is_better else old
        codes = hard_codes(learned[:, bit])
        residual = residual - codes[..., :, None] * codes[..., None, :]
    return learned, kernel_mean
