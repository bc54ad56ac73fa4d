"""Twins backbones with EcoFormer attention and the kinds it is compared with."""

from __future__ import annotations

from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import ModelFamily, register_with_timm
from twins.model import Twins
from twins.variants import TWINS_VARIANTS

__all__ = ["FAMILY", "TWINS_VARIANTS", "Twins", "create_model"]


def create_model(
    variant: str,
    attention: str = "ecoformer",
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    hashing: HashConfig | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Twins:
    """Build a Twins with fresh weights.

    Args:
        variant: ``"alt_gvt_{small,base,large}"`` (Twins-SVT) or
            ``"pcpvt_{small,base,large}_v0"``.
        attention: ``"ecoformer"`` or ``"msa"``; Twins-SVT also ``"lsa_msa"`` and ``"lsa_gsa"``,
            PCPVT also ``"sra"``.
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
    return Twins(
        TWINS_VARIANTS[variant],
        attention,
        num_classes=num_classes,
        in_chans=in_chans,
        hashing=hashing,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )


_SIZES = ("small", "base", "large")

FAMILY = ModelFamily(
    name="twins",
    create_model=create_model,
    variants={name: variant.attention_kinds for name, variant in TWINS_VARIANTS.items()},
    default_model="alt_gvt_small_ecoformer",
    recipe={"drop_path": 0.2, "repeated_aug": False, "clip_grad": 5.0},
    released_names={
        **{f"{name}_ecoformer": (name, "ecoformer") for name in TWINS_VARIANTS},
        **{f"alt_gvt_{size}": (f"alt_gvt_{size}", "msa") for size in _SIZES},
        **{f"pcpvt_{size}_v0": (f"pcpvt_{size}_v0", "sra") for size in _SIZES},
        "alt_gvt_small_sra_to_msa": ("alt_gvt_small", "lsa_msa"),
    },
    timm_names={
        **{f"ecoformer_twins_svt_{size}": f"alt_gvt_{size}" for size in _SIZES},
        **{f"ecoformer_twins_pcpvt_{size}": f"pcpvt_{size}_v0" for size in _SIZES},
    },
    foreign_prefixes={"pvt_v2": "pvt"},
)
register_with_timm(FAMILY)
