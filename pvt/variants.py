"""The sizes of PVTv2, as published, and the attention kinds that each has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PvtVariant:
    """One size of PVTv2; tuples hold a value a stage.

    Args:
        embed_dims: channels.
        depths: blocks.
        mlp_ratios: hidden channels of the MLP over ``embed_dims``.
        is_linear: pooled spatial reduction, and ReLU in the MLP.
        num_heads: attention heads.
        sr_ratios: how much spatial reduction shrinks the map's sides.

    Source: PVTv2, arXiv 2106.13797, table 1.
    """

    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    is_linear: bool = False
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)


PVT_VARIANTS = {
    "pvt_v2_b0": PvtVariant(embed_dims=(32, 64, 160, 256)),
    "pvt_v2_b1": PvtVariant(),
    "pvt_v2_b2": PvtVariant(depths=(3, 4, 6, 3)),
    "pvt_v2_b2_li": PvtVariant(depths=(3, 4, 6, 3), is_linear=True),
    "pvt_v2_b3": PvtVariant(depths=(3, 4, 18, 3)),
    "pvt_v2_b4": PvtVariant(depths=(3, 8, 27, 3)),
    "pvt_v2_b5": PvtVariant(depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}


def attention_kinds(variant: PvtVariant) -> tuple[str, ...]:
    """Names of the attention kinds that a variant can be built with.

    Args:
        variant: a row of ``PVT_VARIANTS``.
    """
    if variant.is_linear:
        return ("sra",)
    return ("ecoformer", "msa", "msa_share_qk", "sra", "performer")
