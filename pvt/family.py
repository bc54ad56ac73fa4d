"""What commands, tables and timm know of PVTv2."""

from __future__ import annotations

from ecoformer.models.registry import ModelFamily
from pvt.variants import PVT_VARIANTS

FAMILY = ModelFamily(
    name="pvt",
    variants={name: variant.attention_kinds for name, variant in PVT_VARIANTS.items()},
    default_model="pvt_v2_b0",
    recipe={"drop_path": 0.1, "repeated_aug": True, "clip_grad": None},
    timm_names={f"ecoformer_{name}": name for name in PVT_VARIANTS},
    first_conv="patch_embed1.proj",
    foreign_prefixes={"alt_gvt": "twins", "pcpvt": "twins"},
)
