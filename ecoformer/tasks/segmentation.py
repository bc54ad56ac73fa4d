"""Semantic segmentation by Semantic FPN, measured by the mean intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecoformer.data.dense import (
    build_eval_map_transform,
    build_train_map_transform,
    collate_label_maps,
    open_label_maps,
)
from ecoformer.data.label_maps import IGNORED, LabelMaps
from ecoformer.data.loaders import Collate, SampleTransform
from ecoformer.models.dense import SemanticFpn
from ecoformer.ops import as_full_precision
from ecoformer.tasks.base import Metrics, Network
from ecoformer.tasks.dense import DenseMeter, DensePrediction, cut_out
from ecoformer.tasks.mean_iou import MeanIou


def label_pixels(logits: Tensor, size: tuple[int, int], original_size: Sequence[int]) -> Tensor:
    """Choose a class for each pixel of one image, before it was resized: [height, width], int64.

    Args:
        logits: [1, num_classes, H, W], float.
        size: height and width of the image without padding, pixels.
        original_size: those of the image before it was resized.
    """
    height, width = size
    logits = logits[..., :height, :width]
    if logits.shape[-2:] != tuple(original_size):
        logits = F.interpolate(logits, size=tuple(original_size), mode="bilinear")
    return logits.argmax(1).squeeze(0)


class SegmentationMeter(DenseMeter):
    """Pixels of the original images."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        super().__init__(device)
        self._iou = MeanIou(num_classes, device)

    def add(self, network: Network, batch: Any) -> None:
        images, sizes, _, originals = batch
        for image, size, labels in zip(images, sizes.tolist(), originals, strict=True):
            logits = as_full_precision(network(cut_out(image, size)))
            self.check(logits)
            self._iou.add(label_pixels(logits, size, labels.shape), labels)

    def measure(self) -> Metrics:
        values = self._iou.finish()
        return Metrics({f"test_{name}": value for name, value in values.items()}, "test_mIoU")


class Segmentation(DensePrediction):
    """Beside images and sizes, a batch has labels [B, H, W], uint8, as ``collate_label_maps``."""

    default_classes = 150
    sizes = ("short_side",)

    def open_split(self, split: str) -> LabelMaps:
        data = self.config.data
        return open_label_maps(data.data_set, data.data_path, split, side=data.short_side)

    def build_transform(self, split: str) -> SampleTransform:
        side = self.config.data.short_side
        if split == "train":
            return build_train_map_transform(side=side, hflip=self.hflip)
        return build_eval_map_transform(side=side)

    def collate(self) -> Collate:
        return collate_label_maps

    def build_network(self, body: nn.Module, num_classes: int) -> SemanticFpn:
        return SemanticFpn(body, num_classes)

    def loss(self, network: Network, batch: Any) -> Tensor:
        images, _, labels, _ = batch
        logits = as_full_precision(network(images))
        # On the device: on their way there they have a byte a pixel.
        total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
        # A crop may show nothing that counts.
        return total / (labels != IGNORED).sum().clamp(min=1)

    def start_evaluation(self, device: torch.device) -> SegmentationMeter:
        assert self._loaders is not None
        return SegmentationMeter(self._loaders.num_classes, device)
