"""Pathfinder: labels by a search along the dashes, balance, and bytes that depend on the index."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ecoformer.data.pathfinder import SIDE, Pathfinder

# Steps between lit pixels that a gap of one pixel needs.
_STEPS = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if 0 < y * y + x * x <= 5]


def dots_are_connected(image: np.ndarray) -> bool:
    """Walk from one dot over lit pixels that lie at most 2.3 pixels from each other."""
    labels, count = ndimage.label(image > 225)
    assert count == 2, f"{count} dots"
    lit = {(int(y), int(x)) for y, x in np.argwhere(image > 25)}
    reached = [(int(y), int(x)) for y, x in np.argwhere(labels == 1)]
    seen = set(reached)
    for y, x in reached:
        for step_y, step_x in _STEPS:
            pixel = (y + step_y, x + step_x)
            if pixel in lit and pixel not in seen:
                seen.add(pixel)
                reached.append(pixel)
    return any(labels[pixel] == 2 for pixel in reached)


def test_the_label_is_what_a_search_along_the_dashes_finds() -> None:
    data = Pathfinder("train")
    for index in range(200):
        tokens, label = data.read(index)
        assert tokens.shape == (SIDE**2,) and tokens.min() >= 0 and tokens.max() < data.num_words
        assert dots_are_connected(tokens.reshape(SIDE, SIDE)) == label, index
        assert label == index % 2


def test_an_image_depends_on_split_and_index_alone() -> None:
    first = Pathfinder("train")
    later = [first.read(index)[0].tobytes() for index in (5, 3, 5)]
    assert later[0] == later[2] == Pathfinder("train").read(5)[0].tobytes()
    assert later[0] != later[1]
    assert later[0] != Pathfinder("val").read(5)[0].tobytes()


def test_light_does_not_tell_the_class() -> None:
    data = Pathfinder("val")
    sums = np.array([data.read(index)[0].sum() for index in range(200)])
    spread = sums.std() * (4 / len(sums)) ** 0.5
    assert abs(sums[1::2].mean() - sums[::2].mean()) < 4 * spread
