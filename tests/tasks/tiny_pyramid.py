"""A PVTv2 of a few channels, as a family that a run takes, and heads and data as small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from ecoformer.data import scenes
from ecoformer.models.dense import maps, retinanet, semantic_fpn
from ecoformer.models.registry import ModelFamily
from pvt.model import PyramidVisionTransformerV2
from pvt.variants import PVT_VARIANTS

FAMILY = ModelFamily(
    name="tests.tasks.tiny_pyramid",
    variants={"tiny_pyramid": ("ecoformer", "msa", "sra")},
    default_model="tiny_pyramid",
    first_conv="patch_embed1.proj",
)


def create_model(variant: str, attention: str = "ecoformer", **options: Any) -> nn.Module:
    """A block of 8 to 32 channels in each stage."""
    FAMILY.check(variant, attention)
    tiny = replace(
        PVT_VARIANTS["pvt_v2_b0"],
        embed_dims=(8, 16, 16, 32),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
    )
    return PyramidVisionTransformerV2(tiny, attention, **options)


def shrink(patch: pytest.MonkeyPatch, num_canvases: int = 3) -> None:
    """Let networks have few channels behind the backbone too, and SCENES few held-out canvases."""
    for module in (maps, retinanet, semantic_fpn):
        patch.setattr(module, "NUM_CHANNELS", 16)
    patch.setattr(semantic_fpn, "_NUM_CHANNELS", 32)
    patch.setitem(scenes.NUM_CANVASES, "val", num_canvases)
