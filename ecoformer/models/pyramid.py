"""Backbones whose map shrinks from stage to stage.

Shapes: B batch, N tokens = height * width, C channels of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from einops import rearrange
from torch import Tensor, nn

from ecoformer.attention import LayerSpec
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.models.base import Backbone, build_blocks, spread_drop_path
from ecoformer.models.mlp import Mlp
from ecoformer.models.sizes import PyramidSizes


class Pyramid(Backbone):
    """A backbone in stages; a subclass defines ``forward_stage``.

    Args:
        embed_dims: C of each stage. The map of the first has a quarter of the image's sides, that
            of each other one half of those before it.
        num_classes: 0 leaves the mean token as it is.
    """

    def __init__(self, embed_dims: Sequence[int], num_classes: int) -> None:
        super().__init__(embed_dims[-1], num_classes)
        # What timm wants to know of the maps; they are the output of no module with a name.
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": ""}
            for stage, dim in enumerate(embed_dims)
        ]

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        """Embed a map, run the blocks of a stage, and the norm where it ends in one.

        Args:
            x: images, or the map of the stage before.
            stage: from 0.

        Returns:
            [B, C, height, width].
        """
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images, sides of at least 32, to tokens of the last stage, one for 32 x 32 pixels."""
        for stage in range(len(self.feature_info)):
            x = self.forward_stage(x, stage)
        return rearrange(x, "b c h w -> b (h w) c")

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
            x: images, sides of at least 32.
            indices: of stages; a number takes so many of the last, None all.
            norm: changes nothing: a map is what its stage hands on.
            output_fmt: ``"NCHW"``.
            intermediates_only: run no stage behind the last map, and return maps alone.

        Returns:
            Tokens of the last stage, and maps [B, C, height, width].

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
        return maps if intermediates_only else (rearrange(x, "b c h w -> b (h w) c"), maps)


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
    """Build the blocks of each stage.

    Args:
        kinds: attention kinds that the blocks of a stage take in turn; ``last_kinds`` in the last.
        drop_rate: dropout in attention and MLP.
        drop_path_rate: stochastic depth of the last block.
        is_linear: pooled spatial reduction, and ReLU in the MLP.
        has_dwconv: convolution in the MLP.

    Raises:
        InputError: ``drop_path_rate`` outside [0, 1).
    """
    drop_paths = spread_drop_path(drop_path_rate, sum(sizes.depths))
    stages = []
    for stage, (dim, depth) in enumerate(zip(sizes.embed_dims, sizes.depths, strict=True)):
        spec = LayerSpec(
            dim,
            sizes.num_heads[stage],
            proj_drop=drop_rate,
            hashing=hashing,
            sr_ratio=sizes.sr_ratios[stage],
            is_linear=is_linear,
        )
        make_mlp = partial(
            Mlp,
            dim,
            dim * sizes.mlp_ratios[stage],
            drop_rate,
            has_dwconv=has_dwconv,
            has_relu=is_linear,
        )
        is_last = stage == len(sizes.depths) - 1
        stage_drop_paths, drop_paths = drop_paths[:depth], drop_paths[depth:]
        stages.append(
            build_blocks(last_kinds if is_last else kinds, spec, make_mlp, stage_drop_paths)
        )
    return stages
