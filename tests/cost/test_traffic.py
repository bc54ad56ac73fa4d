"""Memory traffic, by hand: weights once a batch, inputs and outputs once, maps where not fused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ecoformer import EcoFormerAttention, count_cost
from ecoformer.attention import (
    MultiHeadAttention,
    PerformerAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
    WindowAttention,
)
from ecoformer.cost import Cost, LayerCost
from ecoformer.hash_config import HashConfig

# A map of 8 x 12 tokens of 12 channels, 2 heads.
SIZE, TOKENS, WIDTH, HEADS = (8, 12), 96, 12, 2


class Tokens(nn.Module):
    """An attention layer over the pixels of an image of 12 channels."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.stem = nn.Conv2d(WIDTH, WIDTH, kernel_size=1)
        self.attn = attention

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        return self.attn(x, tuple(images.shape[2:]))


def find_layer(cost: Cost, name: str) -> LayerCost:
    (layer,) = (layer for layer in cost.layers if layer.name == name)
    return layer


def count_attention(attention: MultiHeadAttention) -> tuple[int, int, int]:
    """Weights, values and map values of the attention alone."""
    layer = find_layer(count_cost(Tokens(attention), SIZE), "attn")
    return layer.num_weights, layer.num_values, layer.num_map_values


def test_a_convolution_a_linear_layer_and_a_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, kernel_size=3, stride=2, padding=1),  # 3 x 8 x 12 to 5 x 4 x 6
        nn.Flatten(2),
        nn.Linear(24, 7),
        nn.LayerNorm(7),
    )
    cost = count_cost(model, SIZE)
    assert [(layer.num_weights, layer.num_values) for layer in cost.layers] == [
        (5 * 3 * 9 + 5, 3 * 8 * 12 + 5 * 4 * 6),
        (24 * 7 + 7, 5 * 24 + 5 * 7),
        (2 * 7, 2 * 5 * 7),
    ]


def test_softmax_reads_three_projections_and_has_a_map_a_head() -> None:
    assert count_attention(SoftmaxAttention(WIDTH, HEADS)) == (
        0,
        4 * TOKENS * WIDTH,
        HEADS * TOKENS**2,
    )


def test_codes_have_no_map() -> None:
    layer = EcoFormerAttention(WIDTH, HEADS, hashing=HashConfig(num_bits=5, num_anchors=7))
    functions = HEADS * (5 * 7 + 7 + 7 * WIDTH // HEADS)
    assert count_attention(layer) == (functions, 3 * TOKENS * WIDTH, 0)


def test_random_features_have_no_map() -> None:
    layer = PerformerAttention(WIDTH, HEADS)
    num_features = layer.fast_attention.projection_matrix.numel()
    assert count_attention(layer) == (num_features, 4 * TOKENS * WIDTH, 0)


def test_reduced_keys_are_read_and_mapped_once() -> None:
    num_keys = TOKENS // 4
    assert count_attention(SpatialReductionAttention(WIDTH, HEADS, sr_ratio=2)) == (
        0,
        (2 * TOKENS + 2 * num_keys) * WIDTH,
        HEADS * TOKENS * num_keys,
    )


def test_windows_have_small_maps_padding_included() -> None:
    # 2 x 2 windows of 49 tokens cover the map.
    assert count_attention(WindowAttention(WIDTH, HEADS)) == (
        0,
        4 * TOKENS * WIDTH,
        HEADS * 4 * 49**2,
    )


@pytest.mark.parametrize(("value_bytes", "batch_size"), [(4, 1), (2, 8)])
def test_bytes_of_a_whole_model(value_bytes: int, batch_size: int) -> None:
    cost = count_cost(Tokens(SoftmaxAttention(WIDTH, HEADS)), SIZE)
    weights = (WIDTH + 1) * (WIDTH + 3 * WIDTH + WIDTH)
    stem, qkv, attention, proj = 2, 4, 4, 2
    values = TOKENS * WIDTH * (stem + qkv + attention + proj)
    fused = value_bytes * (weights / batch_size + values)
    maps = value_bytes * 2 * HEADS * TOKENS**2
    assert cost.traffic_bytes(value_bytes, batch_size=batch_size) == fused
    assert cost.traffic_bytes(value_bytes, batch_size=batch_size, with_maps=True) == fused + maps


def test_maps_of_a_folded_batch_count_as_often_as_they_are_made() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = SoftmaxAttention(3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.attn(images.flatten(2).mT.reshape(2, -1, 3))

    layer = find_layer(count_cost(Folded(), (4, 6)), "attn")
    assert (layer.num_values, layer.num_map_values) == (4 * 24 * 3, 2 * 12**2)


def test_a_layer_called_by_keyword_is_counted() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, images: Tensor) -> Tensor:
            return torch.sigmoid(self.norm(input=images))

    (layer,) = count_cost(Named(), (4, 6)).layers
    assert layer.num_values == 2 * 3 * 4 * 6
