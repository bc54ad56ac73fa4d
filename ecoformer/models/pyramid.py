"""Backbones whose map shrinks from stage to stage; C is the width of a stage."""

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
    """A backbone in stages of ``embed_dims`` channels; a subclass defines ``forward_stage``.

    The map of the first has a quarter of the image's sides, each other half of those before it.
    """

    def __init__(self, embed_dims: Sequence[int], num_classes: int) -> None:
        super().__init__(embed_dims[-1], num_classes)
        # What timm wants to know of the maps; they are the output of no module with a name.
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": ""}
            for stage, dim in enumerate(embed_dims)
        ]

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        """Embed images, or the map of the stage before, and run a stage, counted from 0.

        [B, C', height', width'] to [B, C, height, width], normalised where the stage ends so.
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
            indices: of stages; a number takes so many of the last, None all.
            norm: changes nothing: a map is what its stage hands on.
            intermediates_only: run no stage behind the last map, and return maps alone.

        Returns:
            Tokens of the last stage, and maps [B, C, height, width].

        Raises:
            InputError: an ``output_fmt`` but ``"NCHW"``, or a stage that there is not.
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
    """Build the blocks of each stage; they take ``kinds`` in turn, in the last ``last_kinds``.

    ``drop_path_rate`` is the stochastic depth of the last block; outside [0, 1) it is refused.
    ``is_linear`` means pooled spatial reduction, and ReLU in the MLP.
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
