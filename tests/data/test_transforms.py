"""Transforms: random ones that a seed repeats, and the released fixed one."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision.transforms import Normalize, ToTensor

from ecoformer.config.schema import AugmentConfig
from ecoformer.data.pixels import Picture, collate_pictures, normalize
from ecoformer.data.transforms import (
    build_eval_transform,
    build_mixup,
    build_train_transform,
)
from ecoformer.errors import InputError
from ecoformer.seeding import seeded


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def unpack(picture: Picture) -> Tensor:
    """[3, height, width], as a network takes it."""
    batch, _ = collate_pictures([(picture, 0)])
    return batch.unpack(torch.device("cpu"))[0]


FIELDS = pytest.mark.parametrize(
    "fields",
    [
        {},
        {"aa": None, "train_interpolation": "random", "remode": "rand", "recount": 3},
        {"aa": "augmix-m9-w3", "reprob": 1.0, "remode": "const"},
        {"aa": "original"},
        {"tensor_resize": True},
        {"tensor_resize": True, "train_interpolation": "random"},
    ],
)


@FIELDS
def test_training_draws_from_seeded_generators_only(fields: dict[str, Any]) -> None:
    transform = build_train_transform(AugmentConfig(**fields), input_size=40)
    image = noise(45, 61)

    def draw(seed: int) -> Tensor:
        with seeded(seed):
            return unpack(transform(image))

    first = [draw(seed) for seed in range(20)]
    again = [draw(seed) for seed in reversed(range(20))][::-1]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(not torch.equal(x, y) for x, y in pairwise(first))
    assert {(x.shape, x.dtype) for x in first} == {((3, 40, 40), torch.float32)}


def old_transform(augment: AugmentConfig, input_size: int) -> Any:
    """timm's, which normalises and erases while it reads; runs of earlier versions took that."""
    return create_transform(
        input_size,
        is_training=True,
        scale=augment.scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.aa,
        interpolation=augment.train_interpolation,
        re_prob=augment.reprob,
        re_mode=augment.remode,
        re_count=augment.recount,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"reprob": 0.0},
        {"reprob": 0.6},
        {"aa": None, "train_interpolation": "random", "remode": "rand", "recount": 3},
        {"aa": "augmix-m9-w3", "reprob": 1.0, "remode": "const"},
        {"aa": "original", "reprob": 1.0, "recount": 4},
    ],
)
def test_a_seed_gives_the_bits_that_it_gave(fields: dict[str, Any]) -> None:
    augment = AugmentConfig(**fields)
    transform = build_train_transform(augment, input_size=40)
    before, image = old_transform(augment, 40), noise(45, 61)
    pictures, expected = [], []
    for seed in range(24):
        with seeded(seed):
            pictures.append((transform(image), seed))
            states = random.random(), np.random.random(), torch.rand(())
        with seeded(seed):
            expected.append(before(image))
            # Nothing was drawn more, or less.
            assert states == (random.random(), np.random.random(), torch.rand(()))
    batch, labels = collate_pictures(pictures)
    assert torch.equal(batch.unpack(torch.device("cpu")), torch.stack(expected))
    assert labels.tolist() == list(range(24))
    assert bool(batch.areas) == (augment.reprob > 0)


def test_every_byte_is_normalised_to_the_bits_of_torchvision() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    moments = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    expected = Normalize(*moments)(ToTensor()(pixels[0]))
    assert torch.equal(normalize(torch.from_numpy(pixels))[0], expected)


@pytest.mark.gpu
def test_a_gpu_unpacks_the_same_bits() -> None:
    transform = build_train_transform(AugmentConfig(reprob=1.0), input_size=64)
    with seeded(0):
        batch, _ = collate_pictures([(transform(noise(90, 80)), 0) for _ in range(8)])
    expected = batch.unpack(torch.device("cpu"))
    found = batch.pin_memory().unpack(torch.device("cuda"))
    assert torch.equal(found.cpu(), expected)
    assert found.stride() == expected.stride()


def photograph(height: int, width: int) -> Image.Image:
    """Edges and slopes, and a little noise."""
    draw = np.random.RandomState(0)
    y, x = np.mgrid[:height, :width]
    waves = [
        128 + 90 * np.sin(x / a + y / b) * np.cos(y / a) for a, b in ((9, 31), (23, 5), (3, 50))
    ]
    pixels = np.stack(waves, -1) + draw.standard_normal((height, width, 3)) * 12
    pixels[y > height - x] = 255 - pixels[y > height - x]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_tensor_resize_is_nearly_that_of_pillow() -> None:
    fields: dict[str, Any] = {"aa": None, "color_jitter": 0.0, "reprob": 0.0}
    transform_of = {
        on: build_train_transform(AugmentConfig(**fields, tensor_resize=on), input_size=224)
        for on in (False, True)
    }
    image = photograph(375, 500)
    differences = []
    for seed in range(40):
        with seeded(seed):
            one = transform_of[False](image).pixels.int()
        with seeded(seed):
            other = transform_of[True](image).pixels.int()
        differences.append((one - other).abs())
    found = torch.stack(differences)
    # As the README says.
    assert 0 < found.float().mean() < 0.1
    assert found.max() <= 8


def test_small_images_are_never_resized_as_tensors() -> None:
    for given in (28, 32):
        drawn = []
        for on in (False, True):
            transform = build_train_transform(AugmentConfig(tensor_resize=on), input_size=32)
            with seeded(0):
                drawn.append(unpack(transform(noise(given, given))))
        assert torch.equal(*drawn)


@pytest.mark.parametrize("aa", ["rand-m10-inc1-n15", "rand-m1-n15", "v0"])
def test_strongest_posterization_keeps_an_image(aa: str) -> None:
    transform = build_train_transform(AugmentConfig(aa=aa, reprob=0.0), input_size=40)
    with seeded(0):
        for _ in range(60):
            assert unpack(transform(noise(40, 40))).isfinite().all()


@pytest.mark.parametrize("aa", ["randaugment", "rand-q9", "v7"])
def test_unknown_policy_is_named(aa: str) -> None:
    with pytest.raises(InputError, match=f"--aa '{aa}' is no policy"):
        build_train_transform(AugmentConfig(aa=aa), input_size=40)


def test_evaluation_is_as_released() -> None:
    # 375 x 500 becomes 256 x 341, of which the middle 224 x 224 remains.
    image = noise(375, 500)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
    pixels = np.asarray(resized, np.float32).transpose(2, 0, 1) / 255
    moments = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    mean, std = moments[..., None, None]
    found = unpack(build_eval_transform(224)(image))
    np.testing.assert_allclose(found, (pixels - mean) / std, atol=1e-6)


def test_small_images_are_evaluated_as_they_are() -> None:
    image = noise(32, 32)
    pixels = unpack(build_eval_transform(32)(image)) * 0.225 + 0.406
    expected = torch.from_numpy(np.asarray(image)[..., 2].copy()) / 255
    torch.testing.assert_close(pixels[2], expected)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (50, 41)])
def test_small_images_are_cropped_from_a_padded_frame(size: tuple[int, int]) -> None:
    augment = AugmentConfig(aa=None, color_jitter=0.0, reprob=0.0)
    transform = build_train_transform(augment, input_size=32)
    white = Image.new("RGB", size, "white")
    with seeded(0):
        crops = torch.stack([unpack(transform(white)) for _ in range(100)])
    assert crops.shape == (100, 3, 32, 32)
    red = crops[:, 0]
    frame = (red == red.min()).float().mean().item()
    # Four pixels of black around 32: an average crop holds 12 % of it.
    assert 0.05 < frame < 0.2


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_flips_as_often_as_asked(hflip: float) -> None:
    augment = AugmentConfig(aa=None, color_jitter=0.0, reprob=0.0, hflip=hflip, scale=(0.9, 1.0))
    transform = build_train_transform(augment, input_size=40)
    half = np.zeros((40, 40, 3), dtype=np.uint8)
    half[:, 20:] = 255
    pixels = torch.stack([unpack(transform(Image.fromarray(half))) for _ in range(10)])
    is_left_bright = pixels[..., :10].mean((1, 2, 3)) > pixels[..., -10:].mean((1, 2, 3))
    assert is_left_bright.all() if hflip else not is_left_bright.any()


def test_scale_bounds_the_crop() -> None:
    augment = AugmentConfig(aa=None, color_jitter=0.0, reprob=0.0, hflip=0.0, scale=(0.01, 0.02))
    transform = build_train_transform(augment, input_size=40)
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))
    pixels = torch.stack([unpack(transform(Image.fromarray(ramp))) for _ in range(10)])
    # A fiftieth of the area, at most 4:3, is at most a sixth of the side.
    span = (pixels.amax((2, 3)) - pixels.amin((2, 3)))[:, 0] * 0.229
    assert (span < 1 / 5).all()


def test_mixup_follows_numpy_and_smooths_labels() -> None:
    mixup = build_mixup(AugmentConfig(), num_classes=5)
    assert mixup is not None
    outcomes = []
    for _ in range(2):
        with seeded(3):
            outcomes.append(mixup(torch.arange(4.0).reshape(4, 1, 1, 1), torch.arange(4)))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    labels = outcomes[0][1]
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
    # Class 4 occurs in no image: it has what smoothing spreads.
    torch.testing.assert_close(labels[:, 4], torch.full((4,), 0.1 / 5))


def test_mixup_is_off_where_nothing_is_on() -> None:
    assert build_mixup(AugmentConfig(mixup=0.0, cutmix=0.0), num_classes=5) is None
    minmax = build_mixup(
        AugmentConfig(mixup=0.0, cutmix=0.0, cutmix_minmax=(0.2, 0.8)), num_classes=5
    )
    assert minmax is not None
