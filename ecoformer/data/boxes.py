"""Boxes of an image, and what a set of such images gives beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Annotation(NamedTuple):
    """One object in COCO's terms: ids of its image and class, [left, top, width, height]."""

    image_id: int
    class_id: int
    box: Sequence[float]
    area: float
    is_crowd: bool


def lay_out(
    sizes: Mapping[int, tuple[int, int]],
    annotations: Iterable[Annotation],
    classes: Mapping[int, str],
) -> dict[str, Any]:
    """Build the content of an annotation file.

    Annotations are numbered from 1: pycocotools takes an id of 0 for none.

    Args:
        sizes: height and width by the id of an image.
        classes: names by id.
    """
    return {
        "images": [
            {"id": i, "height": height, "width": width} for i, (height, width) in sizes.items()
        ],
        "annotations": [
            {
                "id": number,
                "image_id": one.image_id,
                "category_id": one.class_id,
                "bbox": list(one.box),
                "area": one.area,
                "iscrowd": int(one.is_crowd),
            }
            for number, one in enumerate(annotations, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in classes.items()],
    }
