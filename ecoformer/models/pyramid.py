"""What the backbones are built from: patch embedding, block, stages, head.

Shapes: B batch, N tokens = height * width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ecoformer.attention import LayerSpec, attention_class
from ecoformer.attention.maps import Size, map_to_tokens
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.models.mlp import Mlp
from ecoformer.models.sizes import PyramidSizes


class PatchEmbed(nn.Module):
    """Strided convolution to tokens, then LayerNorm.

    Args:
        in_chans: channels of the map.
        embed_dim: C.
        kernel_size: of the convolution; patches overlap where it exceeds ``stride``.
        stride: how much smaller the map's sides become.
        padding: zeros around the map.

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
        """Embed a map.

        Args:
            x: [B, in_chans, height, width], float.

        Returns:
            Tokens [B, N, C] and their (height, width).

        Raises:
            InputError: the map is smaller than one patch.
        """
        if min(x.shape[-2:]) < self.min_side:
            raise InputError(
                f"a map of {x.shape[-2]} x {x.shape[-1]} is smaller than a patch; "
                "give images of at least 32 pixels a side."
            )
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), (x.shape[-2], x.shape[-1])


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        dim: C.
        attention: any kind, ``attention(x, size)``.
        mlp: ``mlp(x, size)``.
        drop_path: probability that a sample skips a branch in training.

    Source: ViT, arXiv 2010.11929.
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
        """Attend, then mix channels.

        Args:
            x: [B, N, C], float.
            size: (height, width).

        Returns:
            [B, N, C].
        """
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class Backbone(nn.Module):
    """A classifier over tokens: what the backbones share around their stages.

    A subclass calls ``super().__init__``, builds its stages, calls ``init_weights`` and defines
    ``forward_stage``. Method names are timm's.

    Args:
        embed_dims: C of each stage. The map of the first has a quarter of the image's sides, that
            of each other one half of those before it.
        num_classes: outputs; 0 leaves the mean token as it is.
    """

    def __init__(self, embed_dims: Sequence[int], num_classes: int) -> None:
        super().__init__()
        # What timm wants to know of the maps; they are the output of no module with a name.
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": ""}
            for stage, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.reset_classifier(num_classes)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        """Embed a map, and run the blocks of a stage, and the norm where it ends in one.

        Args:
            x: [B, C', height', width'], float; images, or the map of the stage before.
            stage: number of the stage, from 0.

        Returns:
            [B, C, height, width].
        """
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens of the last stage, normalised.

        Args:
            x: [B, in_chans, height, width], float; sides of at least 32.

        Returns:
            [B, N, C], a token for every 32 x 32 pixels.
        """
        for stage in range(len(self.feature_info)):
            x = self.forward_stage(x, stage)
        return map_to_tokens(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of stages, for dense prediction; timm's ``features_only`` asks for them.

        Args:
            x: [B, in_chans, height, width], float; sides of at least 32.
            indices: of stages; a number takes so many of the last, None all.
            norm: changes nothing: a map is what its stage hands on.
            output_fmt: ``"NCHW"``.
            intermediates_only: run no stage behind the last map, and return maps alone.

        Returns:
            Tokens of the last stage, and maps of [B, C, height, width].

        Raises:
            InputError: another ``output_fmt``, or a stage that there is not.
        """
        if output_fmt != "NCHW":
            raise InputError(f"maps come as NCHW, not {output_fmt}; permute their axes.")
        stages = range(len(self.feature_info))
        if isinstance(indices, int):
            indices = range(-indices, 0)
        try:
            chosen = [stages[index] for index in (stages if indices is None else indices)]
        except IndexError:
            chosen = []
        if not chosen:
            raise InputError(f"maps are those of {len(stages)} stages, counted from 0.")
        maps = []
        for stage in stages[: max(chosen) + 1] if intermediates_only else stages:
            x = self.forward_stage(x, stage)
            if stage in chosen:
                maps.append(x)
        return maps if intermediates_only else (map_to_tokens(x), maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over tokens, then the classifier.

        Args:
            x: [B, N, C], float.
            pre_logits: leave the classifier out.

        Returns:
            [B, num_classes], or [B, C].
        """
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: [B, in_chans, height, width], float.

        Returns:
            [B, num_classes] logits.
        """
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Find the classifier, for timm's tools.

        Returns:
            The last layer.
        """
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a freshly drawn classifier in place.

        Args:
            num_classes: outputs; 0 removes it.
        """
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes)
            _init_layer(self.head)

    def no_weight_decay(self) -> set[str]:
        """Name parameters without weight decay, beside biases and other 1-D ones.

        Returns:
            None of them here; backbones add theirs.
        """
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


def build_stages(
    sizes: PyramidSizes,
    kinds: Sequence[str],
    last_kinds: Sequence[str],
    *,
    hashing: HashConfig | None,
    drop_rate: float,
    drop_path_rate: float,
    is_linear: bool = False,
    has_dwconv: bool = False,
) -> list[nn.ModuleList]:
    """Build the blocks of all stages.

    Args:
        sizes: of the backbone.
        kinds: attention kinds that the blocks of a stage take in turn.
        last_kinds: the same for the last stage.
        hashing: settings of EcoFormer attention.
        drop_rate: dropout in attention and MLP.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        is_linear: pooled spatial reduction, and ReLU in the MLP.
        has_dwconv: convolution in the MLP.

    Returns:
        The blocks of each stage.

    Raises:
        InputError: ``drop_path_rate`` outside [0, 1).

    Source: stochastic depth, arXiv 1603.09382.
    """
    if not 0 <= drop_path_rate < 1:
        raise InputError(f"drop path is a probability below 1, not {drop_path_rate}.")
    # On the CPU also where a model is built without data: these are numbers, not weights.
    drop_paths = torch.linspace(0, drop_path_rate, sum(sizes.depths), device="cpu")
    stages = []
    for stage, stage_drop_paths in enumerate(drop_paths.split(list(sizes.depths))):
        dim = sizes.embed_dims[stage]
        stage_kinds = last_kinds if stage == len(sizes.depths) - 1 else kinds
        spec = LayerSpec(
            dim,
            sizes.num_heads[stage],
            proj_drop=drop_rate,
            hashing=hashing,
            sr_ratio=sizes.sr_ratios[stage],
            is_linear=is_linear,
        )
        blocks = nn.ModuleList()
        # The kinds go round for as long as there are blocks.
        for drop_path, kind in zip(stage_drop_paths.tolist(), cycle(stage_kinds), strict=False):
            attention = attention_class(kind).from_spec(spec)
            mlp = Mlp(
                dim,
                dim * sizes.mlp_ratios[stage],
                drop_rate,
                has_dwconv=has_dwconv,
                has_relu=is_linear,
            )
            blocks.append(Block(dim, attention, mlp, drop_path))
        stages.append(blocks)
    return stages
