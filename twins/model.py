"""Twins-SVT and Twins-PCPVT with a choice of attention.

Papers: Twins, Chu et al., arXiv 2104.13840; conditional positional encodings, Chu et al.,
arXiv 2102.10882; EcoFormer, Liu et al., arXiv 2209.09004.
Written anew from the papers and from measured behaviour. Parameter names are those of the
released weights, which load into it.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from timm.models import register_notrace_module
from torch import Tensor, nn

from ecoformer.attention.base import Size
from ecoformer.hash_config import HashConfig
from ecoformer.models.base import PatchEmbed
from ecoformer.models.mlp import is_plain, is_watched
from ecoformer.models.pyramid import Pyramid, build_stages
from ecoformer.ops.depthwise import depthwise_conv, has_kernel
from twins.variants import TWINS_LAYOUTS, TwinsVariant


@register_notrace_module
class PositionalConvolution(nn.Module):
    """3 x 3 depthwise convolution, plus its input, which tells position (arXiv 2102.10882)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The released weights have a list of one here.
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim))

    def forward(self, x: Tensor, size: Size) -> Tensor:
        conv = self.proj[0]
        if has_kernel(x) and is_plain(conv) and not is_watched(self.proj):
            weight, bias = conv.parameters()
            return depthwise_conv(x.unflatten(1, size), weight, bias, "residual").flatten(1, 2)
        image = rearrange(x, "b (h w) c -> b c h w", h=size[0], w=size[1])
        return x + rearrange(self.proj(image), "b c h w -> b (h w) c")


class Twins(Pyramid):
    """Four stages of patch embedding and transformer blocks, with a convolution for position.

    ``attention`` leaves the last stage to full softmax; ``"sra"`` and the layouts, the originals,
    are throughout. ``pos_drop_rate`` is dropout after patch embedding; ``options`` are those of
    ``Backbone``.

    Source: Twins, arXiv 2104.13840; EcoFormer, arXiv 2209.09004.
    """

    def __init__(
        self,
        variant: TwinsVariant,
        attention: str,
        *,
        hashing: HashConfig | None = None,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(variant.embed_dims, **options)
        layout = TWINS_LAYOUTS.get(attention)
        kinds = (attention,) if layout is None else layout.kinds
        is_whole = layout is not None or attention == "sra"
        stages = build_stages(
            variant,
            kinds=kinds,
            last_kinds=kinds if is_whole else ("msa",),
            hashing=hashing,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        self.patch_embeds, self.pos_block = nn.ModuleList(), nn.ModuleList()
        self.pos_drop = nn.Dropout(pos_drop_rate)
        in_chans = self.in_chans
        for stage, dim in enumerate(variant.embed_dims):
            patch_size = 4 if stage == 0 else 2
            embed = PatchEmbed(in_chans, dim, kernel_size=patch_size, stride=patch_size)
            self.patch_embeds.append(embed)
            self.pos_block.append(PositionalConvolution(dim))
            in_chans = dim
        self.blocks = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6)
        self.init_weights()

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        tokens, size = self.patch_embeds[stage](x)
        tokens = self.pos_drop(tokens)
        for index, block in enumerate(self.blocks[stage].children()):
            tokens = block(tokens, size)
            if index == 0:
                tokens = self.pos_block[stage](tokens, size)
        is_last = stage == len(self.maps) - 1
        return self.maps[stage](self.norm(tokens) if is_last else tokens, size)

    def cut_stages(self, num_stages: int) -> None:
        for part in ("patch_embeds", "blocks", "pos_block"):
            setattr(self, part, getattr(self, part)[:num_stages])
        # It ends the last of all stages only.
        self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {f"pos_block.{name}" for name, _ in self.pos_block.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for timm's ``--layer-decay``: the stem, then blocks, or stages.

        A stage's embedding and position go with its first block, the norm with the last one.
        """
        with_stage = [(r"^(?:patch_embeds|pos_block)\.(\d+)\.", (0,))]
        blocks = [(r"^blocks\.(\d+)\.(\d+)\.", None), *with_stage]
        stages = [(r"^(?:patch_embeds|pos_block|blocks)\.(\d+)\.", None)]
        # 99999 is how timm says: with the group before.
        return {
            "stem": r"^patch_embeds\.0\.",
            "blocks": [*(stages if coarse else blocks), (r"^norm\.", (99999,))],
        }
