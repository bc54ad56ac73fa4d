"""Twins backbones with EcoFormer attention and the kinds it is compared with."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import when_imported

from ecoformer.hash_config import HashConfig
from twins.family import FAMILY
from twins.variants import TWINS_VARIANTS

if TYPE_CHECKING:
    from twins.model import Twins

__all__ = ["FAMILY", "TWINS_VARIANTS", "create_model"]


def create_model(
    variant: str,
    attention: str = "ecoformer",
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    hashing: HashConfig | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Twins:
    """Build a Twins with fresh weights: [B, in_chans, height, width] -> [B, num_classes].

    Args:
        variant: ``"alt_gvt_{small,base,large}"`` (Twins-SVT) or
            ``"pcpvt_{small,base,large}_v0"``.
        attention: ``"ecoformer"``, ``"msa"``, or a kind that was registered; Twins-SVT also
            ``"lsa_msa"`` and ``"lsa_gsa"``, PCPVT also ``"sra"``.
        num_classes: 0 gives the features before the classifier.
        hashing: settings of EcoFormer attention; the published ones where None.
        drop_rate: dropout in attention and MLP.
        drop_path_rate: stochastic depth of the last block.

    Raises:
        InputError: no such variant, or the variant has no such attention.
    """
    FAMILY.check(variant, attention)
    from twins.model import Twins

    return Twins(
        TWINS_VARIANTS[variant],
        attention,
        num_classes=num_classes,
        in_chans=in_chans,
        hashing=hashing,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )


# At once where it is imported already; timm takes seconds, which not all who come here need.
@when_imported("timm.models")
def _register(_: ModuleType) -> None:
    from ecoformer.checkpoint.timm_entry import register_with_timm

    register_with_timm(FAMILY)
