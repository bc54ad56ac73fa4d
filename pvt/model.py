"""PVTv2 with a choice of attention.

Papers: Pyramid Vision Transformer, Wang et al., arXiv 2102.12122; PVT v2, Wang et al.,
arXiv 2106.13797; EcoFormer, Liu et al., arXiv 2209.09004.
Written anew from the papers and from measured behaviour. Parameter names are those of the
released weights, which load into it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ecoformer.hash_config import HashConfig
from ecoformer.models.base import PatchEmbed
from ecoformer.models.pyramid import Pyramid, build_stages
from pvt.variants import PvtVariant


class PyramidVisionTransformerV2(Pyramid):
    """Four stages of overlapping patch embedding and transformer blocks.

    ``attention`` leaves the last stage to full softmax; ``"sra"``, the original, is throughout.
    ``options`` are those of ``Backbone``.

    Source: PVT v2, arXiv 2106.13797; EcoFormer, arXiv 2209.09004.
    """

    def __init__(
        self,
        variant: PvtVariant,
        attention: str,
        *,
        hashing: HashConfig | None = None,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(variant.embed_dims, **options)
        stages = build_stages(
            variant,
            kinds=(attention,),
            last_kinds=(attention if attention == "sra" else "msa",),
            hashing=hashing,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            is_linear=variant.is_linear,
            has_dwconv=True,
        )
        in_chans = self.in_chans
        for number, (dim, blocks) in enumerate(zip(variant.embed_dims, stages, strict=True), 1):
            kernel_size, stride = (7, 4) if number == 1 else (3, 2)
            embed = PatchEmbed(
                in_chans, dim, kernel_size=kernel_size, stride=stride, padding=kernel_size // 2
            )
            # Numbered from 1 and side by side, as in the released weights.
            self.add_module(f"patch_embed{number}", embed)
            self.add_module(f"block{number}", blocks)
            self.add_module(f"norm{number}", nn.LayerNorm(dim, eps=1e-6))
            in_chans = dim
        self.init_weights()

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        number = stage + 1
        tokens, size = getattr(self, f"patch_embed{number}")(x)
        for block in getattr(self, f"block{number}"):
            tokens = block(tokens, size)
        tokens = getattr(self, f"norm{number}")(tokens)
        return self.maps[stage](tokens, size)

    def cut_stages(self, num_stages: int) -> None:
        for number in range(num_stages + 1, len(self.maps) + 1):
            for part in ("patch_embed", "block", "norm"):
                delattr(self, f"{part}{number}")

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Groups of parameters for timm's ``--layer-decay``: the stem, then the stages."""
        return {"stem": r"^patch_embed1\.", "stages": r"^(?:patch_embed|block|norm)(\d)\."}
