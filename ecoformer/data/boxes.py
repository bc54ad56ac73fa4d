"""Boxes of an image, and what a set of such images gives beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ecoformer.data.datasets import LabelledSamples


@dataclass(frozen=True)
class Boxes:
    """The objects of one image.

    Attributes:
        boxes: [n, 4], float32: left, top, right, bottom, pixels of the image; right and bottom are
            where the next pixel begins.
        labels: [n], int64, indices of the set's ``class_names``.
        is_crowd: [n], bool; true where a box holds many objects that nobody told apart.
        image_id: as in the set's ``ground_truth``.
        size: height and width of the image, pixels.
    """

    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    image_id: int
    size: tuple[int, int]


class BoxedImages(LabelledSamples, Protocol):
    """Images with boxes.

    Attributes:
        class_ids: what ``ground_truth`` calls the classes, in the order of ``class_names``.
    """

    class_ids: Sequence[int]

    def read(self, index: int) -> tuple[Image.Image, Boxes]:
        """Decode or draw an image, RGB, and give its objects."""

    def ground_truth(self) -> dict[str, Any]:
        """Lay all images out as COCO's format does, to measure detections against."""
