"""The EcoFormer layer: its formula in full, and its cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ecoformer import EcoFormerAttention, HashConfig, InputError
from ecoformer.hashing import with_random_hash_functions
from ecoformer.ops import reference
from tests.problems import draw


def build(**hashing: Any) -> EcoFormerAttention:
    """A runnable layer of three heads with four channels."""
    torch.manual_seed(0)
    layer = EcoFormerAttention(12, 3, hashing=HashConfig(num_bits=6, num_anchors=5, **hashing))
    runnable = with_random_hash_functions(layer).double()
    assert isinstance(runnable, EcoFormerAttention)
    return runnable


@pytest.mark.parametrize("value_bias", ["released", "normalized"])
def test_the_layer_is_its_formula(value_bias: str) -> None:
    layer, x = build(value_bias=value_bias), draw(2, 15, 12)
    q, v = (
        torch.stack((x @ linear.weight.T + linear.bias).split(4, dim=-1), dim=1)
        for linear in (layer.to_qk, layer.to_v)
    )
    attended = reference.kernelized_hash_attention(
        q,
        v,
        anchors=layer.hash.anchors,
        weight=layer.hash.weight,
        kernel_mean=layer.hash.kernel_mean,
        value_bias=value_bias,
    )
    merged = torch.cat(attended.unbind(1), dim=-1)
    torch.testing.assert_close(layer(x), merged @ layer.proj.weight.T + layer.proj.bias)


def test_the_published_sizes_are_the_default() -> None:
    layer = EcoFormerAttention(32, 1)
    assert layer.hash.config == HashConfig(16, 25, 10, 100, "released")


def test_sizes_are_a_config_and_nothing_else() -> None:
    with pytest.raises(InputError, match=r"HashConfig, as .*, not a dict"):
        EcoFormerAttention(12, 3, hashing={"num_bits": 8})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "where", ["to_qk.weight", "hash.weight", "hash.anchors", "hash.kernel_mean"]
)
def test_nan_is_not_hidden_by_codes(where: str) -> None:
    layer = build()
    layer.state_dict()[where].view(-1)[2] = torch.nan
    assert layer(draw(2, 15, 12)).isnan().all()


def test_an_unfitted_layer_refuses() -> None:
    with pytest.raises(InputError, match="fit_hash_functions"):
        EcoFormerAttention(12, 3)(draw(1, 4, 12).float())


def test_cost_is_the_released_formula() -> None:
    heads, tokens, dim, bits, anchors = 3, 10, 4, 6, 5
    mul = 2 * anchors + anchors * bits + bits + 1 + dim
    add = 2 * anchors * dim + anchors * bits + 2 * bits + 2 * bits * dim + dim
    assert build().count_attention(tokens) == (heads * tokens * mul, heads * tokens * add)
