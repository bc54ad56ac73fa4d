"""SCENES: canvases of many small items, whose boxes and masks are exact, drawn while they are read.

Items are of any size and colour, on a ground of coloured noise, and never overlap.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ecoformer.data.boxes import Annotation, Boxes, lay_out
from ecoformer.data.datasets import Fingerprint, ImageArray, open_items
from ecoformer.data.pairs import are_apart
from ecoformer.errors import InputError
from ecoformer.seeding import derive_seed

# Of a canvas, pixels.
MIN_SIDE, MAX_SIDE = 64, 1024
NUM_CANVASES = {"train": 4096, "val": 500}
# The side of the smallest item, pixels, and of the largest, share of the canvas.
_MIN_ITEM, _MAX_ITEM = 20, 1 / 4
# A canvas has an item for so many pixels of its side: at 256 px 4 to 12 items.
_PIXELS_AN_ITEM = (64, 21)
# Random places for one item before it is left out.
_MAX_TRIES = 50
# Of 255: an item is where it is at least as bright as that, before it is coloured.
_EDGE = 64
# Of a channel: the ground has at most, items at least.
_GROUND, _COLOUR = 100, 128
# The ground is of squares of this side, pixels, blurred.
_GRAIN = 16


class Item(NamedTuple):
    """An image by its number among the items, its square on the canvas, pixels, and its colour."""

    image: int
    top: int
    left: int
    side: int
    colour: tuple[int, int, int]


class Scenes:
    """One split of SCENES, as boxes.

    A training canvas draws from Python's global generator, which a loader seeds by (seed, epoch,
    place in the epoch), so its index says nothing. Canvas i of validation depends on i and the side
    alone. A box ends where its item's mask does.

    Args:
        items: grey images of each class; no other split may have them too.
        side: of a canvas, pixels.

    Raises:
        InputError: a side that there are no canvases of.
    """

    def __init__(self, items: ImageArray, split: str, *, side: int) -> None:
        if not MIN_SIDE <= side <= MAX_SIDE:
            raise InputError(
                f"a canvas of SCENES has {MIN_SIDE} to {MAX_SIDE} pixels a side, not {side}; give "
                "--short-side 256 or another of these."
            )
        self.items = items
        self.split = split
        self.side = side
        self.class_names: Sequence[str] = items.class_names
        self.class_ids: Sequence[int] = range(1, len(items.class_names) + 1)
        self._by_class = items.by_class()

    def __len__(self) -> int:
        return NUM_CANVASES[self.split]

    def read(self, index: int) -> tuple[Image.Image, Boxes]:
        canvas, items = self.draw(index)
        return canvas, self._find_boxes(items, index)

    def draw(self, index: int) -> tuple[Image.Image, list[Item]]:
        """Draw a canvas, RGB, and tell what is where."""
        generator = self._start(index)
        items = self._place(generator)
        canvas = _draw_ground(generator, self.side)
        for item in items:
            image = self._enlarge(item)
            square = (item.left, item.top, item.left + item.side, item.top + item.side)
            canvas.paste(item.colour, square, Image.fromarray(image))
        return canvas, items

    def draw_items(self, index: int) -> list[Item]:
        """Tell what is where on a canvas, without drawing it."""
        return self._place(self._start(index))

    def mask(self, item: Item) -> np.ndarray:
        """Tell which pixels of its square are an item's, [side, side], bool."""
        return self._enlarge(item) >= _EDGE

    def ground_truth(self) -> dict[str, Any]:
        assert self.split != "train", "training canvases change from epoch to epoch"
        annotations = []
        for index in range(len(self)):
            boxes = self._find_boxes(self.draw_items(index), index)
            for (left, top, right, bottom), label in zip(
                boxes.boxes.tolist(), boxes.labels.tolist(), strict=True
            ):
                box = (left, top, right - left, bottom - top)
                area = box[2] * box[3]
                annotations.append(Annotation(index, self.class_ids[label], box, area, False))
        sizes = dict.fromkeys(range(len(self)), (self.side, self.side))
        return lay_out(sizes, annotations, dict(zip(self.class_ids, self.class_names, strict=True)))

    def describe(self, index: int) -> str:
        return f"SCENES canvas {index}"

    def fingerprint(self) -> Fingerprint:
        """That of the items, which are what can differ, beside the number of canvases."""
        return {**self.items.fingerprint(), "num_images": len(self)}

    def _start(self, index: int) -> random.Random:
        is_train = self.split == "train"
        return random.Random(
            random.getrandbits(63) if is_train else derive_seed("SCENES", self.side, index)
        )

    def _place(self, generator: random.Random) -> list[Item]:
        """Place one item after the other; all classes are as likely, and small items find room."""
        fewest, most = (self.side // pixels for pixels in _PIXELS_AN_ITEM)
        largest = int(self.side * _MAX_ITEM)
        smallest = min(_MIN_ITEM, largest)
        items: list[Item] = []
        for _ in range(generator.randint(fewest, most)):
            image = generator.choice(generator.choice(self._by_class))
            red, green, blue = (generator.randint(_COLOUR, 255) for _ in range(3))
            # As many of 20 to 40 px as of 40 to 80.
            exponent = generator.uniform(math.log(smallest), math.log(largest + 1))
            side = min(int(math.exp(exponent)), largest)
            for _ in range(_MAX_TRIES):
                top, left = (generator.randint(0, self.side - side) for _ in range(2))
                square = (top, left, side)
                if all(are_apart(square, (one.top, one.left, one.side)) for one in items):
                    items.append(Item(image, top, left, side, (red, green, blue)))
                    break
        return items

    def _enlarge(self, item: Item) -> np.ndarray:
        """Draw an item alone, [side, side], uint8, its brightest pixel white."""
        pixels = self._white[item.image]
        size = (item.side, item.side)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    @cached_property
    def _white(self) -> np.ndarray:
        # Strokes touch the edge: a border keeps their ends round.
        images = np.pad(self.items.images, ((0, 0), (1, 1), (1, 1)))
        brightest = images.max(axis=(1, 2), keepdims=True).astype(np.float32)
        return (images * (255 / brightest.clip(1))).round().astype(np.uint8)

    def _find_boxes(self, items: list[Item], index: int) -> Boxes:
        boxes = [_enclose(self.mask(item), item.left, item.top) for item in items]
        return Boxes(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array([self.items.labels[item.image] for item in items], np.int64),
            np.zeros(len(items), bool),
            image_id=index,
            size=(self.side, self.side),
        )


class SceneMaps:
    """One split of SCENES, as maps of labels [side, side], uint8; label 0 is the ground."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self.class_names: Sequence[str] = ("ground", *scenes.class_names)

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        canvas, items = self.scenes.draw(index)
        labels = np.zeros((self.scenes.side, self.scenes.side), np.uint8)
        for item in items:
            square = labels[item.top : item.top + item.side, item.left : item.left + item.side]
            square[self.scenes.mask(item)] = 1 + self.scenes.items.labels[item.image]
        return canvas, labels

    def describe(self, index: int) -> str:
        return self.scenes.describe(index)

    def fingerprint(self) -> Fingerprint:
        return {**self.scenes.fingerprint(), "num_classes": len(self.class_names)}


def open_scenes(path: str | None, split: str, *, side: int) -> Scenes:
    """Open one split: of digits, or of Fashion-MNIST where its folder is given.

    Raises:
        InputError: its files are not there, or a side that there are no canvases of.
    """
    return Scenes(open_items("SCENES", path or None, split), split, side=side)


def _draw_ground(generator: random.Random, side: int) -> Image.Image:
    num_grains = side // _GRAIN
    pixels = generator.randbytes(3 * num_grains**2)
    grains = Image.frombytes("RGB", (num_grains, num_grains), pixels)
    darker = grains.point(lambda value: value * _GROUND // 255)
    return darker.resize((side, side), Image.Resampling.BICUBIC)


def _enclose(mask: np.ndarray, left: int, top: int) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        left + int(columns[0]),
        top + int(rows[0]),
        left + int(columns[-1]) + 1,
        top + int(rows[-1]) + 1,
    )
