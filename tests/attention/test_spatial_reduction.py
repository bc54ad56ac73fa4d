"""Spatial reduction in its three forms: full, strided and pooled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ecoformer import InputError
from ecoformer.attention import SpatialReductionAttention
from tests.attention.test_softmax import attend
from tests.problems import draw

SIZE = (9, 14)  # not square, and not a multiple of 4


def build(**options: Any) -> SpatialReductionAttention:
    torch.manual_seed(0)
    return SpatialReductionAttention(12, 3, **options).double()


def draw_map() -> tuple[Tensor, Tensor]:
    """Tokens [2, 126, 12], and the same as a map [2, 12, 9, 14]."""
    x = draw(2, SIZE[0] * SIZE[1], 12)
    return x, x.mT.reshape(2, 12, *SIZE)


def as_tokens(image: Tensor) -> Tensor:
    return image.flatten(2).mT


def test_without_reduction_it_is_full_attention() -> None:
    layer, (x, _) = build(), draw_map()
    assert {name for name, _ in layer.named_children()} == {"q", "kv", "proj", "proj_drop"}
    torch.testing.assert_close(
        layer(x), layer.proj(attend(layer.q(x), *layer.kv(x).chunk(2, dim=-1)))
    )


def test_keys_come_from_a_strided_map() -> None:
    layer, (x, image) = build(sr_ratio=4), draw_map()
    assert (layer.sr.kernel_size, layer.sr.stride, layer.sr.padding) == ((4, 4), (4, 4), (0, 0))
    reduced = as_tokens(F.conv2d(image, layer.sr.weight, layer.sr.bias, stride=4))
    assert reduced.shape[1] == 2 * 3
    k, v = layer.kv(layer.norm(reduced)).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x, SIZE), layer.proj(attend(layer.q(x), k, v)))


@pytest.mark.parametrize("sr_ratio", [1, 8])
def test_the_linear_form_pools_to_seven_by_seven(sr_ratio: int) -> None:
    layer, (x, image) = build(is_linear=True, sr_ratio=sr_ratio), draw_map()
    assert layer.sr.kernel_size == (1, 1)
    pooled = F.adaptive_avg_pool2d(image, 7)
    reduced = as_tokens(F.conv2d(pooled, layer.sr.weight, layer.sr.bias))
    k, v = layer.kv(F.gelu(layer.norm(reduced))).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x, SIZE), layer.proj(attend(layer.q(x), k, v)))


def test_norm_after_the_reduction_has_its_own_epsilon() -> None:
    assert build(sr_ratio=2).norm.eps == 1e-5


def test_a_missing_size_is_said() -> None:
    with pytest.raises(InputError, match="size"):
        build(sr_ratio=2)(draw_map()[0])


def test_a_map_smaller_than_the_ratio_is_said() -> None:
    with pytest.raises(InputError, match=r"3 x 5 tokens cannot be reduced 4 times.*larger images"):
        build(sr_ratio=4)(draw(1, 15, 12), (3, 5))


@pytest.mark.parametrize(
    ("options", "num_keys"), [({}, 126), ({"sr_ratio": 4}, 6), ({"is_linear": True}, 49)]
)
def test_cost_counts_the_keys_that_a_query_sees(options: dict[str, Any], num_keys: int) -> None:
    products = 2 * 126 * num_keys * 12
    expected = (products + 3 * 126 * num_keys, products)
    assert build(**options).count_attention(126, SIZE) == expected
