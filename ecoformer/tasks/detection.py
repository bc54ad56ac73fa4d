"""Object detection by RetinaNet, measured by COCO's average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ecoformer.config import Config
from ecoformer.data.boxes import BoxedImages
from ecoformer.data.dense import build_box_transform, collate_boxes, open_boxes
from ecoformer.data.loaders import Collate, SampleTransform
from ecoformer.errors import InputError
from ecoformer.models.dense import RetinaNet
from ecoformer.tasks.average_precision import AveragePrecision
from ecoformer.tasks.base import Metrics, Network
from ecoformer.tasks.dense import DenseMeter, DensePrediction, cut_out


class Objects(NamedTuple):
    """What is found in an image, the surest first."""

    boxes: Tensor  # [n, 4], float32, corners, pixels of the original image
    scores: Tensor  # [n], float32
    labels: Tensor  # [n], int64


def find_objects(
    model: RetinaNet, outputs: Mapping[str, Any], size: tuple[int, int], original_size: Tensor
) -> Objects:
    """Read the outputs of one image.

    Args:
        outputs: of ``model`` for an image [1, 3, H, W].
        size: height and width of the image without padding, pixels.
        original_size: [2], int64, those of the image before it was resized.
    """
    (found,) = model.detect(outputs, [size])
    scale = original_size / torch.tensor(size, device=original_size.device)
    boxes = found["boxes"] * scale.flip(0).repeat(2)
    return Objects(boxes, found["scores"], found["labels"])


class DetectionMeter(DenseMeter):
    """Counts what is found in each image."""

    def __init__(self, model: RetinaNet, precision: AveragePrecision, device: torch.device) -> None:
        super().__init__(device)
        self._model = model
        self._precision = precision

    def add(self, network: Network, batch: Any) -> None:
        images, sizes, targets = batch
        for image, size, target in zip(images, sizes.tolist(), targets, strict=True):
            outputs = network(cut_out(image, size))
            self.check(outputs["cls_logits"], outputs["bbox_regression"])
            found = find_objects(self._model, outputs, size, target["original_size"])
            self._precision.add(int(target["image_id"]), *found)

    def measure(self) -> Metrics:
        values = self._precision.finish()
        return Metrics({f"test_{name}": value for name, value in values.items()}, "test_AP")


class Detection(DensePrediction):
    """Beside images and sizes, a batch has a dict of each image's boxes, as ``collate_boxes``."""

    default_classes = 80

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        data = config.data
        if data.long_side < data.short_side:
            raise InputError(
                f"long_side is {data.long_side}; expected at least short_side, {data.short_side}."
            )

    def open_split(self, split: str) -> BoxedImages:
        data = self.config.data
        return open_boxes(data.data_set, data.data_path, split, side=data.short_side)

    def build_transform(self, split: str) -> SampleTransform:
        return build_box_transform(
            short_side=self.config.data.short_side,
            long_side=self.config.data.long_side,
            hflip=self.hflip if split == "train" else 0.0,
        )

    def collate(self) -> Collate:
        return collate_boxes

    def build_network(self, body: nn.Module, num_classes: int) -> RetinaNet:
        # Kept for what holds no weights: loss and suppression.
        self._model = RetinaNet(body, num_classes)
        return self._model

    def loss(self, network: Network, batch: Any) -> Tensor:
        images, _, targets = batch
        # A crowd's box is that of no object.
        singles = [
            {name: target[name][~target["is_crowd"]] for name in ("boxes", "labels")}
            for target in targets
        ]
        losses = self._model.loss(network(images), singles)
        return torch.stack(list(losses.values())).sum()

    def start_evaluation(self, device: torch.device) -> DetectionMeter:
        return DetectionMeter(self._model, AveragePrecision(*self._truth), device)

    @cached_property
    def _truth(self) -> tuple[dict[str, Any], Sequence[int]]:
        assert self._loaders is not None
        images = cast(BoxedImages, self._loaders.eval.images)
        return images.ground_truth(), images.class_ids

    @property
    def input_sides(self) -> tuple[int, int]:
        data = self.config.data
        is_square = data.data_set == "SCENES"
        return data.short_side, data.short_side if is_square else data.long_side
