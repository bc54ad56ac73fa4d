"""Backbones whose map shrinks from stage to stage; C is the width of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from einops import rearrange
from timm.models import register_notrace_module
from torch import Tensor, nn

from ecoformer.attention import LayerSpec
from ecoformer.attention.base import Size
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.models.base import Backbone, build_blocks, spread_drop_path
from ecoformer.models.mlp import Mlp
from ecoformer.models.sizes import PyramidSizes


@register_notrace_module
class TokensToMap(nn.Module):
    """View [B, N, C] as [B, C, height, width]: the end of a stage, where hooks find its map."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return rearrange(x, "b (h w) c -> b c h w", h=size[0], w=size[1])


class Pyramid(Backbone):
    """A backbone in stages of ``embed_dims`` channels.

    The map of the first has a quarter of the image's sides, each other half of those before it.
    A subclass defines ``forward_stage`` and ``cut_stages``; ``options`` are those of ``Backbone``.
    """

    def __init__(self, embed_dims: Sequence[int], num_classes: int = 1000, **options: Any) -> None:
        super().__init__(embed_dims[-1], num_classes, **options)
        self.maps = nn.ModuleList(TokensToMap() for _ in embed_dims)
        # What timm wants to know of the maps.
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"maps.{stage}"}
            for stage, dim in enumerate(embed_dims)
        ]

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        """Embed images, or the map of the stage before, and run a stage, counted from 0.

        [B, C', height', width'] to [B, C, height, width], normalised where the stage ends so; the
        last step is ``self.maps[stage]``.
        """
        raise NotImplementedError

    def cut_stages(self, num_stages: int) -> None:
        """Remove the layers of all stages but the first ``num_stages``."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images, sides of at least 32, to the map of the last stage, [B, C, height, width]."""
        for stage in range(len(self.maps)):
            x = self.forward_stage(x, stage)
        return x

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of stages, for dense prediction; timm's ``features_only`` asks for them.

        Args:
            indices: of stages; a number takes so many of the last, None all.
            norm: changes nothing: a map is what its stage hands on.
            stop_early: run no stage behind the last map; so does ``intermediates_only``.

        Returns:
            The map of the last stage that ran, and maps [B, C, height, width]; the maps alone
            where ``intermediates_only``.

        Raises:
            InputError: an ``output_fmt`` but ``"NCHW"``, or a stage that there is not.
        """
        if output_fmt != "NCHW":
            raise InputError(f"maps come as NCHW, not {output_fmt}; permute their axes.")
        chosen = self._choose_stages(indices)
        is_short = stop_early or intermediates_only
        maps = []
        for stage in range(max(chosen) + 1 if is_short else len(self.maps)):
            x = self.forward_stage(x, stage)
            if stage in chosen:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of some stages do not need: later stages, and the classifier.

        ``prune_norm`` changes nothing. Returns the stages, counted from 0.

        Raises:
            InputError: a stage that there is not.
        """
        chosen = self._choose_stages(indices)
        num_stages = max(chosen) + 1
        is_cut = num_stages < len(self.maps)
        if is_cut:
            self.cut_stages(num_stages)
            self.maps = self.maps[:num_stages]
            self.num_features = self.head_hidden_size = self.feature_info[num_stages - 1]["num_chs"]
        if is_cut or prune_head:
            self.reset_classifier(0, "")
        return chosen

    def _choose_stages(self, indices: int | Sequence[int] | None) -> list[int]:
        stages = range(len(self.maps))
        if isinstance(indices, int):
            indices = range(-indices, 0)
        try:
            chosen = [stages[index] for index in (stages if indices is None else indices)]
        except IndexError:
            chosen = []
        if not chosen:
            raise InputError(f"maps are those of {len(stages)} stages, counted from 0.")
        return chosen


def build_stages(
    sizes: PyramidSizes,
    kinds: Sequence[str],
    last_kinds: Sequence[str],
    *,
    hashing: HashConfig | None,
    proj_drop_rate: float,
    drop_path_rate: float,
    is_linear: bool = False,
    has_dwconv: bool = False,
) -> list[nn.ModuleList]:
    """Build the blocks of each stage; they take ``kinds`` in turn, in the last ``last_kinds``.

    ``proj_drop_rate`` is dropout in attention, after its output projection, and MLP.
    ``drop_path_rate`` is the stochastic depth of the last block; outside [0, 1) it is refused.
    ``is_linear`` means pooled spatial reduction, and ReLU in the MLP.
    """
    drop_paths = spread_drop_path(drop_path_rate, sum(sizes.depths))
    stages = []
    for stage, (dim, depth) in enumerate(zip(sizes.embed_dims, sizes.depths, strict=True)):
        spec = LayerSpec(
            dim,
            sizes.num_heads[stage],
            proj_drop=proj_drop_rate,
            hashing=hashing,
            sr_ratio=sizes.sr_ratios[stage],
            is_linear=is_linear,
        )
        make_mlp = partial(
            Mlp,
            dim,
            dim * sizes.mlp_ratios[stage],
            proj_drop_rate,
            has_dwconv=has_dwconv,
            has_relu=is_linear,
        )
        is_last = stage == len(sizes.depths) - 1
        stage_drop_paths, drop_paths = drop_paths[:depth], drop_paths[depth:]
        stages.append(
            build_blocks(last_kinds if is_last else kinds, spec, make_mlp, stage_drop_paths)
        )
    return stages
