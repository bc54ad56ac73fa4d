"""PVTv2 backbones with EcoFormer attention and the kinds it is compared with."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from ecoformer.hash_config import HashConfig
from pvt.family import FAMILY
from pvt.variants import PVT_VARIANTS

if TYPE_CHECKING:
    import torch

    from pvt.model import PyramidVisionTransformerV2

__all__ = ["FAMILY", "PVT_VARIANTS", "create_model"]


def create_model(
    variant: str,
    attention: str = "ecoformer",
    *,
    num_classes: int = 1000,
    hashing: HashConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> PyramidVisionTransformerV2:
    """Build a PVTv2 with fresh weights: [B, in_chans, height, width] -> [B, num_classes].

    Args:
        variant: ``"pvt_v2_b0"`` to ``"pvt_v2_b5"``, or ``"pvt_v2_b2_li"``.
        attention: ``"ecoformer"``, ``"msa"``, ``"msa_share_qk"``, ``"sra"``, ``"performer"``, or a
            kind that was registered.
        num_classes: 0 gives the features before the classifier.
        hashing: settings of EcoFormer attention; the published ones where None.
        options: named as in timm. ``in_chans``; ``global_pool``: ``"avg"``, or ``""`` for maps
            alone; ``drop_rate``: dropout before the classifier; ``proj_drop_rate``: in
            attention and MLP; ``drop_path_rate``: stochastic depth of the last block.

    Raises:
        InputError: no such variant, or the variant has no such attention.
    """
    FAMILY.check(variant, attention)
    from pvt.model import PyramidVisionTransformerV2

    model = PyramidVisionTransformerV2(
        PVT_VARIANTS[variant], attention, num_classes=num_classes, hashing=hashing, **options
    )
    # Drawn on the CPU: a seed gives the same weights everywhere.
    return model.to(device=device, dtype=dtype)


# At once where it is imported already; timm takes seconds, which not all who come here need.
@when_imported("timm.models")
def _register(_: ModuleType) -> None:
    from ecoformer.checkpoint.timm_entry import register_with_timm

    register_with_timm(FAMILY)
