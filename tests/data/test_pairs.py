"""PAIRS: right labels, items of one split alone, and canvases that only their place decides."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ecoformer.config.schema import AugmentConfig, DataConfig
from ecoformer.data import Loader, build_loaders
from ecoformer.data import loaders as loaders_module
from ecoformer.data.datasets import ImageArray, open_dataset
from ecoformer.data.digits import SPLITS, read_digits
from ecoformer.data.loaders import Loaders
from ecoformer.data.pairs import NUM_CANVASES, Pairs
from ecoformer.engine.session import move_to
from ecoformer.errors import InputError
from tests.data.images import write_fashion

# All that could change a canvas is on, but for mixing.
CPU = torch.device("cpu")
AUGMENT = AugmentConfig(mixup=0.0, cutmix=0.0)
SIDE = 48


def open_pairs(split: str, side: int = SIDE, path: Path | None = None) -> Pairs:
    pairs = open_dataset("PAIRS", str(path) if path else None, split, input_size=side)
    assert isinstance(pairs, Pairs)
    return pairs


def build(*, seed: int = 0, **options: Any) -> Loaders:
    fields = {"batch_size": 16, "num_workers": 0, "repeated_aug": False, **options}
    ranks = {name: fields.pop(name) for name in ("rank", "world_size") if name in fields}
    data = DataConfig(data_set="PAIRS", **fields)
    return build_loaders(data, AUGMENT, input_size=SIDE, seed=seed, **ranks)


def read(loader: Loader | None, num_batches: int = 2, **place: int) -> torch.Tensor:
    """The first batches of an epoch or of its rest: canvases, each with its label behind it."""
    assert loader is not None
    loader.set_epoch(place.get("epoch", 0), place.get("start_step", 0))
    batches = [move_to(batch, CPU) for _, batch in zip(range(num_batches), loader, strict=False)]
    return torch.cat([torch.hstack([x.flatten(1), y[:, None]]) for x, y in batches])


@pytest.mark.parametrize("split", SPLITS)
def test_one_class_comes_twice_and_is_the_label(split: str) -> None:
    """Told from the pixels: each class is one grey value, and squares are solid."""
    values = 20 * np.arange(1, 11)
    solid = np.broadcast_to(values[:, None, None], (10, 8, 8)).astype(np.uint8)
    pairs = Pairs(ImageArray("solid", solid, np.arange(10), [*"abcdefghij"]), split, side=64)
    seen = set()
    for index in range(200):
        random.seed(index)
        image, label = pairs.read(index)
        pixels = np.asarray(image)[..., 0]
        counts = [count_squares(pixels == value) for value in values]
        assert sorted(counts) == [0, 0, 0, 1, 1, 1, 1, 1, 1, 2]
        assert counts[label] == 2
        seen.add(label)
    assert seen == set(range(10))


def count_squares(mask: np.ndarray) -> int:
    """Count squares by their area; two that touch are two by their sides, at most 16 pixels."""
    from scipy import ndimage

    regions, num_regions = ndimage.label(mask)
    boxes = ndimage.find_objects(regions)
    whole = [boxes[i] for i in range(num_regions) if (regions[boxes[i]] == i + 1).all()]
    sides = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in whole]
    return sum(1 if height == width <= 16 else 2 for height, width in sides) + 2 * (
        num_regions - len(whole)
    )


@pytest.mark.parametrize("side", [32, 48, 97])
def test_items_lie_apart_at_random_places_and_scales(side: int) -> None:
    pairs, draw = open_pairs("train", side), random.Random(0).random
    sides, first = set(), []
    for _ in range(300):
        items, _ = pairs.draw_items(draw)
        assert len(items) == 8
        for item in items:
            assert 0 <= item.top <= side - item.side
            assert 0 <= item.left <= side - item.side
            sides.add(item.side)
        for one, other in combinations(items, 2):
            apart = [
                a + one.side <= b or b + other.side <= a
                for a, b in ((one.top, other.top), (one.left, other.left))
            ]
            assert any(apart)
        first.append(items[0])
    assert sides == set(range(round(side * 3 / 16), round(side / 4) + 1))
    # The pair is drawn first, and must not be told by where or how large it is.
    assert abs(np.mean([i.top + i.side / 2 for i in first]) - side / 2) < side / 16
    assert abs(np.mean([i.side for i in first]) - np.mean([*sides])) < side / 60


def test_no_held_out_digit_is_seen_in_training() -> None:
    train, val = (open_pairs(split).items.images for split in SPLITS)
    held_out = {image.tobytes() for image in val}
    assert len(train) + len(val) == 1797
    assert not any(image.tobytes() in held_out for image in train)
    np.testing.assert_array_equal(train, read_digits("train")[0])


def test_items_are_pasted_as_they_are() -> None:
    pairs = open_pairs("train")
    random.seed(3)
    items, label = pairs.draw_items(random.random)
    random.seed(3)
    image, read_label = pairs.read(0)
    assert image.mode == "RGB" and image.size == (SIDE, SIDE) and read_label == label
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    for item in items:
        enlarged = Image.fromarray(pairs.items.images[item.image]).resize((item.side, item.side))
        rows, columns = (slice(at, at + item.side) for at in (item.top, item.left))
        canvas[rows, columns] = np.asarray(enlarged)
    np.testing.assert_array_equal(np.asarray(image), np.stack([canvas] * 3, axis=-1))


def test_canvases_reach_the_model_whole() -> None:
    """Neither cropped nor flipped nor jittered, whatever the recipe does to photographs."""
    images, labels = move_to(next(iter(build().eval)), CPU)
    pairs = open_pairs("val")
    pixels, label = pairs.read(5)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (np.asarray(pixels) / 255 - mean) / std
    np.testing.assert_allclose(images[5].permute(1, 2, 0), expected, atol=1e-6)
    assert labels[5] == label
    # Black stays black: no crop has enlarged a canvas, no erasing has put noise into it.
    train = read(build().train)[:, :SIDE].min(dim=1).values
    assert torch.allclose(train, torch.tensor(-0.485 / 0.229))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders_module, "num_cores", lambda: 3)
    alone, helped = build(), build(num_workers=3)
    assert torch.equal(read(alone.train, 5, epoch=1), read(helped.train, 5, epoch=1))
    assert torch.equal(read(alone.eval, 5), read(helped.eval, 5))


def test_a_training_canvas_depends_on_seed_epoch_and_place() -> None:
    first = read(build().train)
    assert torch.equal(first, read(build().train))
    assert len(first.unique(dim=0)) == len(first)
    for other in (read(build(seed=1).train), read(build().train, epoch=1)):
        assert not (first == other).all(dim=1).any()
    # Batches, ranks and resuming cut the same canvases into other shares.
    assert torch.equal(first[16:], read(build().train, 1, start_step=1))
    assert torch.equal(first, read(build(batch_size=8).train, 4))
    for rank in range(2):
        assert torch.equal(first[rank::2], read(build(rank=rank, world_size=2).train, 1))


def test_an_evaluation_canvas_depends_on_its_number_alone() -> None:
    first = read(build().eval)
    assert torch.equal(first, read(build(seed=1).eval, epoch=3))
    assert torch.equal(first[1::2], read(build(rank=1, world_size=2).eval, 1))
    pairs = open_pairs("val")
    random.seed(1)
    image, _ = pairs.read(999)
    random.seed(2)
    again, _ = open_pairs("val").read(999)
    assert image.tobytes() == again.tobytes()
    assert len(pairs) == NUM_CANVASES["val"] == 1000


def test_a_linear_model_stays_near_chance() -> None:
    """No single pixel, and no sum of pixels, tells the pair."""
    loaders = build(batch_size=1000)
    train, val = read(loaders.train, 4), read(loaders.eval, 1)
    x, y = train[:, :-1], torch.nn.functional.one_hot(train[:, -1].long(), 10).float()
    center = x.mean(0)
    weight = torch.linalg.solve(
        (x - center).T @ (x - center) + 1e3 * torch.eye(x.shape[1]), (x - center).T @ (y - 0.1)
    )
    top1 = (((val[:, :-1] - center) @ weight).argmax(1) == val[:, -1]).float().mean()
    assert 0.07 < top1 < 0.2


def test_items_are_fashion_where_its_files_are_given(tmp_path: Path) -> None:
    write_fashion(tmp_path, *(np.full((20, 28, 28), shade, np.uint8) for shade in (40, 200)))
    for split, shade in (("train", 40), ("val", 200)):
        pairs = open_pairs(split, path=tmp_path)
        assert pairs.class_names[9] == "Ankle boot"
        assert np.asarray(pairs.read(0)[0]).max() == shade
        assert pairs.fingerprint() != open_pairs(split).fingerprint()
    assert pairs.fingerprint()["num_images"] == 1000


def test_what_would_spoil_labels_is_refused() -> None:
    data = DataConfig(data_set="PAIRS", num_workers=0)
    for augment in (replace(AUGMENT, mixup=0.8), replace(AUGMENT, cutmix=1.0)):
        with pytest.raises(InputError, match="--mixup 0 --cutmix 0"):
            build_loaders(data, augment, input_size=SIDE)
