"""The sizes of Twins, as published, and the attention kinds that each has."""

from __future__ import annotations

from dataclasses import dataclass

from ecoformer.models.registry import Layout
from ecoformer.models.sizes import PyramidSizes


@dataclass(frozen=True)
class TwinsVariant(PyramidSizes):
    """One size of Twins (arXiv 2104.13840): of SVT, which has windows, or of PCPVT."""

    has_windows: bool = False

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """What the variant was published with, its default first."""
        if self.has_windows:
            return ("ecoformer", "msa", "lsa_msa", "lsa_gsa")
        return ("ecoformer", "msa", "sra")


# Even blocks are local, odd ones global.
TWINS_LAYOUTS = {
    "lsa_msa": Layout("softmax, windows and all tokens", ("lsa", "msa")),
    "lsa_gsa": Layout("softmax in windows, spatial reduction", ("lsa", "sra")),
}


def _svt(width: int, depths: tuple[int, ...]) -> TwinsVariant:
    """A Twins-SVT, whose stages double in width and whose heads have 32 channels."""
    dims = tuple(width * 2**stage for stage in range(4))
    return TwinsVariant(
        embed_dims=dims,
        depths=depths,
        num_heads=tuple(dim // 32 for dim in dims),
        mlp_ratios=(4, 4, 4, 4),
        has_windows=True,
    )


TWINS_VARIANTS = {
    "alt_gvt_small": _svt(64, depths=(2, 2, 10, 4)),
    "alt_gvt_base": _svt(96, depths=(2, 2, 18, 2)),
    "alt_gvt_large": _svt(128, depths=(2, 2, 18, 2)),
    "pcpvt_small_v0": TwinsVariant(depths=(3, 4, 6, 3)),
    "pcpvt_base_v0": TwinsVariant(depths=(3, 4, 18, 3)),
    "pcpvt_large_v0": TwinsVariant(depths=(3, 8, 27, 3)),
}
