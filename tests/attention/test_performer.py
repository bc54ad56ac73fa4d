"""Performer attention: released figures, its formula, and its random features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecoformer.attention import PerformerAttention
from ecoformer.attention.performer import RandomFeatureAttention, draw_orthogonal_features
from tests.golden.fill import fill, images
from tests.problems import draw


def test_output_of_the_released_layer(golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "performer_attention.json").read_text())
    layer = PerformerAttention(golden["dim"], golden["num_heads"])
    state = {name: torch.from_numpy(fill(name, tuple(s))) for name, s in golden["keys"].items()}
    layer.load_state_dict(state)
    out = layer(torch.from_numpy(images(golden["seed"], golden["shape"])))
    assert (out - torch.tensor(golden["output"])).abs().max() <= 1e-5


def attend(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """The formula with its N x N matrix of kernel values."""

    def features(rows: Tensor, *, is_query: bool) -> Tensor:
        rows = rows / rows.shape[-1] ** 0.25
        exponent = rows @ projection.T
        largest = exponent.max(-1, keepdim=True).values if is_query else exponent.max()
        exponent = exponent - (rows**2).sum(-1, keepdim=True) / 2 - largest
        return (exponent.exp() + 1e-4) / len(projection) ** 0.5

    kernel = features(q, is_query=True) @ features(k, is_query=False).mT
    return kernel / kernel.sum(-1, keepdim=True) @ v


def test_attention_is_its_formula() -> None:
    layer = RandomFeatureAttention(8, torch.Generator().manual_seed(0)).double()
    q, k, v = (draw(2, 3, 15, 8, seed=seed) for seed in range(3))
    expected = attend(q, k, v, layer.projection_matrix)
    torch.testing.assert_close(layer(q, k, v), expected, rtol=1e-10, atol=1e-12)


def test_features_are_orthogonal_inside_a_block() -> None:
    features = draw_orthogonal_features(20, 8, torch.Generator().manual_seed(0))
    assert features.shape == (20, 8)
    for block in features.split(8):
        products = block @ block.T
        off_diagonal = products - products.diag().diag()
        assert off_diagonal.abs().max() < 1e-5


def test_lengths_of_features_are_those_of_gaussian_vectors() -> None:
    lengths = draw_orthogonal_features(4000, 8, torch.Generator().manual_seed(0)).norm(dim=1)
    assert lengths.square().mean().item() == pytest.approx(8, rel=0.05)
    assert lengths.std() > 0.5


def test_the_generator_decides() -> None:
    first, second, other = (
        PerformerAttention(16, 2, generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (1, 1, 2)
    )
    name = "fast_attention.projection_matrix"
    assert first[name].shape == (16, 8)  # int(8 ln 8) features
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_autocast_leaves_the_kernel_in_full_precision() -> None:
    layer = RandomFeatureAttention(8)
    q, k, v = (draw(2, 3, 15, 8, seed=seed).float() for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(q, k, v), layer(q.float(), k.float(), v.float()))
        inside = layer(q, k, v)
    assert torch.equal(inside, layer(q, k, v))


def test_cost_counts_the_products() -> None:
    heads, tokens, dim, features = 2, 10, 8, 16
    each = tokens * features * (2 * dim + 2 * dim + 2)
    assert PerformerAttention(16, heads).count_attention(tokens) == (heads * each, heads * each)
