"""PAIRS: canvases of eight small items, two of one class, drawn while they are read.

What an item is can be told from near it, but which class comes twice only from all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from ecoformer.seeding import derive_seed

if TYPE_CHECKING:
    from ecoformer.data.datasets import Fingerprint, ImageArray

NUM_ITEMS = 8
NUM_CANVASES = {"train": 4096, "val": 1000}
# Sides of an item, shares of the canvas: at most half of a canvas is covered.
_ITEM_SIDES = (3 / 16, 4 / 16)
# Random places for one item before the canvas begins anew: what is there may leave no room.
_MAX_TRIES = 50

# Uniform in [0, 1), as random.random.
Draw = Callable[[], float]


class Item(NamedTuple):
    """An image by its number among the items, and the square of the canvas it fills, pixels."""

    image: int
    top: int
    left: int
    side: int


class Pairs:
    """One split of PAIRS.

    A training canvas draws from Python's global generator, which a loader seeds by (seed, epoch,
    place in the epoch), so its index says nothing. Canvas i of validation depends on i alone.

    Args:
        items: grey images of at least 7 classes; no other split may have them too.
        side: of a canvas, pixels.
    """

    def __init__(self, items: ImageArray, split: str, *, side: int) -> None:
        self.items = items
        self.split = split
        self.side = side
        self.class_names = items.class_names
        self._by_class = items.by_class()
        low, high = (round(share * side) for share in _ITEM_SIDES)
        self._item_sides = range(low, high + 1)

    def __len__(self) -> int:
        return NUM_CANVASES[self.split]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Draw a canvas, RGB, white on black, and give the class that comes twice."""
        is_train = self.split == "train"
        draw = random.random if is_train else random.Random(derive_seed("PAIRS", index)).random
        items, label = self.draw_items(draw)
        canvas = Image.new("L", (self.side, self.side))
        for item in items:
            image = Image.fromarray(self.items.images[item.image])
            size = (item.side, item.side)
            canvas.paste(image.resize(size, Image.Resampling.BICUBIC), (item.left, item.top))
        return canvas.convert("RGB"), label

    def draw_items(self, draw: Draw) -> tuple[list[Item], int]:
        """Choose what is where, the pair first, and give the pair's class.

        No two squares overlap. Every item of a class, and every side, is as likely as any other.
        """
        classes = list(range(len(self.class_names)))
        # The pair may be one image twice, seldom: as often as two drawn items are one.
        chosen = [classes.pop(_choose(draw, len(classes))) for _ in range(NUM_ITEMS - 1)]
        images = [
            self._by_class[label][_choose(draw, len(self._by_class[label]))]
            for label in (chosen[0], *chosen)
        ]
        squares = None
        while squares is None:
            squares = self._draw_squares(draw)
        # Later squares found less room: they must not tell which items are the pair.
        return [Item(image, *squares.pop(_choose(draw, len(squares)))) for image in images], chosen[
            0
        ]

    def _draw_squares(self, draw: Draw) -> list[tuple[int, int, int]] | None:
        """Place one square after the other, (top, left, side); None where one finds no room."""
        squares: list[tuple[int, int, int]] = []
        for _ in range(NUM_ITEMS):
            side = self._item_sides[_choose(draw, len(self._item_sides))]
            num_places = self.side - side + 1
            for _ in range(_MAX_TRIES):
                top, left = _choose(draw, num_places), _choose(draw, num_places)
                if all(are_apart((top, left, side), square) for square in squares):
                    squares.append((top, left, side))
                    break
            else:
                return None
        return squares

    def describe(self, index: int) -> str:
        return f"PAIRS canvas {index}"

    def fingerprint(self) -> Fingerprint:
        """That of the items, which are what can differ, beside the number of canvases."""
        return {**self.items.fingerprint(), "num_images": len(self)}


def are_apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Tell whether two squares (top, left, side) share no pixel."""
    side, size = one[2], other[2]
    return any(
        abs(2 * (a - b) + side - size) >= side + size
        for a, b in zip(one[:2], other[:2], strict=True)
    )


def _choose(draw: Draw, num_choices: int) -> int:
    return int(draw() * num_choices)
