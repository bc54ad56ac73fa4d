"""A constant image makes equal rows, whose distances are 0: the fit and the run go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pvt
import twins
from ecoformer import HashConfig, fit_hash, fit_hash_functions
from ecoformer.hashing import hash_layers
from ecoformer.ops import kernelized_hash_attention
from tests.problems import draw, draw_unit_rows

MODELS: dict[str, Callable[..., nn.Module]] = {
    "pvt_v2_b0": pvt.create_model,
    "alt_gvt_small": twins.create_model,
}
# Of image 0, after normalisation; a mean-coloured image is all zeros.
COLORS = {"mean": (0.0, 0.0, 0.0), "grey": (1.3, 1.3, 1.3), "green": (-2.0, 2.5, -1.8)}


def draw_images(color: tuple[float, ...], *, are_all_constant: bool) -> Tensor:
    """Three images of 64 pixels; the first is constant, or all are."""
    images = draw(3, 3, 64, 64).float()
    images[: 3 if are_all_constant else 1] = torch.tensor(color)[:, None, None]
    return images


@pytest.mark.parametrize("color", COLORS.values(), ids=COLORS)
@pytest.mark.parametrize("are_all_constant", [False, True], ids=["first", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fits_and_trains(
    name: str, color: tuple[float, ...], are_all_constant: bool
) -> None:
    torch.manual_seed(0)
    model = MODELS[name](name, "ecoformer", num_classes=2, hashing=HashConfig(num_fit_steps=2))
    images = draw_images(color, are_all_constant=are_all_constant)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # A refit, too.
        fit_hash_functions(model, images, generator)
    for layer in hash_layers(model).values():
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
        # Kernel features are at most 1, and so is their mean.
        assert layer.kernel_mean.min() >= 0 and layer.kernel_mean.max() <= 1 + 1e-5
    out = model(images)
    out.square().sum().backward()
    assert out.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_keep_the_start_of_a_fit(dtype: torch.dtype) -> None:
    x = draw_unit_rows(1, 2, 1, 8, dtype=dtype).expand(2, 2, 40, 8)
    weight = draw(2, 6, 5).to(dtype)
    fit = fit_hash(x, anchors=x[0, :, :5], weight=weight, num_similar=3, num_steps=5)
    # All features are 1: no code can tell one token from another.
    assert torch.equal(fit.kernel_mean, torch.ones(2, 5, dtype=dtype))
    assert torch.equal(fit.weight, weight)
    assert not fit.is_changed.any()


@pytest.mark.parametrize("value_bias", ["released", "normalized"])
def test_equal_rows_attend_to_the_mean(value_bias: str) -> None:
    q, v = draw(2, 2, 1, 8).expand(2, 2, 40, 8), draw(2, 2, 40, 8, seed=1)
    x = torch.nn.functional.normalize(q, dim=-1)
    fit = fit_hash(x, anchors=x[0, :, :5], weight=draw(2, 6, 5), num_similar=3, num_steps=5)
    out = kernelized_hash_attention(
        q,
        v,
        anchors=x[0, :, :5],
        weight=fit.weight,
        kernel_mean=fit.kernel_mean,
        value_bias=value_bias,  # type: ignore[arg-type]
    )
    mean = v.mean(-2, keepdim=True)
    # K = 6 bits that all agree, and c = 7.
    expected = mean if value_bias == "normalized" else (6 * mean + 7 * v / 40) / 13
    torch.testing.assert_close(out, expected.expand_as(out))
