"""Twins backbones with EcoFormer attention and the kinds it is compared with."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from ecoformer.hash_config import HashConfig
from twins.family import FAMILY
from twins.variants import TWINS_VARIANTS

if TYPE_CHECKING:
    import torch

    from twins.model import Twins

__all__ = ["FAMILY", "TWINS_VARIANTS", "create_model"]


def create_model(
    variant: str,
    attention: str = "ecoformer",
    *,
    num_classes: int = 1000,
    hashing: HashConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Twins:
    """Build a Twins with fresh weights: [B, in_chans, height, width] -> [B, num_classes].

    Args:
        variant: ``"alt_gvt_{small,base,large}"`` (Twins-SVT) or
            ``"pcpvt_{small,base,large}_v0"``.
        attention: ``"ecoformer"``, ``"msa"``, or a kind that was registered; Twins-SVT also
            ``"lsa_msa"`` and ``"lsa_gsa"``, PCPVT also ``"sra"``.
        num_classes: 0 gives the features before the classifier.
        hashing: settings of EcoFormer attention; the published ones where None.
        options: named as in timm. ``in_chans``; ``global_pool``: ``"avg"``, or ``""`` for maps
            alone; ``drop_rate``: dropout before the classifier; ``proj_drop_rate``: in
            attention and MLP; ``pos_drop_rate``: after patch embeddings;
            ``drop_path_rate``: stochastic depth of the last block.

    Raises:
        InputError: no such variant, or the variant has no such attention.
    """
    FAMILY.check(variant, attention)
    from twins.model import Twins

    model = Twins(
        TWINS_VARIANTS[variant], attention, num_classes=num_classes, hashing=hashing, **options
    )
    # Drawn on the CPU: a seed gives the same weights everywhere.
    return model.to(device=device, dtype=dtype)


# At once where it is imported already; timm takes seconds, which not all who come here need.
@when_imported("timm.models")
def _register(_: ModuleType) -> None:
    from ecoformer.checkpoint.timm_entry import register_with_timm

    register_with_timm(FAMILY)
