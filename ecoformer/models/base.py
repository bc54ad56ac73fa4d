"""What all backbones stand on: patch embedding, blocks, and a classifier over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from ecoformer.attention import LayerSpec, attention_class
from ecoformer.attention.base import Size
from ecoformer.errors import InputError


class PatchEmbed(nn.Module):
    """Strided convolution to tokens, then LayerNorm: [B, in_chans, height, width] to [B, N, C].

    Patches overlap where ``kernel_size`` exceeds ``stride``.

    Source: ViT, arXiv 2010.11929; overlapping form: PVTv2, arXiv 2106.13797.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, *, kernel_size: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.min_side = kernel_size - 2 * padding

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """Tokens and their (height, width). A map smaller than one patch is an InputError."""
        if min(x.shape[-2:]) < self.min_side:
            raise InputError(
                f"a map of {x.shape[-2]} x {x.shape[-1]} is smaller than a patch; "
                "give images of at least 32 pixels a side."
            )
        x = self.proj(x)
        return self.norm(rearrange(x, "b c h w -> b (h w) c")), (x.shape[-2], x.shape[-1])


class Block(nn.Module):
    """Pre-norm transformer block (ViT, arXiv 2010.11929), [B, N, C] to [B, N, C].

    ``drop_path`` is the probability that a sample skips a branch in training.
    """

    def __init__(
        self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


def build_blocks(
    kinds: Sequence[str],
    spec: LayerSpec,
    make_mlp: Callable[[], nn.Module],
    drop_paths: Sequence[float],
) -> nn.ModuleList:
    """Build a block for each rate of ``drop_paths``; they take the attention kinds in turn."""
    blocks = nn.ModuleList()
    for kind, drop_path in zip(cycle(kinds), drop_paths, strict=False):
        attention = attention_class(kind).from_spec(spec)
        blocks.append(Block(spec.dim, attention, make_mlp(), drop_path))
    return blocks


def spread_drop_path(rate: float, depth: int) -> list[float]:
    """Rates of stochastic depth (arXiv 1603.09382), which rise linearly from 0 to ``rate``."""
    if not 0 <= rate < 1:
        raise InputError(f"drop path is a probability below 1, not {rate}.")
    # On the CPU also where a model is built without data: these are numbers, not weights.
    return torch.linspace(0, rate, depth, device="cpu").tolist()


class Backbone(nn.Module):
    """A classifier over tokens, with the methods that timm asks for.

    A subclass calls ``super().__init__`` with the C of its last tokens, builds its layers, calls
    ``init_weights`` and defines ``forward_features``. Without classes the mean token comes out.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] to normalised tokens [B, N, C]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over tokens [B, N, C], then the classifier unless ``pre_logits``."""
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a freshly drawn classifier in place; 0 classes remove it."""
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes)
            _init_layer(self.head)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beside biases and other 1-D ones."""
        return set()

    def init_weights(self) -> None:
        """Draw all weights: truncated normal for linear, by fan-out for convolution."""
        self.apply(_init_layer)


def _init_layer(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.Conv2d):
        fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
    if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
