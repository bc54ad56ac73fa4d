"""Linear attention over binary codes. Shapes: B batch, H heads, N tokens, D head dim, K bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ecoformer.hash_config import ValueBias, check_value_bias
from ecoformer.ops.masks import check_key_mask, count_real, hide
from ecoformer.ops.precision import compute_dtype, without_autocast


def hash_attention(
    codes: Tensor,
    v: Tensor,
    value_bias: ValueBias = "released",
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend with similarity ``h_i . h_j + c``, ``c = K + 1``, in time linear in N.

    Args:
        codes: [B, H, N, K] in {-1, +1}, float.
        v: [B, H, N, D], float.
        value_bias: "released" adds ``c v_i`` to the numerator, as every released checkpoint was
            trained with; "normalized" adds ``c sum_j v_j``: a true weighted mean of the values.
        key_mask: [B, N], bool, true for a real token; None where all are.

    Returns:
        [B, H, N, D], the dtype of ``v``; summed in float32, or float64 where an input is. That of
        the real tokens alone, and 0 for masked ones.

    Raises:
        InputError: another ``value_bias``; a ``key_mask`` of another shape or dtype.

    Source: EcoFormer, arXiv 2209.09004.
    """
    check_value_bias(value_bias)
    num_tokens, num_bits = codes.shape[-2:]
    c = num_bits + 1
    dtype = compute_dtype(codes, v)
    values, codes = v.to(dtype), codes.to(dtype)
    num_real: int | Tensor = num_tokens
    if key_mask is not None:
        check_key_mask(key_mask, v)
        values, codes = hide(values, key_mask), hide(codes, key_mask)
        num_real = count_real(key_mask, dtype)
    with without_autocast(v):
        code_sum = codes.sum(-2).unsqueeze(-1)  # [B, H, K, 1]
        code_value_sum = codes.transpose(-1, -2) @ values  # [B, H, K, D]
        bias = values if value_bias == "released" else values.sum(-2, keepdim=True)
        numerator = (codes @ code_value_sum).add_(bias, alpha=c)
        denominator = (codes @ code_sum).add_(c * num_real)  # [B, H, N, 1]
        out = numerator.div_(denominator).to(v.dtype)
        return out if key_mask is None else hide(out, key_mask)


def hash_attention_weights(
    codes: Tensor,
    queries: Tensor,
    value_bias: ValueBias = "released",
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Weights that ``hash_attention`` gives to all values at some queries, without N x N.

    ``(weights @ v)[..., i, :]`` is its output at token ``queries[i]``. Each row sums to 1 under
    the normalized bias; weights can be negative under the released one. From and to a masked token
    they are 0.

    Args:
        codes: [B, H, N, K] in {-1, +1}, float.
        queries: [Q], int64, tokens.
        value_bias, key_mask: as for ``hash_attention``.

    Returns:
        [B, H, Q, N], float32, or float64 where ``codes`` are.

    Raises:
        InputError: as by ``hash_attention``.
    """
    check_value_bias(value_bias)
    num_tokens, num_bits = codes.shape[-2:]
    c = num_bits + 1
    codes = codes.to(compute_dtype(codes))
    num_real: int | Tensor = num_tokens
    if key_mask is not None:
        check_key_mask(key_mask, codes)
        codes, num_real = hide(codes, key_mask), count_real(key_mask, codes.dtype)
    with without_autocast(codes):
        dots = codes[..., queries, :] @ codes.mT
        total = dots.sum(-1, keepdim=True) + c * num_real
        if value_bias == "normalized":
            weights = (dots + c) / total
        else:
            own = queries.unsqueeze(-1) == torch.arange(num_tokens, device=codes.device)
            weights = (dots + c * own) / total
    if key_mask is None:
        return weights
    is_real = key_mask[:, queries, None] & key_mask[:, None]  # [B, Q, N]
    return weights.masked_fill(~is_real.unsqueeze(1), 0)
