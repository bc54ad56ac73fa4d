"""From a backbone to the maps that heads look at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ecoformer.errors import InputError

NUM_CHANNELS = 256


class FeaturePyramid(nn.Module):
    """A backbone without its classifier, and torchvision's pyramid network over its maps.

    [B, 3, height, width] to maps of 256 channels, the finest first, by the names ``"0"`` and on.

    Args:
        body: a backbone of ours, or one of timm's, with ``forward_intermediates``.
        strides: image pixels a pixel of the maps that are taken, rising.
        extra: makes coarser maps of them.

    Raises:
        InputError: the backbone has no map of one of the strides.

    Source: FPN, arXiv 1612.03144.
    """

    def __init__(
        self, body: nn.Module, strides: Sequence[int], extra: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        widths = list_widths(body)
        # Of stages with one stride the last.
        stages = {stride: stage for stage, (stride, _) in enumerate(widths)}
        if not set(strides) <= stages.keys():
            found = ", ".join(map(str, stages)) or "none"
            raise InputError(
                f"dense prediction takes maps of strides {', '.join(map(str, strides))}, and this "
                f"backbone has {found}; name a pyramid, for example --model pvt_v2_b0."
            )
        self.body = body
        self.stages = [stages[stride] for stride in strides]
        # A classifier would have weights that no gradient reaches.
        body.prune_intermediate_layers(self.stages)  # type: ignore[operator]  # of any backbone
        self.out_channels = NUM_CHANNELS
        self.fpn = FeaturePyramidNetwork(
            [widths[stage][1] for stage in self.stages], NUM_CHANNELS, extra_blocks=extra
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body.forward_intermediates(  # type: ignore[operator]  # of any backbone
            images, indices=self.stages, intermediates_only=True
        )
        pyramid: dict[str, Tensor] = self.fpn(
            OrderedDict((str(level), x) for level, x in enumerate(maps))
        )
        return pyramid

    def no_weight_decay(self) -> set[str]:
        """Name the backbone's parameters without weight decay, as entries of this module."""
        names: set[str] = getattr(self.body, "no_weight_decay", set)()
        return {f"body.{name}" for name in names}


def list_widths(body: nn.Module) -> list[tuple[int, int]]:
    """Give stride and channels of the map of each stage; nothing of a backbone without maps."""
    if not hasattr(body, "forward_intermediates"):
        return []
    return [(info["reduction"], info["num_chs"]) for info in body.feature_info]  # type: ignore[union-attr]
