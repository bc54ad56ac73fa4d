"""PVTv2 with a choice of attention.

Papers: Pyramid Vision Transformer, Wang et al., arXiv 2102.12122; PVT v2, Wang et al.,
arXiv 2106.13797; EcoFormer, Liu et al., arXiv 2209.09004.
Origin: written anew from the papers and from measured behaviour. Parameter names are those of
the released PVTv2 and EcoFormer weights, which load into it.

Shapes: B batch, N tokens = height * width, C channels of a stage.
"""

from __future__ import annotations

from torch import Tensor, nn

from ecoformer.attention import build_attention
from ecoformer.hashing import HashConfig
from ecoformer.layers import Backbone, Block, Mlp, PatchEmbed, rising_drop_path, tokens_to_map
from pvt.variants import PvtVariant


class PyramidVisionTransformerV2(Backbone):
    """Four stages of overlapping patch embedding and transformer blocks.

    Args:
        variant: sizes.
        attention: kind of the stages 1 to 3; the last is full softmax attention, but for
            ``"sra"``, which is the original PVTv2 throughout.
        num_classes: outputs.
        in_chans: channels of the images.
        hashing: settings of EcoFormer attention.
        drop_rate: dropout in attention and MLP.
        drop_path_rate: stochastic depth of the last block.

    Source: PVT v2, arXiv 2106.13797; EcoFormer, arXiv 2209.09004, section 5.
    """

    num_stages = 4

    def __init__(
        self,
        variant: PvtVariant,
        attention: str,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        hashing: HashConfig | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(variant.embed_dims[-1], num_classes)
        drop_paths = rising_drop_path(drop_path_rate, variant.depths)
        in_dims = (in_chans, *variant.embed_dims[:-1])
        for stage, dim in enumerate(variant.embed_dims):
            is_first, is_last = stage == 0, stage == self.num_stages - 1
            embed = PatchEmbed(
                in_dims[stage],
                dim,
                kernel_size=7 if is_first else 3,
                stride=4 if is_first else 2,
                padding=3 if is_first else 1,
            )
            blocks = nn.ModuleList()
            for drop_path in drop_paths[stage]:
                attn = build_attention(
                    "msa" if is_last and attention != "sra" else attention,
                    dim,
                    variant.num_heads[stage],
                    proj_drop=drop_rate,
                    hashing=hashing,
                    sr_ratio=variant.sr_ratios[stage],
                    is_linear=variant.is_linear,
                )
                mlp = Mlp(
                    dim,
                    dim * variant.mlp_ratios[stage],
                    drop_rate,
                    has_dwconv=True,
                    has_relu=variant.is_linear,
                )
                blocks.append(Block(dim, attn, mlp, drop_path))
            # Numbered from 1 and side by side, as in the released weights.
            self.add_module(f"patch_embed{stage + 1}", embed)
            self.add_module(f"block{stage + 1}", blocks)
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens of the last stage, normalised.

        Args:
            x: [B, in_chans, height, width], float; sides of at least 32.

        Returns:
            [B, N, C], a token for every 32 x 32 pixels.
        """
        for stage in range(1, self.num_stages + 1):
            x, size = getattr(self, f"patch_embed{stage}")(x)
            for block in getattr(self, f"block{stage}"):
                x = block(x, size)
            x = getattr(self, f"norm{stage}")(x)
            if stage < self.num_stages:
                x = tokens_to_map(x, size)
        return x
