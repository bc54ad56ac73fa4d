"""RetinaNet: torchvision's heads, loss and suppression, over any backbone with maps.

Shapes: B images, A anchors of all levels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ecoformer.models.dense.maps import NUM_CHANNELS, FeaturePyramid, list_widths
from ecoformer.ops import as_full_precision

_BACKBONE_STRIDES = (8, 16, 32)
_STRIDES = (*_BACKBONE_STRIDES, 64, 128)
# As COCO counts them.
_MAX_DETECTIONS = 100

Detections = list[dict[str, Tensor]]


class RetinaNet(TorchvisionRetinaNet):
    """Images [B, 3, height, width], normalised, to what heads say of each anchor.

    ``forward`` has no part in training or evaluation: ``loss`` and ``detect`` take what it gives,
    and hold no weights.

    Args:
        body: a backbone with maps of strides 8, 16 and 32.
        num_classes: K; labels are below it, and the background is none of them.

    Raises:
        InputError: the backbone lacks such a map.

    Source: focal loss, arXiv 1708.02002; coarse levels from the backbone's last map, as there.
    """

    def __init__(self, body: nn.Module, num_classes: int) -> None:
        coarse = LastLevelP6P7(dict(list_widths(body)).get(32, NUM_CHANNELS), NUM_CHANNELS)
        # torchvision looks at the widths, which may be alike by chance.
        coarse.use_P5 = False
        super().__init__(
            FeaturePyramid(body, _BACKBONE_STRIDES, coarse),
            num_classes,
            detections_per_img=_MAX_DETECTIONS,
        )
        # What loading asks of a classifier that may have other classes in a file.
        self.pretrained_cfg = {"classifier": "head.classification_head.cls_logits"}
        self.outputs_a_class = self.head.classification_head.num_anchors
        # Images are resized, normalised and padded where they are loaded.
        del self.transform

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Run the network.

        Returns:
            ``cls_logits`` [B, A, K], ``bbox_regression`` [B, A, 4], offsets from anchors, and
            ``grids``, the (height, width) of each level.
        """
        maps = list(self.backbone(images).values())
        return {**self.head(maps), "grids": [(x.shape[-2], x.shape[-1]) for x in maps]}

    def loss(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Focal loss of classes, and L1 of boxes, both a foreground anchor, mean over images.

        Args:
            targets: of each image, ``boxes`` [n, 4], pixels of the padded images, and ``labels``
                [n], int64.
        """
        outputs = _upcast(outputs)
        anchors = [self._draw_anchors(outputs)] * len(targets)
        losses: dict[str, Tensor] = self.compute_loss(targets, outputs, anchors)
        return losses

    def detect(self, outputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> Detections:
        """Choose at most 100 boxes an image, the surest first.

        Args:
            sizes: (height, width) of each image, which no box leaves.

        Returns:
            Of each image ``boxes`` [n, 4], ``scores`` [n], float32, and ``labels`` [n], int64.
        """
        outputs = _upcast(outputs)
        num_anchors = self.anchor_generator.num_anchors_per_location()
        counts = [
            height * width * count
            for (height, width), count in zip(outputs["grids"], num_anchors, strict=True)
        ]
        levels = {
            name: list(outputs[name].split(counts, dim=1))
            for name in ("cls_logits", "bbox_regression")
        }
        anchors = [list(self._draw_anchors(outputs).split(counts))] * len(sizes)
        detections: Detections = self.postprocess_detections(levels, anchors, sizes)
        return detections

    def no_weight_decay(self) -> set[str]:
        """Name the backbone's parameters without weight decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def _draw_anchors(self, outputs: Mapping[str, Any]) -> Tensor:
        """[A, 4], around points that are a level's stride apart, whatever the image's sides."""
        offsets = outputs["bbox_regression"]
        generator = self.anchor_generator
        generator.set_cell_anchors(offsets.dtype, offsets.device)
        strides = [[torch.tensor(stride, device=offsets.device)] * 2 for stride in _STRIDES]
        return torch.cat(generator.grid_anchors(outputs["grids"], strides))


def _upcast(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Half a pixel at 1,333 is more than 16 bits hold."""
    return {
        name: as_full_precision(value) if isinstance(value, Tensor) else value
        for name, value in outputs.items()
    }
