"""The slow truth: every operation written as its formula, dense and literal.

For tests and benchmarks. It builds the [B, H, N, M, D] differences and the N x N matrices that the
shipped operations avoid; those, of the same names, say more about arguments. Where layouts differ,
tokens come before features here.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors, T similar pairs. A key mask
is [B, N], bool, true for a real token; rows of masked tokens have to be finite here.

Source: EcoFormer, arXiv 2209.09004, and the released implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_rows(x: Tensor) -> Tensor:
    """Divide each row [..., D] by its L2 norm, or by 1e-12 where that is larger."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def kernel_features(x: Tensor, anchors: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Kernel of rows [B, H, N, D] and anchors [H, M, D], float: [B, H, N, M]."""
    differences = x[:, :, :, None, :] - anchors[None, :, None, :, :]  # [B, H, N, M, D]
    distances = differences.square().sum(-1)  # [B, H, N, M]
    if key_mask is None:
        bandwidth = distances.mean((2, 3), keepdim=True)  # [B, H, 1, 1]
    else:
        real = key_mask[:, None, :, None].to(x.dtype)  # [B, 1, N, 1]
        num_real = real.sum(2, keepdim=True).clamp_min(1)
        bandwidth = (real * distances).mean(3, keepdim=True).sum(2, keepdim=True) / num_real
    # Where every row equals every anchor, 0 / 0 is taken for 0: the features are 1.
    bandwidth = bandwidth.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    return torch.exp(-distances / (2 * bandwidth))


class _ClippedSign(torch.autograd.Function):
    """+1 where positive, else -1, NaN where it is NaN; the gradient passes where -1 < y < 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return torch.where(y > 0, torch.ones_like(y), -torch.ones_like(y)) + 0 * y

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.where((y > -1) & (y < 1), grad, torch.zeros_like(grad))


def encode(
    x: Tensor,
    *,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Codes [B, H, N, K] in {-1, +1} of unit rows [B, H, N, D]; straight-through gradient."""
    features = kernel_features(x, anchors, key_mask) - kernel_mean[None, :, None, :]
    return _ClippedSign.apply(torch.einsum("bhnm,hkm->bhnk", features, weight))


def hash_attention(
    codes: Tensor,
    v: Tensor,
    value_bias: str = "released",
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend to v [B, H, N, D] with similarity ``h_i . h_j + c`` of codes [B, H, N, K]."""
    c = codes.shape[-1] + 1
    keys = 1 if key_mask is None else key_mask[:, None, None, :].to(v.dtype)
    dots = codes @ codes.transpose(-1, -2) * keys  # [B, H, N, N]
    similarity = dots + c * keys
    # Only where no token is real it is not positive, but 0.
    denominator = similarity.sum(-1, keepdim=True).clamp_min(1)
    numerator = dots @ v + c * v if value_bias == "released" else similarity @ v
    out = numerator / denominator
    return out if key_mask is None else out.masked_fill(~key_mask[:, None, :, None], 0)


def kernelized_hash_attention(
    q: Tensor,
    v: Tensor,
    *,
    anchors: Tensor,
    weight: Tensor,
    kernel_mean: Tensor,
    value_bias: str = "released",
    key_mask: Tensor | None = None,
) -> Tensor:
    """Normalise raw rows q [B, H, N, D], encode them, and attend to v [B, H, N, D]."""
    x = normalize_rows(q)
    codes = encode(x, anchors=anchors, weight=weight, kernel_mean=kernel_mean, key_mask=key_mask)
    return hash_attention(codes, v, value_bias, key_mask=key_mask)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """Convolve maps [B, H, W, C], tap by tap; weight [C, 1, 3, 3], bias [C]."""
    height, width = x.shape[1:3]
    taken = x.clamp_min(0) if form == "relu gelu" else x
    padded = torch.nn.functional.pad(taken, (0, 0, 1, 1, 1, 1))
    out = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for i in range(3):
        for j in range(3):
            out = out + weight[:, 0, i, j] * padded[:, i : i + height, j : j + width]
    out = x + out if form == "residual" else out * (1 + torch.erf(out / 2**0.5)) / 2
    return out.to(x.dtype)


def similarity_targets(x: Tensor, num_similar: int, key_mask: Tensor | None = None) -> Tensor:
    """+1 at the T tokens most similar to each, -1 at the T least similar, else 0: [B, H, N, N].

    Not symmetric. T is N // 2 where N < 2 T, N being the number of real tokens of an image.
    """
    if key_mask is not None:
        targets = x.new_zeros(*x.shape[:3], x.shape[2])
        for rows, square, mask in zip(x, targets, key_mask, strict=True):
            (real,) = mask.nonzero(as_tuple=True)
            square[:, real[:, None], real] = similarity_targets(rows[None, :, real], num_similar)[0]
        return targets
    similarities = x @ x.transpose(-1, -2)
    num_similar = min(num_similar, x.shape[-2] // 2)
    targets = torch.zeros_like(similarities)
    targets.scatter_(-1, similarities.topk(num_similar).indices, 1.0)
    targets.scatter_(-1, similarities.topk(num_similar, largest=False).indices, -1.0)
    return targets


def fit_hash(
    x: Tensor,
    *,
    anchors: Tensor,
    weight: Tensor,
    num_similar: int = 10,
    num_steps: int = 100,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Learn weight [H, K, M] and kernel mean [H, M], one bit after the other, on dense targets.

    Every image needs a real token.
    """
    num_bits = weight.shape[1]
    real = x.new_ones(len(x), 1, x.shape[2]) if key_mask is None else key_mask[:, None].to(x.dtype)
    num_real = real.sum(-1)  # [B, 1]
    features = kernel_features(x, anchors, key_mask)
    kernel_mean = (real.unsqueeze(-1) * features).sum(2).div(num_real.unsqueeze(-1)).mean(0)
    features = features - kernel_mean[None, :, None, :]
    residual = num_bits * similarity_targets(x, num_similar, key_mask)
    learned = weight.clone()

    def objective(codes: Tensor, residual: Tensor) -> Tensor:
        agreement = torch.einsum("bhn,bhnl,bhl->bh", codes, residual, codes)
        return -(agreement / (num_real * num_bits)).mean()

    def project(row: Tensor) -> Tensor:
        return real * torch.einsum("bhnm,hm->bhn", features, row)

    def hard_codes(row: Tensor) -> Tensor:
        projection = project(row)
        return real * torch.where(
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
