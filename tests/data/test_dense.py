"""Detection and segmentation: what is on an image moves with it, and batches that a run repeats."""

from __future__ import annotations

import pickle
import random
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ecoformer.config.schema import DataConfig
from ecoformer.data import Loader, load_splits
from ecoformer.data.boxes import Boxes
from ecoformer.data.dense import (
    build_box_transform,
    build_eval_map_transform,
    build_train_map_transform,
    collate_boxes,
    collate_label_maps,
    fit_size,
    open_boxes,
    open_label_maps,
)
from ecoformer.data.loaders import Batch, Loaders
from ecoformer.engine.session import move_to
from ecoformer.errors import InputError
from tests.data.dense_files import write_coco, write_label_maps

CPU = torch.device("cpu")


def grey(pixels: Tensor) -> np.ndarray:
    """Values of [height, width, 3], uint8, of 0 to 255."""
    assert pixels.dtype == torch.uint8
    return pixels.numpy().mean(-1)


def boxes_of(corners: list[list[float]], size: tuple[int, int]) -> Boxes:
    return Boxes(
        np.array(corners, np.float32).reshape(-1, 4),
        np.arange(len(corners)),
        np.zeros(len(corners), bool),
        image_id=3,
        size=size,
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # Those of photographs: height and width.
        ((480, 640), (800, 1067)),
        ((640, 427), (1199, 800)),
        ((427, 640), (800, 1199)),
        ((426, 640), (800, 1202)),
        ((240, 640), (500, 1333)),
        ((800, 1333), (800, 1333)),
        ((1, 4000), (1, 1333)),
        ((7, 7), (800, 800)),
    ],
)
def test_the_short_side_fits_or_the_long_one(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit_size(size, 800, 1333) == expected


def test_sizes_are_never_a_pixel_off() -> None:
    for short in range(1, 700, 3):
        for long in (short, short + 1, 640):
            low, high = sorted((short, long))
            scale = min(Fraction(800, low), Fraction(1333, high))
            for side, found in zip((low, high), fit_size((low, high), 800, 1333), strict=True):
                assert abs(found - side * scale) <= Fraction(1, 2)
                assert fit_size((high, low), 800, 1333) == fit_size((low, high), 800, 1333)[::-1]


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(60, 100), (100, 60), (90, 300)])
def test_boxes_move_with_their_pixels(size: tuple[int, int], hflip: float) -> None:
    corners = [[5.0, 10.0, 35.0, 22.0], [40.0, 30.0, 55.0, 58.0]]
    height, width = size
    transform = build_box_transform(short_side=240, long_side=400, hflip=hflip)
    boxes = boxes_of(corners, size)
    _, target = transform(Image.new("RGB", (width, height)), boxes)
    for number, (left, top, right, bottom) in enumerate(corners):
        array = np.zeros((*size, 3), np.uint8)
        array[int(top) : int(bottom), int(left) : int(right)] = 255
        pixels, _ = transform(Image.fromarray(array), boxes)
        assert pixels.shape == (*fit_size(size, 240, 400), 3)
        is_bright = grey(pixels) > 127
        rows, columns = (np.flatnonzero(is_bright.any(axis)) for axis in (1, 0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(target["boxes"][number], found, atol=0.51)
    assert target["labels"].tolist() == [0, 1] and target["labels"].dtype == torch.int64
    assert target["is_crowd"].tolist() == [False, False]
    assert target["original_size"].tolist() == [height, width] and target["image_id"] == 3


def test_boxes_come_back_to_original_pixels() -> None:
    boxes = boxes_of([[5.25, 10.5, 35.0, 22.0]], (61, 100))
    transform = build_box_transform(short_side=240, long_side=400)
    pixels, target = transform(Image.new("RGB", (100, 61)), boxes)
    scale = target["original_size"] / torch.tensor(pixels.shape[:2])
    back = target["boxes"] * scale.flip(0).repeat(2)
    torch.testing.assert_close(back, torch.from_numpy(boxes.boxes))


def test_a_flip_is_drawn_from_the_seeded_generator() -> None:
    transform = build_box_transform(short_side=32, long_side=64, hflip=0.5)
    image, boxes = Image.new("RGB", (40, 32)), boxes_of([[0, 0, 10, 10]], (32, 40))

    def draw(seed: int) -> float:
        torch.manual_seed(seed)
        return float(transform(image, boxes)[1]["boxes"][0, 0])

    lefts = [draw(seed) for seed in range(200)]
    assert lefts == [draw(seed) for seed in range(200)]
    assert set(lefts) == {0.0, 30.0} and 60 < lefts.count(0.0) < 140


def test_changing_a_batch_leaves_the_set_alone() -> None:
    boxes = boxes_of([[0, 0, 10, 10]], (32, 40))
    transform = build_box_transform(short_side=32, long_side=64)
    _, target = transform(Image.new("RGB", (40, 32)), boxes)
    for value in target.values():
        value.fill_(7)
    assert boxes.boxes.tolist() == [[0, 0, 10, 10]]
    assert boxes.labels.tolist() == [0] and not boxes.is_crowd.any()


def quarters(height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """Four fields, as bright as their label says."""
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 2, width // 2 :] = 50
    labels[height // 2 :, : width // 2] = 100
    labels[height // 2 :, width // 2 :] = 150
    return Image.fromarray(labels).convert("RGB"), labels


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (40, 90), (200, 130)])
def test_labels_move_with_their_pixels(size: tuple[int, int], hflip: float) -> None:
    transform = build_train_map_transform(side=48, hflip=hflip)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, (labels, original) = transform(*quarters(*size))
        assert original is None
        assert labels.dtype == torch.uint8 and labels.shape == pixels.shape[:2]
        assert max(labels.shape) <= 48
        # Between two fields, pixels are blended and labels are not.
        is_equal = np.abs(grey(pixels) - labels.numpy()) < 1
        assert is_equal.mean() > 0.7
        seen.add(tuple(labels.shape))
    # An image that was made smaller than the crop is whole.
    assert len(seen) > 2 and (48, 48) in seen


def test_scales_reach_from_half_to_double() -> None:
    transform = build_train_map_transform(side=40)
    # A long image, so that the crop cuts its long side alone where the short one is below 40.
    shorts = set()
    for seed in range(300):
        torch.manual_seed(seed)
        shorts.add(transform(*quarters(20, 60))[0].shape[0])
    assert shorts == set(range(20, 41))
    is_square = []
    for seed in range(100):
        torch.manual_seed(seed)
        is_square.append(tuple(transform(*quarters(64, 64))[0].shape) == (40, 40, 3))
    # From 20 to 80: two thirds.
    assert 50 < sum(is_square) < 85


def test_an_evaluated_map_stays_as_it_was() -> None:
    image, labels = quarters(90, 131)
    pixels, (resized, original) = build_eval_map_transform(side=48)(image, labels)
    assert pixels.shape[:2] == resized.shape == fit_size((90, 131), 48, 192) == (48, 70)
    assert original is not None and original.dtype == torch.uint8
    np.testing.assert_array_equal(original, labels)


def test_transforms_reach_workers_that_are_not_forked() -> None:
    boxes = boxes_of([[1, 2, 9, 8]], (32, 40))
    box_transform = build_box_transform(short_side=48, long_side=90, hflip=0.5)
    map_transform = build_train_map_transform(side=40, hflip=0.5)
    for transform, sample in (
        (box_transform, (Image.effect_noise((40, 32), 80).convert("RGB"), boxes)),
        (map_transform, quarters(64, 64)),
        (build_eval_map_transform(side=40), quarters(64, 64)),
    ):
        copy = pickle.loads(pickle.dumps(transform))
        torch.manual_seed(4)
        expected = transform(*sample)
        torch.manual_seed(4)
        assert equal([expected], [copy(*sample)])


def build_plain_image(pixels: Tensor) -> Tensor:
    """As networks take it, [3, height, width], written anew."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / std).permute(2, 0, 1)


def test_boxes_become_a_padded_batch() -> None:
    transform = build_box_transform(short_side=40, long_side=100)
    samples = [
        transform(Image.new("RGB", (width, height), "white"), boxes_of(corners, (height, width)))
        for height, width, corners in (
            (40, 60, [[1.0, 2.0, 3.0, 4.0]]),
            (80, 80, []),
            (40, 97, [[0.0, 0.0, 97.0, 40.0], [1.0, 1.0, 2.0, 2.0]]),
        )
    ]
    packed, sizes, targets = collate_boxes(samples)
    images = packed.unpack(CPU)
    assert len(packed) == 3 and images.shape == (3, 3, 64, 128) and images.dtype == torch.float32
    assert sizes.tolist() == [[40, 60], [40, 40], [40, 97]] and sizes.dtype == torch.int64
    assert [tuple(target["boxes"].shape) for target in targets] == [(1, 4), (0, 4), (2, 4)]
    for image, (height, width), (pixels, _) in zip(images, sizes.tolist(), samples, strict=True):
        expected = build_plain_image(pixels)
        torch.testing.assert_close(image[:, :height, :width], expected, atol=1e-6, rtol=0)
        assert not image[:, height:].any() and not image[:, :, width:].any()


def test_label_maps_become_a_padded_batch() -> None:
    transform = build_eval_map_transform(side=40)
    samples = [transform(*quarters(*size)) for size in ((40, 60), (80, 80), (31, 97))]
    images, sizes, labels, originals = collate_label_maps(samples)
    assert images.unpack(CPU).shape == (3, 3, 64, 128) and labels.shape == (3, 64, 128)
    # A byte a pixel on the way to the device.
    assert labels.dtype == torch.uint8 and {one.dtype for one in originals} == {torch.uint8}
    assert sizes.tolist() == [[40, 60], [40, 40], [40, 125]]
    assert [tuple(original.shape) for original in originals] == [(40, 60), (80, 80), (31, 97)]
    for one, (height, width), (_, (target, _)) in zip(labels, sizes.tolist(), samples, strict=True):
        assert torch.equal(one[:height, :width], target)
        assert (one[height:] == 255).all() and (one[:, width:] == 255).all()
    train = build_train_map_transform(side=40)
    assert collate_label_maps([train(*quarters(64, 64))])[3] == []


Build = Callable[..., Loaders]


def build_boxes(**options: Any) -> Loaders:
    transforms = {
        "train": build_box_transform(short_side=96, long_side=160, hflip=0.5),
        "val": build_box_transform(short_side=96, long_side=160),
    }
    return _build(open_boxes, "COCO", transforms, collate_boxes, **options)


def build_maps(**options: Any) -> Loaders:
    transforms = {
        "train": build_train_map_transform(side=64, hflip=0.5),
        "val": build_eval_map_transform(side=64),
    }
    return _build(open_label_maps, "ADE20K", transforms, collate_label_maps, **options)


def _build(
    open_split: Callable[..., Any],
    real: str,
    transforms: dict[str, Any],
    collate: Any,
    *,
    path: Path | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **fields: Any,
) -> Loaders:
    name, place = (real, str(path)) if path else ("SCENES", None)
    splits = {split: open_split(name, place, split, side=96) for split in ("train", "val")}
    settings = {"batch_size": 4, "num_workers": 0, "repeated_aug": False, **fields}
    return load_splits(
        splits,
        transforms,
        DataConfig(**settings),
        seed=seed,
        rank=rank,
        world_size=world_size,
        pin_memory=False,
        collate=collate,
    )


def read(loader: Loader | None, num_batches: int = 3, **place: int) -> list[Batch]:
    assert loader is not None
    loader.set_epoch(place.get("epoch", 0), place.get("start_step", 0))
    return [move_to(batch, CPU) for _, batch in zip(range(num_batches), loader, strict=False)]


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value or ()
    return [tensor for one in values for tensor in flatten(one)]


def equal(left: list[Batch], right: list[Batch]) -> bool:
    ours, theirs = flatten(left), flatten(right)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("build", [build_boxes, build_maps])
def test_workers_change_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecoformer.data.loaders.num_cores", lambda: 3)
    alone = build()
    for num_workers in (1, 3):
        helped = build(num_workers=num_workers)
        assert equal(read(alone.train, epoch=1), read(helped.train, epoch=1))
        assert equal(read(alone.eval), read(helped.eval))


@pytest.mark.parametrize("build", [build_boxes, build_maps])
def test_an_epoch_goes_on_where_it_stopped(build: Build) -> None:
    whole = read(build().train, epoch=2)
    # What was read or drawn before leaves no trace.
    loader = build().train
    read(loader, 1)
    random.seed(9)
    torch.manual_seed(9)
    assert equal(read(loader, 1, epoch=2, start_step=2), whole[2:])


@pytest.mark.parametrize("build", [build_boxes, build_maps])
def test_seed_and_epoch_change_batches_and_ranks_share_them(build: Build) -> None:
    first = read(build().train, 1)
    assert not equal(first, read(build(seed=1).train, 1))
    assert not equal(first, read(build().train, 1, epoch=1))
    assert equal(read(build().eval, 1), read(build(seed=1).eval, 1, epoch=3))
    # One by one, so that batches are not padded to each other.
    alone = read(build(batch_size=1).train, 4)
    for rank in (0, 1):
        share = read(build(batch_size=1, rank=rank, world_size=2).train, 2)
        assert equal(share, alone[rank::2])


def test_published_layouts_are_read(tmp_path: Path) -> None:
    boxes = build_boxes(path=write_coco(tmp_path / "coco"), batch_size=2)
    (batch,) = read(boxes.train)
    assert sorted(target["image_id"].item() for target in batch[2]) == [4, 9]
    assert batch[0].shape[-1] % 32 == 0
    found = [t["image_id"].item() for batch in read(boxes.eval) for t in batch[2]]
    assert found == [9, 4, 7, 5]
    maps = build_maps(path=write_label_maps(tmp_path / "ade"), batch_size=3)
    images, _, labels, _ = read(maps.train)[0]
    assert images.shape[-2:] == labels.shape[-2:] == (64, 64)
    assert set(labels.unique().tolist()) <= {*range(150), 255}


def test_a_bad_map_stops_a_run_or_is_skipped(tmp_path: Path) -> None:
    write_label_maps(tmp_path)
    file = tmp_path / "annotations" / "training" / "001.png"
    Image.new("L", (9, 9)).save(file)
    image = tmp_path / "images" / "training" / "001.png"
    with pytest.raises(InputError) as caught:
        read(build_maps(path=tmp_path, batch_size=3).train)
    assert str(caught.value).startswith(
        f"cannot read {image} (its map {file} has 9 x 9 pixels, not 50 x 41); replace or delete it."
    )
    loader = build_maps(path=tmp_path, batch_size=3, max_bad_images=1).train
    assert len(read(loader)) == 1
    assert loader is not None and list(loader.bad_images) == [1]


def test_data_sets_of_other_tasks_are_refused(tmp_path: Path) -> None:
    for open_split, name, task, names in (
        (open_boxes, "ADE20K", "detection", "SCENES, COCO"),
        (open_label_maps, "COCO", "segmentation", "SCENES, ADE20K"),
    ):
        expected = f"--data-set {name} has nothing for --task {task}; there are: {names}"
        with pytest.raises(InputError, match=re.escape(expected)):
            open_split(name, str(tmp_path), "train", side=96)
    for open_split, name in ((open_boxes, "COCO"), (open_label_maps, "ADE20K")):
        with pytest.raises(InputError, match=f"data set {name} needs its folder"):
            open_split(name, None, "train", side=96)


def test_pycocotools_may_be_missing_until_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    for split in ("train", "val"):
        assert len(open_label_maps("SCENES", None, split, side=96))
        with pytest.raises(InputError, match=r"pip install 'ecoformer\[detection\]'\.$"):
            open_boxes("SCENES", None, split, side=96)
