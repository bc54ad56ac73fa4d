"""Detection and segmentation over the maps of a backbone's stages."""

from __future__ import annotations

from ecoformer.models.dense.maps import FeaturePyramid
from ecoformer.models.dense.retinanet import RetinaNet
from ecoformer.models.dense.semantic_fpn import SemanticFpn

__all__ = ["FeaturePyramid", "RetinaNet", "SemanticFpn"]
