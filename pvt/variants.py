"""The sizes of PVTv2, as published, and the attention kinds that each has."""

from __future__ import annotations

from dataclasses import dataclass

from ecoformer.models.sizes import PyramidSizes


@dataclass(frozen=True)
class PvtVariant(PyramidSizes):
    """One size of PVTv2 (arXiv 2106.13797); a linear one pools, and has ReLU in its MLP."""

    is_linear: bool = False

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """What the variant was published with, its default first."""
        if self.is_linear:
            return ("sra",)
        return ("ecoformer", "msa", "msa_share_qk", "sra", "performer")


PVT_VARIANTS = {
    "pvt_v2_b0": PvtVariant(embed_dims=(32, 64, 160, 256)),
    "pvt_v2_b1": PvtVariant(),
    "pvt_v2_b2": PvtVariant(depths=(3, 4, 6, 3)),
    "pvt_v2_b2_li": PvtVariant(depths=(3, 4, 6, 3), is_linear=True),
    "pvt_v2_b3": PvtVariant(depths=(3, 4, 18, 3)),
    "pvt_v2_b4": PvtVariant(depths=(3, 8, 27, 3)),
    "pvt_v2_b5": PvtVariant(depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}
