"""Semantic FPN: a class for each pixel, from the sum of a pyramid's levels."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import Conv2dNormActivation

from ecoformer.models.dense.maps import NUM_CHANNELS, FeaturePyramid

_STRIDES = (4, 8, 16, 32)
_NUM_CHANNELS = 128
_NUM_GROUPS = 32


class SemanticFpn(nn.Module):
    """Images [B, 3, height, width], normalised, to logits [B, num_classes, height, width].

    Each level comes to a quarter of the image's sides by convolutions, twice as large after each;
    their sum gives the logits.

    Args:
        body: a backbone with maps of strides 4, 8, 16 and 32.

    Raises:
        InputError: the backbone lacks such a map.

    Source: the semantic branch of Panoptic FPN, arXiv 1901.02446.
    """

    def __init__(self, body: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = FeaturePyramid(body, _STRIDES)
        norm = partial(nn.GroupNorm, _NUM_GROUPS)
        self.branches = nn.ModuleList()
        for level in range(len(_STRIDES)):
            widths = [NUM_CHANNELS, *[_NUM_CHANNELS] * max(level, 1)]
            self.branches.append(
                nn.ModuleList(
                    Conv2dNormActivation(before, after, norm_layer=norm)
                    for before, after in pairwise(widths)
                )
            )
        # What loading asks of a classifier that may have other classes in a file.
        self.pretrained_cfg = {"classifier": "classifier"}
        self.classifier = nn.Conv2d(_NUM_CHANNELS, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = list(self.backbone(images).values())
        sizes = [x.shape[-2:] for x in maps]
        levels = []
        for level, (x, branch) in enumerate(zip(maps, self.branches, strict=True)):
            # Of the next finer level, which is not always twice as large; the finest stays.
            targets = [sizes[finer] for finer in reversed(range(max(level, 1)))]
            for conv, size in zip(branch.children(), targets, strict=True):
                x = _resize(conv(x), size)
            levels.append(x)
        return _resize(self.classifier(torch.stack(levels).sum(0)), images.shape[-2:])

    def no_weight_decay(self) -> set[str]:
        """Name the backbone's parameters without weight decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[-2:] == size else interpolate(x, size=size, mode="bilinear")
