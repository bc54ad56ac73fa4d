"""SCENES: boxes and masks that the pixels agree with, and canvases that their place decides."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from ecoformer.data.digits import SPLITS, read_digits
from ecoformer.data.scenes import NUM_CANVASES, SceneMaps, Scenes, open_scenes
from ecoformer.errors import InputError
from tests.data.images import write_fashion

SIDE = 128


def read_both(scenes: Scenes, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, map, boxes and labels of one canvas; training ones are seeded by the index."""
    random.seed(index)
    image, boxes = scenes.read(index)
    random.seed(index)
    again, labels = SceneMaps(scenes).read(index)
    assert image.mode == "RGB" and image.tobytes() == again.tobytes()
    assert boxes.size == labels.shape == (scenes.side, scenes.side)
    return np.asarray(image), labels, boxes.boxes.astype(int), boxes.labels


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("side", [64, 128, 301])
def test_a_box_ends_where_its_mask_does(split: str, side: int) -> None:
    scenes = open_scenes(None, split, side=side)
    for index in range(20):
        _, labels, boxes, classes = read_both(scenes, index)
        left = labels.copy()
        for (x1, y1, x2, y2), label in zip(boxes, classes, strict=True):
            assert 0 <= x1 < x2 <= side and 0 <= y1 < y2 <= side
            is_item = labels[y1:y2, x1:x2] == 1 + label
            for edge in (is_item[0], is_item[-1], is_item[:, 0], is_item[:, -1]):
                assert edge.any()
            # Nothing else lies in a box.
            assert (is_item == (labels[y1:y2, x1:x2] > 0)).all()
            left[y1:y2, x1:x2] = 0
        assert not left.any()


def test_masks_are_where_items_were_painted() -> None:
    scenes = open_scenes(None, "val", side=256)
    for index in range(20):
        pixels, labels, _, _ = read_both(scenes, index)
        darkest = pixels.min(axis=-1)
        # The ground has at most 100, and outside of its mask an item adds a quarter of 255 to it.
        assert not ((darkest >= 140) & (labels == 0)).any()
        assert darkest[labels == 0].mean() < 50 < 100 < darkest[labels > 0].mean()


def test_items_are_many_apart_and_of_all_sizes() -> None:
    scenes = open_scenes(None, "train", side=256)
    counts, sides = [], []
    for index in range(150):
        random.seed(index)
        _, items = scenes.draw(index)
        counts.append(len(items))
        sides += [item.side for item in items]
        for one, other in combinations(items, 2):
            apart = [
                a + one.side <= b or b + other.side <= a
                for a, b in ((one.top, other.top), (one.left, other.left))
            ]
            assert any(apart)
    assert min(counts) >= 3 and max(counts) == 12
    assert (min(sides), max(sides)) == (20, 64)


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_balanced_within_a_percent(split: str) -> None:
    """Though the digits of a split are not: 27 to 44 of 360."""
    scenes = open_scenes(None, split, side=256)
    random.seed(0)
    labels = [
        scenes.items.labels[item.image]
        for index in range(1500)
        for item in scenes.draw_items(index)
    ]
    shares = np.bincount(labels, minlength=10) / len(labels)
    assert np.abs(shares - 0.1).max() < 0.01


def test_a_large_canvas_has_more_items() -> None:
    scenes = open_scenes(None, "val", side=1024)
    assert len(scenes.read(1)[1].labels) > 12


def test_no_held_out_digit_is_seen_in_training() -> None:
    train, val = (open_scenes(None, split, side=SIDE).items.images for split in SPLITS)
    held_out = {image.tobytes() for image in val}
    assert len(train) + len(val) == 1797
    assert not any(image.tobytes() in held_out for image in train)
    np.testing.assert_array_equal(val, read_digits("val")[0])


def test_the_ground_truth_is_what_reading_gives() -> None:
    scenes = open_scenes(None, "val", side=SIDE)
    truth = scenes.ground_truth()
    assert [image["id"] for image in truth["images"]] == list(range(NUM_CANVASES["val"]))
    assert [one["id"] for one in truth["annotations"]] == [*range(1, len(truth["annotations"]) + 1)]
    names = {one["id"]: one["name"] for one in truth["categories"]}
    for index in (0, 7, 499):
        boxes = scenes.read(index)[1]
        assert boxes.image_id == index
        found = [one for one in truth["annotations"] if one["image_id"] == index]
        corners = boxes.boxes.copy()
        corners[:, 2:] -= corners[:, :2]
        assert [one["bbox"] for one in found] == corners.tolist()
        assert [one["area"] for one in found] == corners[:, 2:].prod(axis=1).tolist()
        labels = [scenes.class_names[label] for label in boxes.labels]
        assert [names[one["category_id"]] for one in found] == labels
        assert not any(one["iscrowd"] for one in found)


def test_a_held_out_canvas_depends_on_its_number_and_side_alone() -> None:
    random.seed(1)
    image, _ = open_scenes(None, "val", side=SIDE).read(3)
    random.seed(2)
    again, _ = open_scenes(None, "val", side=SIDE).read(3)
    assert image.tobytes() == again.tobytes()
    assert image.tobytes() != open_scenes(None, "val", side=SIDE).read(4)[0].tobytes()


def test_a_training_canvas_depends_on_the_generator_alone() -> None:
    scenes = open_scenes(None, "train", side=SIDE)
    random.seed(1)
    first, second = scenes.read(3)[0].tobytes(), scenes.read(3)[0].tobytes()
    random.seed(1)
    assert scenes.read(4)[0].tobytes() == first != second


def test_items_are_fashion_where_its_files_are_given(tmp_path: Path) -> None:
    # Dark ones are painted as bright as others.
    train, held_out = np.zeros((2, 20, 28, 28), np.uint8)
    train[:, :8] = held_out[:, 20:] = 30
    write_fashion(tmp_path, train, held_out)
    for split, is_upper in (("train", True), ("val", False)):
        scenes = open_scenes(str(tmp_path), split, side=SIDE)
        assert scenes.class_names[9] == "Ankle boot"
        assert scenes.fingerprint() != open_scenes(None, split, side=SIDE).fingerprint()
        image, items = scenes.draw(0)
        for item in items:
            rows = np.flatnonzero(scenes.mask(item).any(axis=1))
            assert (rows.mean() < item.side / 2) == is_upper
            middle = item.left + item.side // 2, item.top + round(rows.mean())
            assert image.getpixel(middle) == item.colour
    with pytest.raises(InputError, match="gone is no folder"):
        open_scenes(str(tmp_path / "gone"), "train", side=SIDE)


@pytest.mark.parametrize("side", [63, 1025])
def test_other_sides_are_refused(side: int) -> None:
    with pytest.raises(InputError, match=rf"64 to 1024 pixels a side, not {side}; give --short-s"):
        open_scenes(None, "train", side=side)
