"""Softmax kinds against their formula with the N x N matrix written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ecoformer.attention import SharedQKAttention, SoftmaxAttention
from tests.problems import draw


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three heads of four channels, one after the other: [B, N, 12] each."""
    parts = zip(q.split(4, -1), k.split(4, -1), v.split(4, -1), strict=True)
    return torch.cat([(a @ b.mT / 2).softmax(-1) @ c for a, b, c in parts], dim=-1)


def test_queries_keys_and_values_are_thirds_of_one_projection() -> None:
    layer, x = SoftmaxAttention(12, 3).double(), draw(2, 15, 12)
    thirds = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=-1)
    torch.testing.assert_close(layer(x), layer.proj(attend(*thirds)))


def test_shared_rows_are_queries_and_keys_not_normalised() -> None:
    layer, x = SharedQKAttention(12, 3).double(), draw(2, 15, 12)
    rows = layer.to_qk(x)
    torch.testing.assert_close(layer(x), layer.proj(attend(rows, rows, layer.to_v(x))))


def test_cost_is_the_released_formula() -> None:
    mul, add = 2 * 10**2 * 12 + 3 * 10**2, 2 * 10**2 * 12
    for kind in (SoftmaxAttention, SharedQKAttention):
        assert kind(12, 3).count_attention(10) == (mul, add)
