"""What commands, tables and timm know of Twins."""

from __future__ import annotations

from ecoformer.models.registry import ModelFamily
from twins.variants import TWINS_LAYOUTS, TWINS_VARIANTS

_SIZES = ("small", "base", "large")

FAMILY = ModelFamily(
    name="twins",
    variants={name: variant.attention_kinds for name, variant in TWINS_VARIANTS.items()},
    layouts=TWINS_LAYOUTS,
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
    first_conv="patch_embeds.0.proj",
    drop_rates=("pos_drop_rate", "proj_drop_rate"),
    foreign_prefixes={"pvt_v2": "pvt"},
)
