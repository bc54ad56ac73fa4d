"""Window attention against full attention under a mask, on maps that windows divide and not."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ecoformer.attention import WindowAttention
from ecoformer.attention.base import Size
from ecoformer.errors import InputError

DIVIDED = [(7, 7), (14, 21)]
# Wider than high and back, smaller than a window, and one token over.
UNDIVIDED = [(8, 14), (15, 10), (3, 5), (1, 22), (8, 8)]


def window_of_tokens(size: Size, side: int = 7) -> Tensor:
    """A number a token, equal where two share a window: [N]."""
    rows, columns = torch.meshgrid(
        *(torch.arange(length) // side for length in size), indexing="ij"
    )
    return (rows * 1000 + columns).flatten()


def attend_densely(layer: WindowAttention, x: Tensor, size: Size) -> Tensor:
    """The same attention over all pairs, of which those in different windows are masked."""
    window = window_of_tokens(size, layer.window_size)
    q, k, v = layer.split_heads(*layer.qkv(x).chunk(3, dim=-1))
    mask = window[:, None] == window
    heads = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return layer.proj(rearrange(heads, "b h n d -> b n (h d)"))


@pytest.fixture
def layer() -> WindowAttention:
    torch.manual_seed(0)
    return WindowAttention(12, 3).double()


@pytest.mark.parametrize("size", DIVIDED + UNDIVIDED)
def test_output_and_gradients_equal_dense_attention(layer: WindowAttention, size: Size) -> None:
    x = torch.randn(2, size[0] * size[1], 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    parameters = [x, *layer.parameters()]
    out, expected = layer(x, size), attend_densely(layer, x, size)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for actual, truth in zip(
        torch.autograd.grad(out, parameters, grad),
        torch.autograd.grad(expected, parameters, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)


def test_other_window_sizes(layer: WindowAttention) -> None:
    layer.window_size = 4
    x = torch.randn(1, 30, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, (5, 6)), attend_densely(layer, x, (5, 6)))


def test_whole_windows_do_not_feel_the_padding(layer: WindowAttention) -> None:
    image = torch.randn(1, 12, 17, 16, dtype=torch.float64)
    padded = layer(rearrange(image, "b c h w -> b (h w) c"), (17, 16))
    whole = rearrange(padded, "b (h w) c -> b h w c", h=17)[:, :14, :14].flatten(1, 2)
    inside = rearrange(image[:, :, :14, :14], "b c h w -> b (h w) c")
    torch.testing.assert_close(whole, layer(inside, (14, 14)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", DIVIDED + UNDIVIDED)
def test_cost_counts_the_pairs_of_a_window(layer: WindowAttention, size: Size) -> None:
    window = window_of_tokens(size)
    num_pairs = int((window[:, None] == window).sum())
    num_tokens = size[0] * size[1]
    if size in DIVIDED:
        assert num_pairs == num_tokens * 49
    expected = (2 * num_pairs * 12 + 3 * num_pairs, 2 * num_pairs * 12)
    assert layer.count_attention(num_tokens, size) == expected


def test_size_is_asked_for(layer: WindowAttention) -> None:
    with pytest.raises(InputError, match=r"map's size: call layer\(x, \(height, width\)\)"):
        layer(torch.zeros(1, 49, 12, dtype=torch.float64))
    with pytest.raises(InputError, match="map's size"):
        layer.count_attention(49)
