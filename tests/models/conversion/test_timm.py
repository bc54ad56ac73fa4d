"""timm's layers and models: a converted one computes what the original did, but for codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.layers.attention import Attention
from timm.models import (
    convit,
    eva,
    fastvit,
    hiera,
    hieradet_sam2,
    metaformer,
    nextvit,
    pvt_v2,
    tnt,
    twins,
    visformer,
    volo,
)
from torch import Tensor, nn

import ecoformer
from ecoformer import InputError
from tests.models.conversion.doubles import assert_wired

TOKENS, ROWS_LAST, ROWS_FIRST = (2, 12, 32), (2, 3, 4, 32), (2, 32, 3, 4)
NORMS: dict[str, Any] = {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm}
# Two of the twelve tokens have no position; a head has 8 channels.
ROTATION = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "vit": (lambda: Attention(32, 4, qkv_bias=True), TOKENS, {}),
    "vit without biases": (lambda: Attention(32, 4, proj_bias=False), TOKENS, {}),
    "vit with norms and a gate": (lambda: Attention(32, 4, **NORMS, gated=True), TOKENS, {}),
    "vit with wider heads": (lambda: Attention(32, 4, attn_head_dim=12, dim_out=24), TOKENS, {}),
    "rotary": (lambda: AttentionRope(32, 4, num_prefix_tokens=2), TOKENS, {"rope": ROTATION}),
    "rotary, halves turned": (
        lambda: AttentionRope(32, 4, num_prefix_tokens=2, rotate_half=True, **NORMS, gated=True),
        TOKENS,
        {"rope": ROTATION},
    ),
    "rotary, apart": (
        lambda: AttentionRope(32, 4, qkv_fused=False, num_prefix_tokens=2),
        TOKENS,
        {"rope": ROTATION},
    ),
    "eva": (
        lambda: eva.EvaAttention(32, 4, num_prefix_tokens=2, scale_norm=False),
        TOKENS,
        {"rope": ROTATION},
    ),
    "eva, apart": (
        lambda: eva.EvaAttention(32, 4, qkv_fused=False, norm_layer=nn.LayerNorm),
        TOKENS,
        {},
    ),
    "metaformer": (lambda: metaformer.Attention(32, head_dim=8), TOKENS, {}),
    "convit": (lambda: convit.MHSA(32, 4), TOKENS, {}),
    "hiera": (lambda: hiera.MaskUnitAttention(32, 48, 4), TOKENS, {}),
    "tnt": (lambda: tnt.Attention(32, 32, 4, qkv_bias=True), TOKENS, {}),
    "pvt_v2": (lambda: pvt_v2.Attention(32, 4), TOKENS, {"feat_size": (3, 4)}),
    "twins": (lambda: twins.GlobalSubSampleAttn(32, 4), TOKENS, {"size": (3, 4)}),
    "nextvit": (lambda: nextvit.EfficientAttention(32, head_dim=8), TOKENS, {}),
    "volo": (lambda: volo.Attention(32, 4), ROWS_LAST, {}),
    "hieradet": (lambda: hieradet_sam2.MultiScaleAttention(32, 48, 4), ROWS_LAST, {}),
    "fastvit": (lambda: fastvit.Attention(32, head_dim=8), ROWS_FIRST, {}),
    "visformer": (lambda: visformer.Attention(32, 4), ROWS_FIRST, {}),
}
# Class, distillation and register tokens, layer scale, norms around: in their models.
MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "eva02_tiny_patch14_224": {"img_size": 28},
    "vit_xsmall_patch16_clip_224": {"img_size": 32},
}


class Holder(nn.Module):
    """A layer between two of others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attn = layer

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        return x.flatten()[0] + self.attn(x * 1.5, **keywords)


@pytest.mark.parametrize("case", LAYERS)
def test_layers_stand_where_softmax_stood(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape, keywords = LAYERS[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    report = assert_wired(Holder(build().eval()), lambda m: m(x, **keywords), monkeypatch)
    assert list(report.converted) == ["attn"]


@pytest.mark.parametrize("name", MODELS)
def test_models_with_tokens_of_all_sorts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = MODELS[name]
    model = timm.create_model(name, num_classes=5, depth=2, **options).eval()
    side = options["img_size"]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    report = assert_wired(model, lambda m: m(images), monkeypatch)
    assert list(report.converted) == ["blocks.0.attn", "blocks.1.attn"]
    assert not report.kept


@pytest.mark.parametrize("kind", ["bool", "float", "rows of padding see nothing"])
def test_masks_of_padding_are_obeyed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    real = torch.tensor([[True, True, True, False, False], [True] * 5])
    mask = real[:, None, None].expand(2, 1, 5, 5)
    if kind == "rows of padding see nothing":
        mask = mask & mask.mT
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(x, attn_mask=mask)
        # What stands at padding is of no account.
        return out[real]

    assert_wired(Holder(Attention(32, 4)).eval(), run, monkeypatch)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_mask": torch.ones(5, 5).tril().bool()}, "hides padding from all tokens"),
        ({"attn_mask": torch.randn(5, 5)}, "hides padding from all tokens"),
        ({"attn_mask": torch.ones(2, 5).bool()}, r"mask \[2, 5\] does not fit 2 inputs of 5"),
        ({"is_causal": True}, "cannot be causal"),
    ],
)
def test_other_masks_are_refused(keywords: dict[str, Any], message: str) -> None:
    model = Holder(Attention(32, 4))
    ecoformer.convert(model)
    with pytest.raises(InputError, match=message):
        model(torch.randn(2, 5, 32), **keywords)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (AttentionRope(32, 4, qkv_fused=False, num_kv_heads=2), "2 key heads for 4 query heads"),
        (Attention(512, 2), "heads have 256 channels, more than 128"),
        (pvt_v2.Attention(32, 4, sr_ratio=2), "a reduced map"),
        (hiera.MaskUnitAttention(32, 32, 4, q_stride=4), "queries are pooled"),
        (hiera.MaskUnitAttention(32, 32, 4, use_mask_unit_attn=True), "attends in windows"),
        (tnt.Attention(32, 16, 4), "queries have 16 channels, its values 32"),
    ],
)
def test_what_has_no_linear_form_is_kept(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(Holder(layer), Holder(Attention(32, 4)))
    report = ecoformer.convert(model)
    assert list(report.kept) == ["0.attn"] and reason in report.kept["0.attn"]
    assert model[0].attn is layer
