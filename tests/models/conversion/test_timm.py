"""timm's models: what is converted computes what the original did, but for codes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.models.conversion.doubles import assert_wired

# What a form has to be right about, each in its smallest model.
WIRED: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32},  # class token
    "deit_tiny_distilled_patch16_224": {"img_size": 32},  # two of them
    "deit3_small_patch16_224": {"img_size": 32},  # layer scale
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},  # registers
    "eva02_tiny_patch14_224": {"img_size": 28},  # rotary, prefix, bias apart from its projection
}


def create(name: str, **options: Any) -> nn.Module:
    if "depth" not in options and not name.startswith("pit"):
        options["depth"] = 2
    model: nn.Module = timm.create_model(name, num_classes=5, **options).eval()
    return model


@pytest.mark.parametrize("name", WIRED)
def test_converted_layers_stand_where_softmax_stood(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = WIRED[name]
    side = options["img_size"]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    report = assert_wired(create(name, **options), lambda model: model(images), monkeypatch)
    assert list(report.converted) == ["blocks.0.attn", "blocks.1.attn"]
    assert not report.kept
