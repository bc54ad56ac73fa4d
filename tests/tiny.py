"""A small model with EcoFormer attention that is neither PVT nor Twins: somebody's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ecoformer import EcoFormerAttention, HashConfig
from ecoformer.models.base import Block, PatchEmbed
from ecoformer.models.mlp import Mlp

TINY_HASH = HashConfig(num_bits=4, num_anchors=6, num_similar=3, num_fit_steps=10)


class TinyModel(nn.Module):
    """4 x 4 patches, blocks with two heads of four channels, and a classifier.

    Args:
        hashing: of every layer.
        depth: number of blocks.
        seed: of the weights.
    """

    def __init__(self, hashing: HashConfig = TINY_HASH, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.embed = PatchEmbed(3, 8, kernel_size=4, stride=4)
        self.blocks = nn.ModuleList(
            Block(8, EcoFormerAttention(8, 2, hashing=hashing), Mlp(8, 16), drop_path=0.5)
            for _ in range(depth)
        )
        self.head = nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] to [B, 5]."""
        x, size = self.embed(images)
        for block in self.blocks:
            x = block(x, size)
        return self.head(x.mean(1))


def draw_images(count: int = 2, height: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    """Standard-normal images, [count, 3, height, width], of height * width / 16 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator)
