"""PVTv2 backbones with EcoFormer attention and the kinds it is compared with."""

from __future__ import annotations

from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import ModelFamily, register_with_timm
from pvt.model import PyramidVisionTransformerV2
from pvt.variants import PVT_VARIANTS

__all__ = ["FAMILY", "PVT_VARIANTS", "PyramidVisionTransformerV2", "create_model"]


def create_model(
    variant: str,
    attention: str = "ecoformer",
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    hashing: HashConfig | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> PyramidVisionTransformerV2:
    """Build a PVTv2 with fresh weights.

    Args:
        variant: ``"pvt_v2_b0"`` to ``"pvt_v2_b5"``, or ``"pvt_v2_b2_li"``.
        attention: ``"ecoformer"``, ``"msa"``, ``"msa_share_qk"``, ``"sra"`` or ``"performer"``.
        num_classes: outputs; 0 gives the features before the classifier.
        in_chans: channels of the images.
        hashing: settings of EcoFormer attention; the published ones where None.
        drop_rate: dropout in attention and MLP.
        drop_path_rate: stochastic depth of the last block.

    Returns:
        A model, [B, in_chans, height, width] -> [B, num_classes].

    Raises:
        InputError: no such variant, or the variant has no such attention.
    """
    FAMILY.check(variant, attention)
    return PyramidVisionTransformerV2(
        PVT_VARIANTS[variant],
        attention,
        num_classes=num_classes,
        in_chans=in_chans,
        hashing=hashing,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )


FAMILY = ModelFamily(
    name="pvt",
    create_model=create_model,
    variants={name: variant.attention_kinds for name, variant in PVT_VARIANTS.items()},
    default_model="pvt_v2_b0",
    recipe={"drop_path": 0.1, "repeated_aug": True, "clip_grad": None},
    timm_names={f"ecoformer_{name}": name for name in PVT_VARIANTS},
    foreign_prefixes={"alt_gvt": "twins", "pcpvt": "twins"},
)
register_with_timm(FAMILY)
