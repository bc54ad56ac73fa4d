"""What is done to images before a model sees them: DeiT's recipe, by timm and torchvision."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ecoformer.data.pixels import Area, Picture
from ecoformer.errors import InputError

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation

    from ecoformer.config.schema import AugmentConfig

# From an RGB image.
Transform = Callable[[Image.Image], Picture]
_Step = Callable[[Image.Image], Image.Image]

# Up to this side, images are taken as they are: CIFAR's are as large.
SMALL_SIZE = 32
_POSTERIZE_OPS = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")


def build_train_transform(augment: AugmentConfig, *, input_size: int) -> Transform:
    """Build the random transform of training images, to [input_size, input_size, 3].

    It draws from the global generators of Python, NumPy and PyTorch alone.

    Raises:
        InputError: timm does not know the policy.
    """
    from timm.data import auto_augment, create_transform
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms

    auto_augment.NAME_TO_OP.update(dict.fromkeys(_POSTERIZE_OPS, _posterize))
    try:
        transform = create_transform(
            input_size,
            is_training=True,
            scale=augment.scale,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.aa,
            interpolation=augment.train_interpolation,
            # Ends in an array of bytes.
            use_prefetcher=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"--aa {augment.aa!r} is no policy of timm; expected one like "
            "'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original' or 'v0'."
        ) from error
    crop, *rest, _ = transform.transforms
    first: list[_Step] = [crop]
    if input_size <= SMALL_SIZE:
        first = [
            transforms.Resize(input_size, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(input_size, padding=4),
        ]
    elif augment.tensor_resize:
        first = [_TensorCrop(crop)]
    erasing = None
    if augment.reprob:
        erasing = RandomErasing(
            augment.reprob, mode=augment.remode, max_count=augment.recount, device="cpu"
        )
    return _PictureTransform([*first, *rest], erasing)


class _PictureTransform:
    """Functions of an image, one after the other, and what is erased of the last one's."""

    def __init__(self, steps: Sequence[_Step], erasing: RandomErasing | None = None) -> None:
        self._steps = steps
        self._erasing = erasing

    def __call__(self, image: Image.Image) -> Picture:
        for step in self._steps:
            image = step(image)
        pixels = torch.from_numpy(np.array(image))
        if self._erasing is None:
            return Picture(pixels)
        erased = _Erased(*pixels.shape[:2])
        self._erasing(erased)
        return Picture(pixels, erased.areas)


class _Erased:
    """Stands in for an image [3, height, width] where timm erases, and notes what is written."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self._shape = 3, height, width
        self.areas: list[tuple[Area, Tensor]] = []

    def size(self) -> tuple[int, int, int]:
        return self._shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        height, width = rows.stop - rows.start, columns.stop - columns.start
        area = Area(rows.start, columns.start, height, width)
        self.areas.append((area, values.expand(3, height, width)))


class _TensorCrop:
    """timm's random crop, by the same draws, but resized as a tensor of bytes."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self._crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms.v2 import functional as F

        crop = self._crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        modes = crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        cut = np.array(image.crop((left, top, left + width, top + height)))
        resized = F.resize(torch.from_numpy(cut).movedim(-1, 0), crop.size, mode, antialias=True)
        return Image.fromarray(resized.movedim(0, -1).numpy())


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    # At full strength timm asks for no bit at all, which Pillow refuses since its version 13.
    return ImageOps.posterize(image, min(max(bits_to_keep, 1), 8))


def build_eval_transform(input_size: int) -> Transform:
    """Build the fixed transform of evaluation images, to [input_size, input_size, 3].

    Source: DeiT, as released; EcoFormer evaluates with it.
    """
    from torchvision import transforms

    resized = input_size * 256 // 224 if input_size > SMALL_SIZE else input_size
    return _PictureTransform(
        [
            transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(input_size),
        ]
    )


def build_plain_transform() -> Transform:
    """Build what takes an RGB image whole, as it is."""
    return _PictureTransform([])


def build_mixup(augment: AugmentConfig, *, num_classes: int) -> Mixup | None:
    """Build what blends the images and labels of a batch; None where nothing is on.

    It takes images [B, 3, height, width], float, B even, and labels [B], int64; it
    returns the images, blended in place, and soft labels [B, num_classes], float. It draws from
    NumPy's global generator.
    """
    if not (augment.mixup or augment.cutmix or augment.cutmix_minmax):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        cutmix_minmax=augment.cutmix_minmax,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
