"""What is done to images before a model sees them: DeiT's recipe, by timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image, ImageOps
from torch import Tensor

from ecoformer.errors import InputError

if TYPE_CHECKING:
    from timm.data import Mixup

    from ecoformer.config.schema import AugmentConfig

Transform = Callable[[Image.Image], Tensor]

# Up to this side, images are taken as they are: CIFAR's are as large.
SMALL_SIZE = 32
_POSTERIZE_OPS = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")


def build_train_transform(augment: AugmentConfig, *, input_size: int) -> Transform:
    """Build the random transform of training images.

    It draws from the global generators of Python, NumPy and PyTorch alone.

    Returns:
        A function from an RGB image to [3, input_size, input_size], float32.

    Raises:
        InputError: timm does not know the policy.
    """
    from timm.data import auto_augment, create_transform
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
            re_prob=augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"--aa {augment.aa!r} is no policy of timm; expected one like "
            "'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original' or 'v0'."
        ) from error
    if input_size <= SMALL_SIZE:
        transform.transforms[:1] = [
            transforms.Resize(input_size, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(input_size, padding=4),
        ]
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    # At full strength timm asks for no bit at all, which Pillow refuses since its version 13.
    return ImageOps.posterize(image, min(max(bits_to_keep, 1), 8))


def build_eval_transform(input_size: int) -> Transform:
    """Build the fixed transform of evaluation images.

    Returns:
        A function from an RGB image to [3, input_size, input_size], float32.

    Source: DeiT, as released; EcoFormer evaluates with it.
    """
    from torchvision import transforms

    resized = input_size * 256 // 224 if input_size > SMALL_SIZE else input_size
    return transforms.Compose(
        [
            transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(input_size),
            build_plain_transform(),
        ]
    )


def build_plain_transform() -> Transform:
    """Build what only normalises: an RGB image to [3, height, width], float32, whole as it is."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


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
