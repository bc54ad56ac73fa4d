"""A small ViT for canvases of some dozen pixels: what PAIRS is learned with in minutes.

All its blocks take the chosen kind, and nothing else relates one place to another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ecoformer.attention import LayerSpec
from ecoformer.attention.base import Size
from ecoformer.hash_config import HashConfig
from ecoformer.models.base import Backbone, build_blocks, spread_drop_path
from ecoformer.models.mlp import Mlp
from ecoformer.models.vit_family import FAMILY

_DIM = 64
_DEPTH = 2
_NUM_HEADS = 4
_MLP_RATIO = 2


class Stem(nn.Module):
    """Two convolutions to tokens, which see 11 x 11 pixels each, one every 6.

    Source: early convolutions learn faster than one of patches, arXiv 2106.14881.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1)
        self.act = nn.GELU()
        self.proj = nn.Conv2d(dim // 2, dim, kernel_size=5, stride=3, padding=2)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        x = self.proj(self.act(self.conv(x)))
        return self.norm(rearrange(x, "b c h w -> b (h w) c")), (x.shape[-2], x.shape[-1])


class CanvasVit(Backbone):
    """Stem, pre-norm blocks, a norm, and a classifier of each token; it knows no positions.

    ``options`` are those of ``Backbone``.

    Source: ViT, arXiv 2010.11929.
    """

    def __init__(
        self,
        attention: str,
        *,
        hashing: HashConfig | None = None,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(_DIM, **options)
        self.embed = Stem(self.in_chans, _DIM)
        spec = LayerSpec(_DIM, _NUM_HEADS, proj_drop=proj_drop_rate, hashing=hashing, sr_ratio=2)
        make_mlp = partial(Mlp, _DIM, _MLP_RATIO * _DIM, proj_drop_rate)
        rates = spread_drop_path(drop_path_rate, _DEPTH)
        self.blocks = build_blocks([attention], spec, make_mlp, rates)
        self.norm = nn.LayerNorm(_DIM, eps=1e-6)
        self.init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        x, size = self.embed(x)
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Take each class from the token that is surest of it: [B, N, C] to [B, classes].

        The classes are those of single tokens, so that no sum over tokens counts items: with a
        mean, a network without any attention learns PAIRS as well.
        """
        x = self.head_drop(x)
        return x if pre_logits else self.head(x).amax(dim=1)


def create_model(
    variant: str,
    attention: str = "ecoformer",
    *,
    num_classes: int = 1000,
    hashing: HashConfig | None = None,
    **options: Any,
) -> CanvasVit:
    """Build a model with fresh weights: [B, in_chans, height, width] -> [B, num_classes].

    Raises:
        InputError: no such variant, or it has no such attention.
    """
    FAMILY.check(variant, attention)
    return CanvasVit(attention, num_classes=num_classes, hashing=hashing, **options)
