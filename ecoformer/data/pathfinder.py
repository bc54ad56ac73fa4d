"""Pathfinder: are two dots the ends of one dashed contour?

The generator is this project's own. Every image has two long contours and two short ones; the dots
mark both ends of a long one, or an end of each, and nothing else depends on the class.

Source: arXiv 1805.08315; as a sequence of pixels, Long Range Arena, arXiv 2011.04006.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from ecoformer.data.datasets import Fingerprint, fingerprint_first
from ecoformer.seeding import derive_seed

SIDE = 32
# Dashes of the contours.
_LENGTHS = (14, 14, 4, 4)
NUM_IMAGES = {"train": 160000, "val": 20000, "test": 20000}
# Pixels.
_DASH, _GAP, _DOT_RADIUS, _MARGIN = 1.8, 1.0, 1.1, 2.5
# Between the lines of two contours, far more than a gap, and between far parts of one.
_CLEARANCE, _OWN_CLEARANCE = 5.0, 3.0
# Standard deviation of the turn from a dash to the next one, radians; each vain try widens it.
_TURN, _WIDENING = 0.45, 0.25
_MAX_TURNS, _MAX_STARTS = 12, 30
# Images are painted this many times as large, and shrunk.
_OVERSAMPLING = 8
_DASH_GREY, _DOT_GREY = 170, 255

Point: TypeAlias = tuple[float, float]


class Dash(NamedTuple):
    """A straight stroke, in pixels."""

    start: Point
    end: Point

    @property
    def points(self) -> tuple[Point, Point, Point]:
        (a, b), (c, d) = self
        return self.start, ((a + c) / 2, (b + d) / 2), self.end


class Pathfinder:
    """One split of Pathfinder, drawn while it is read.

    Image i depends on the split and i alone, and its dots are connected where i is odd.
    """

    class_names: Sequence[str] = ("apart", "connected")
    num_words = 256
    max_tokens = SIDE**2

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return NUM_IMAGES[self.split]

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Draw an image, its grey values row by row, [1024], int64, and tell its class."""
        generator = random.Random(derive_seed("PATHFINDER", self.split, index))
        label = index % 2
        contours = None
        while contours is None:
            contours = _draw_contours(generator)
        first, second = contours[:2]
        # Contours grow from their start, where there is more room: either end is as likely.
        ends = [first[0].start, first[-1].end]
        if not label:
            ends = [generator.choice(ends), generator.choice([second[0].start, second[-1].end])]
        return np.asarray(_paint(contours, ends)).astype(np.int64).ravel(), label

    def describe(self, index: int) -> str:
        return f"PATHFINDER {self.split} image {index}"

    def fingerprint(self) -> Fingerprint:
        return fingerprint_first(self)


def _draw_contours(generator: random.Random) -> list[list[Dash]] | None:
    """Draw one contour after the other; None where one finds no room."""
    contours: list[list[Dash]] = []
    taken: list[Point] = []
    for num_dashes in _LENGTHS:
        for _ in range(_MAX_STARTS):
            contour = _draw_contour(generator, num_dashes, taken)
            if contour is not None:
                break
        else:
            return None
        contours.append(contour)
        taken += (point for dash in contour for point in dash.points)
    return contours


def _draw_contour(
    generator: random.Random, num_dashes: int, taken: list[Point]
) -> list[Dash] | None:
    contour: list[Dash] = []
    own: list[Point] = []
    heading = generator.uniform(0, 2 * math.pi)
    end = (generator.uniform(0, SIDE), generator.uniform(0, SIDE))
    for _ in range(num_dashes):
        for tries in range(_MAX_TURNS):
            direction = heading + generator.gauss(0, _TURN * (1 + _WIDENING * tries))
            start = _move(end, direction, _GAP)
            dash = Dash(start, _move(start, direction, _DASH))
            # The end of the last dash is always near.
            if _has_room(dash, taken, _CLEARANCE) and _has_room(dash, own[:-4], _OWN_CLEARANCE):
                break
        else:
            return None
        contour.append(dash)
        own += dash.points
        heading, end = direction, dash.end
    return contour


def _move(point: Point, direction: float, distance: float) -> Point:
    return point[0] + distance * math.cos(direction), point[1] + distance * math.sin(direction)


def _has_room(dash: Dash, taken: list[Point], clearance: float) -> bool:
    # Plain loops: half of an image's time is spent here.
    low, high, smallest = _MARGIN, SIDE - _MARGIN, clearance * clearance
    for x, y in dash.points:
        if not (low <= x <= high and low <= y <= high):
            return False
        for a, b in taken:
            across, down = x - a, y - b
            if across * across + down * down < smallest:
                return False
    return True


def _paint(contours: list[list[Dash]], dots: list[Point]) -> Image.Image:
    image = Image.new("L", (SIDE * _OVERSAMPLING, SIDE * _OVERSAMPLING))
    draw = ImageDraw.Draw(image)

    def enlarge(*values: float) -> list[float]:
        return [value * _OVERSAMPLING for value in values]

    for contour in contours:
        for dash in contour:
            draw.line(enlarge(*dash.start, *dash.end), fill=_DASH_GREY, width=_OVERSAMPLING)
    for x, y in dots:
        radius = _DOT_RADIUS
        draw.ellipse(enlarge(x - radius, y - radius, x + radius, y + radius), fill=_DOT_GREY)
    return image.reduce(_OVERSAMPLING)
