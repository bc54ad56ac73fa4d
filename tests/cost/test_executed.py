"""The count of what hardware executes, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ecoformer.attention import EcoFormerAttention, SoftmaxAttention
from ecoformer.cost.executed import count_added_codes, count_executed
from ecoformer.hash_config import HashConfig
from ecoformer.ops.backends.native import library


class Tokens(nn.Module):
    """An attention layer over the values of an image, 12 a token."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.reshape(1, -1, 12)
        return self.attention(x, (1, x.shape[1]))


def test_executed_products_are_those_of_the_shapes() -> None:
    convolution = nn.Conv2d(3, 6, kernel_size=3, padding=1)
    assert count_executed(convolution, 8) == 3 * 3 * 3 * 6 * 8 * 8
    num_tokens, width = 3 * 8 * 8 // 12, 12
    softmax = Tokens(SoftmaxAttention(width, 2))
    assert count_executed(softmax, 8) == 4 * num_tokens * width**2 + 2 * num_tokens**2 * width


@pytest.mark.parametrize("in_chans", [1, 4])
def test_the_image_has_the_channels_that_the_model_takes(in_chans: int) -> None:
    convolution = nn.Conv2d(in_chans, 6, kernel_size=3, padding=1)
    assert count_executed(convolution, (4, 8)) == in_chans * 3 * 3 * 6 * 4 * 8


def test_products_with_codes_are_executed_too() -> None:
    num_tokens, width, heads, bits, anchors = 3 * 8 * 8 // 12, 12, 2, 5, 7
    hashing = HashConfig(num_bits=bits, num_anchors=anchors)
    layer = Tokens(EcoFormerAttention(width, heads, hashing=hashing))
    distances = heads * num_tokens * anchors * (width // heads)
    to_bits = heads * num_tokens * anchors * bits
    through_codes = heads * num_tokens * 2 * bits * (width // heads + 1)
    projections = 3 * num_tokens * width**2
    assert count_executed(layer, 8) == projections + distances + to_bits + through_codes


def test_additions_stand_for_products_with_codes_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = Tokens(EcoFormerAttention(12, 2, hashing=HashConfig(num_bits=16, num_anchors=7)))
    num_values = 2 * (3 * 8 * 8 // 12) * (12 // 2 + 1)
    if not library.load():
        # Three digits of 5 or 6 bits make a code.
        assert count_added_codes(layer, 8) == (2 * num_values * 16, 2 * num_values * 3)
    monkeypatch.setattr(library, "_reason", "no g++")
    assert count_added_codes(layer, 8) == (0, 0)
