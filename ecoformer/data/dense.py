"""Detection and segmentation: open a data set, transform an image with what is on it, batch both.

Transforms take an image, RGB, and its boxes or map, and draw from PyTorch's global generator alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecoformer.data.boxes import BoxedImages, Boxes
from ecoformer.data.coco import open_coco
from ecoformer.data.label_maps import IGNORED, LabelMaps, open_label_map_folder
from ecoformer.data.pixels import PaddedBatch
from ecoformer.data.scenes import SceneMaps, open_scenes
from ecoformer.errors import InputError

BOX_SETS = ("SCENES", "COCO")
LABEL_MAP_SETS = ("SCENES", "ADE20K")
# Sides of a batch are multiples of it: the stride of a backbone's last stage.
STRIDE = 32
# Of a training image for segmentation, its short side to that of the crop.
_SCALES = (0.5, 2.0)
# An evaluated one: its long side to the short one.
_LONGEST = 4

BoxTarget: TypeAlias = dict[str, Tensor]
BoxTransform: TypeAlias = Callable[[Image.Image, Boxes], tuple[Tensor, BoxTarget]]
# The second tensor is the map as it was, None in training.
MapTarget: TypeAlias = tuple[Tensor, Tensor | None]
MapTransform: TypeAlias = Callable[[Image.Image, np.ndarray], tuple[Tensor, MapTarget]]


def open_boxes(name: str, path: str | None, split: str, *, side: int) -> BoxedImages:
    """Open one split of a data set for detection, ``"train"`` or ``"val"``.

    Args:
        name: one of ``BOX_SETS``.
        path: folder of COCO; that of Fashion-MNIST makes scenes of it, without they are of digits.
        side: of a canvas of scenes, pixels.

    Raises:
        InputError: the data are not there, or not as they should be; or pycocotools is not.
    """
    _require_set(name, path, BOX_SETS, "detection")
    if importlib.util.find_spec("pycocotools") is None:
        raise InputError("AP is measured by pycocotools: pip install 'ecoformer[detection]'.")
    if name == "SCENES":
        return open_scenes(path, split, side=side)
    assert path is not None
    return open_coco(path, split)


def open_label_maps(name: str, path: str | None, split: str, *, side: int) -> LabelMaps:
    """Open one split of a data set for segmentation; as ``open_boxes``, of ``LABEL_MAP_SETS``."""
    _require_set(name, path, LABEL_MAP_SETS, "segmentation")
    if name == "SCENES":
        return SceneMaps(open_scenes(path, split, side=side))
    assert path is not None
    return open_label_map_folder(path, split)


def _require_set(name: str, path: str | None, names: Sequence[str], task: str) -> None:
    if name not in names:
        raise InputError(
            f"--data-set {name} has nothing for --task {task}; there are: {', '.join(names)}."
        )
    if not path and name != "SCENES":
        raise InputError(f"data set {name} needs its folder; give --data-path.")


def build_box_transform(*, short_side: int, long_side: int, hflip: float = 0.0) -> BoxTransform:
    """Build the transform of one split for detection.

    Args:
        short_side: that an image gets, pixels, unless its long side would exceed ``long_side``.
        hflip: probability of a flip; 0 where left and right differ, and to evaluate.

    Returns:
        A function to [height, width, 3], uint8, and a dict of tensors: boxes [n, 4], float32,
        pixels of that image; labels [n] and is_crowd [n], int64 and bool; image_id [] and
        original_size [2] (height, width), int64.
    """
    return partial(_transform_boxes, short_side=short_side, long_side=long_side, hflip=hflip)


def _transform_boxes(
    image: Image.Image, boxes: Boxes, *, short_side: int, long_side: int, hflip: float
) -> tuple[Tensor, BoxTarget]:
    height, width = fit_size(boxes.size, short_side, long_side)
    pixels = _take(image.resize((width, height), Image.Resampling.BILINEAR))
    scale = torch.tensor([width / boxes.size[1], height / boxes.size[0]]).repeat(2)
    corners = torch.from_numpy(boxes.boxes) * scale
    if _is_flipped(hflip):
        pixels = pixels.flip(1)
        left, top, right, bottom = corners.unbind(-1)
        corners = torch.stack([width - right, top, width - left, bottom], dim=-1)
    return pixels, {
        "boxes": corners,
        # Copies: the set's own must not change with a batch.
        "labels": torch.tensor(boxes.labels),
        "is_crowd": torch.tensor(boxes.is_crowd),
        "image_id": torch.tensor(boxes.image_id),
        "original_size": torch.tensor(boxes.size),
    }


def build_train_map_transform(*, side: int, hflip: float = 0.0) -> MapTransform:
    """Build the random transform of training images for segmentation.

    The short side becomes half to twice as long as ``side``; then a square of that is cut out.

    Returns:
        A function to [height, width, 3], uint8, and labels [height, width], uint8, with None; both
        sides are ``side``, unless the image has less.
    """
    return partial(_transform_train_map, side=side, hflip=hflip)


def _transform_train_map(
    image: Image.Image, labels: np.ndarray, *, side: int, hflip: float
) -> tuple[Tensor, MapTarget]:
    short_side = _draw(*(round(scale * side) for scale in _SCALES))
    image, resized = _resize_both(image, labels, short_side)
    top, left = (_draw(0, max(length - side, 0)) for length in (image.height, image.width))
    square = (left, top, min(left + side, image.width), min(top + side, image.height))
    pixels, target = _take(image.crop(square)), _take(resized.crop(square))
    if _is_flipped(hflip):
        pixels, target = pixels.flip(1), target.flip(1)
    return pixels, (target, None)


def build_eval_map_transform(*, side: int) -> MapTransform:
    """Build the fixed transform of evaluated images: whole, the short side ``side`` long.

    Returns:
        A function to [height, width, 3], uint8, and labels of that size, uint8, with those of the
        original one, [height, width], uint8.
    """
    return partial(_transform_eval_map, side=side)


def _transform_eval_map(
    image: Image.Image, labels: np.ndarray, *, side: int
) -> tuple[Tensor, MapTarget]:
    image, resized = _resize_both(image, labels, side)
    return _take(image), (_take(resized), _take(labels))


def _resize_both(
    image: Image.Image, labels: np.ndarray, short_side: int
) -> tuple[Image.Image, Image.Image]:
    height, width = fit_size(labels.shape, short_side, _LONGEST * short_side)
    resized = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    return image.resize((width, height), Image.Resampling.BILINEAR), resized


def fit_size(size: Sequence[int], short_side: int, long_side: int) -> tuple[int, int]:
    """Scale a height and a width so that the short one fits, or the long one if that is less."""
    short, long = sorted(size)
    wanted, given = short_side, short
    if short_side * long > long_side * short:
        wanted, given = long_side, long
    # In whole numbers: a product of floats may end just below one.
    height, width = (max((2 * wanted * side + given) // (2 * given), 1) for side in size)
    return height, width


def collate_boxes(
    samples: Sequence[tuple[Tensor, BoxTarget]],
) -> tuple[PaddedBatch, Tensor, list[BoxTarget]]:
    """Make a batch for detection.

    Returns:
        Images, padded right and below to multiples of ``STRIDE``; their sizes [B, 2] (height,
        width), int64, without padding; the targets.
    """
    return *_pad_images([pixels for pixels, _ in samples]), [target for _, target in samples]


def collate_label_maps(
    samples: Sequence[tuple[Tensor, MapTarget]],
) -> tuple[PaddedBatch, Tensor, Tensor, list[Tensor]]:
    """Make a batch for segmentation.

    Returns:
        Images and sizes as ``collate_boxes``; labels [B, height, width], uint8, 255 where there are
        none; the maps of the original images, [height, width], uint8, none in training.
    """
    images, sizes = _pad_images([pixels for pixels, _ in samples])
    height, width = images.pixels.shape[1:3]
    labels = torch.full((len(samples), height, width), IGNORED, dtype=torch.uint8)
    for whole, (_, (target, _)) in zip(labels, samples, strict=True):
        whole[: target.shape[0], : target.shape[1]] = target
    originals = [original for _, (_, original) in samples if original is not None]
    return images, sizes, labels, originals


def _pad_images(images: Sequence[Tensor]) -> tuple[PaddedBatch, Tensor]:
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    height, width = (-(-max(sides) // STRIDE) * STRIDE for sides in zip(*sizes, strict=True))
    pixels = torch.zeros((len(images), height, width, 3), dtype=torch.uint8)
    for whole, image in zip(pixels, images, strict=True):
        whole[: image.shape[0], : image.shape[1]] = image
    return PaddedBatch(pixels, sizes), torch.tensor(sizes)


def _take(image: Image.Image | np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image))


def _is_flipped(hflip: float) -> bool:
    return hflip > 0 and float(torch.rand(())) < hflip


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
