"""The fit with a key mask: that of the real tokens alone."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecoformer import EcoFormerAttention, HashConfig, InputError, fit_hash, fit_hash_functions
from ecoformer.hashing import hash_layers
from ecoformer.hashing.targets import SimilarityTargets
from ecoformer.models.base import Block
from ecoformer.models.mlp import Mlp
from ecoformer.ops import normalize_rows, reference
from tests.problems import draw, draw_mask, draw_unit_rows

SETTINGS: dict[str, Any] = {"num_similar": 5, "num_steps": 30}


def scatter(rows: Tensor, mask: Tensor, contents: float = float("nan")) -> Tensor:
    """Put [B, H, n, D] where a mask [B, N] of n real tokens an image is true."""
    padded = rows.new_full((*rows.shape[:2], mask.shape[1], rows.shape[3]), contents)
    for image, row, real in zip(padded, rows, mask, strict=True):
        image[:, real] = row
    return padded


def draw_start(heads: int = 2, anchors: int = 8, dim: int = 8) -> dict[str, Any]:
    """The functions that a fit starts from."""
    return {
        "anchors": draw_unit_rows(1, heads, anchors, dim, seed=3)[0],
        "weight": draw(heads, 6, anchors, seed=1),
    }


def choose_mask(images: int, tokens: int, num_real: int) -> Tensor:
    """As many real tokens in every image, anywhere."""
    order = torch.rand(images, tokens, generator=torch.Generator().manual_seed(0)).argsort(1)
    return order < num_real


@pytest.mark.parametrize("num_real", [2, 3, 9, 10, 31])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_equals_unpadded(num_real: int, dtype: torch.dtype) -> None:
    x = draw_unit_rows(3, 2, num_real, 8, dtype=dtype)
    mask = choose_mask(3, 40, num_real)
    fit = fit_hash(scatter(x, mask), **draw_start(), **SETTINGS, key_mask=mask)
    alone = fit_hash(x, **draw_start(), **SETTINGS)
    assert_close(fit.weight, alone.weight, rtol=1e-5, atol=1e-5)
    assert_close(fit.kernel_mean, alone.kernel_mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(fit.is_changed, alone.is_changed)


@pytest.mark.parametrize("seed", range(12))
def test_images_differ_in_their_real_tokens(seed: int) -> None:
    choose = random.Random(seed)
    images, heads, tokens = choose.randint(1, 4), choose.randint(1, 3), choose.randint(3, 30)
    x = draw_unit_rows(images, heads, tokens, 8, seed=seed)
    mask = draw_mask(images, tokens, ratio=choose.choice([0.2, 0.5, 0.9]), seed=seed)
    # One image with two tokens to compare; none without any, which the dense form cannot take.
    mask[:, 0] = mask[0, :2] = True
    x = x.masked_fill(~mask[:, None, :, None], 0)
    start = draw_start(heads)
    fit = fit_hash(x, **start, **SETTINGS, key_mask=mask)
    weight, kernel_mean = reference.fit_hash(x, **start, **SETTINGS, key_mask=mask)
    assert_close(fit.weight, weight, rtol=1e-10, atol=1e-12)
    assert_close(fit.kernel_mean, kernel_mean, rtol=1e-12, atol=1e-12)


def test_images_without_a_real_token_are_not_there() -> None:
    x, mask = draw_unit_rows(4, 2, 20, 8), draw_mask(4, 20)
    mask[1] = mask[3] = False
    fit = fit_hash(x, **draw_start(), **SETTINGS, key_mask=mask)
    fewer = fit_hash(x[::2], **draw_start(), **SETTINGS, key_mask=mask[::2])
    assert torch.equal(fit.weight, fewer.weight)
    assert torch.equal(fit.kernel_mean, fewer.kernel_mean)


@pytest.mark.parametrize("has_mkl", [True, False])
def test_an_image_takes_half_of_its_real_tokens_where_they_are_few(
    has_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    x, mask = (
        draw_unit_rows(5, 2, 20, 8),
        torch.arange(20) < torch.tensor([20, 9, 4, 1, 0])[:, None],
    )
    y = draw(5, 2, 20, seed=1)
    product = SimilarityTargets.from_rows(x, 5, mask).multiply(y)
    for image, (num_real, num_similar) in enumerate([(20, 5), (9, 4), (4, 2)]):
        rows = x[image, None, :, :num_real]
        dense = reference.similarity_targets(rows, num_similar)
        expected = (dense + dense.mT) @ y[image, None, :, :num_real, None]
        assert_close(product[image, :, :num_real], expected[0, ..., 0])
        assert not product[image, :, num_real:].any()
    # One token has nobody to compare with.
    assert not product[3:].any()


def test_too_few_tokens_and_another_mask_are_errors() -> None:
    x = draw_unit_rows(3, 2, 20, 8)
    for mask in (torch.arange(20).expand(3, 20) < 1, torch.zeros(3, 20, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"needs 2, not [01]"):
            fit_hash(x, **draw_start(), key_mask=mask)
    with pytest.raises(InputError, match=r"\[3, 20\] here, not \[20\]"):
        fit_hash(x, **draw_start(), key_mask=mask[0])


HASHING = HashConfig(num_bits=4, num_anchors=6, num_similar=3, num_fit_steps=10)


class Encoder(nn.Module):
    """Two blocks over sequences of 12 channels, as somebody's own model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(12, EcoFormerAttention(12, 3, hashing=HASHING), Mlp(12, 24)) for _ in range(2)
        )
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, key_mask=mask)
        return tokens


def fit(inputs: Any, seed: int = 0) -> Encoder:
    """A fresh model in eval mode, fitted."""
    model = Encoder().eval()
    fit_hash_functions(model, inputs, torch.Generator().manual_seed(seed))
    return model


def test_a_model_is_fitted_on_the_real_tokens() -> None:
    mask = choose_mask(3, 25, 14)
    sequences = draw(3, 14, 12).float()
    padded = scatter(sequences[:, None], mask, 5.0)[:, 0]
    alone = fit(sequences)
    for inputs in ((padded, mask), {"tokens": padded, "mask": mask}):
        model = fit(inputs)
        for name, layer in hash_layers(model).items():
            expected = hash_layers(alone)[name]
            for buffer in ("weight", "kernel_mean", "anchors"):
                assert_close(
                    getattr(layer, buffer), getattr(expected, buffer), rtol=1e-5, atol=1e-5
                )
        with torch.no_grad():
            out = model(padded, mask)
            assert_close(out[mask].view(3, 14, 12), alone(sequences), rtol=1e-5, atol=1e-5)


def test_anchors_are_real_tokens_of_as_few_images_as_hold_enough() -> None:
    x = draw(4, 10, 12).float()
    # Six anchors: image 0 has four real tokens, 1 none, 2 three, 3 all.
    mask = torch.arange(10) < torch.tensor([4, 0, 3, 10])[:, None]
    mask = mask.flip(1)
    seen = set()
    for seed in range(10):
        model = fit((x, mask), seed)
        block = model.blocks[0]
        assert isinstance(block, Block) and isinstance(block.attn, EcoFormerAttention)
        rows = block.attn.to_qk(block.norm1(x)).view(4, 10, 3, 4)
        tokens = normalize_rows(rows).permute(2, 0, 1, 3).flatten(1, 2)  # [H, B N, D]
        anchors = hash_layers(model)["blocks.0.attn.hash"].anchors
        places = torch.cdist(anchors, tokens).argmin(-1)
        assert torch.equal(places[0], places[1]) and len(set(places[0].tolist())) == 6
        seen |= set(places[0].tolist())
    assert seen == set(mask[:3].flatten().nonzero().flatten().tolist())


def test_fewer_real_tokens_than_anchors_are_an_error() -> None:
    mask = torch.arange(10).expand(2, 10) < 2
    message = r"^blocks\.0\.attn\.hash: 4 real tokens in 2 images are fewer than the 6 anchors; fit"
    with pytest.raises(InputError, match=message):
        fit((draw(2, 10, 12).float(), mask))


def test_few_real_tokens_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x = draw(2, 10, 12).float()
    with caplog.at_level(logging.INFO, "ecoformer"):
        fit((x, torch.ones(2, 10, dtype=torch.bool)))
        assert not caplog.records
        fit((x, torch.arange(10).expand(2, 10) < torch.tensor([[10], [5]])))
        (message,) = (record.getMessage() for record in caplog.records)
    assert "blocks.0.attn.hash" in message and "blocks.1.attn.hash" in message
